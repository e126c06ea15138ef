"""The few operations on files that the store needs, in one place so that tests can fail, record and replay them."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, cast

from engine.checkpoint.lock import take_directory
from streams.seams import failpoint

Kind = Literal["file", "directory", "link", "other"]


class Disk(Protocol):
    """What the store asks of a file system. Every call may raise `OSError`.

    Nothing is durable before `fsync` (bytes of a file) and `sync_dir` (names in a directory) return.
    """

    def lock(self, directory: Path) -> Callable[[], None]:
        """Create the state directory if need be and take it for this process; return what gives it back.

        Raises:
            StateLockedError: Another process has it.
            StorageError: The directory must not or cannot be used.
        """
        ...

    def kind(self, path: Path) -> Kind | None:
        """What is there, links not followed; None for nothing."""
        ...

    def listdir(self, path: Path) -> list[str]:
        """Names in a directory, in any order."""
        ...

    def mkdir(self, path: Path) -> None:
        """Make a directory that did not exist, open to its owner alone."""
        ...

    def create(self, path: Path) -> BinaryIO:
        """Make a file that did not exist, open to its owner alone. Writes may be partial and are not buffered."""
        ...

    def fsync(self, file: BinaryIO) -> None:
        """Return once what was written to ``file`` is durable. Never to be called again after it raised."""
        ...

    def open(self, path: Path) -> BinaryIO:
        """Open a regular file for reading, links refused."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Give ``old`` the name ``new``, replacing a file of that name, in one step."""
        ...

    def sync_dir(self, path: Path) -> None:
        """Return once the names in a directory are durable."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""
        ...

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        ...

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write to the file system of ``path``."""
        ...


class LocalDisk:
    """The file system of this machine.

    Args:
        allow_network: Accept a state directory on a network file system, where locks and `fsync` may promise less.
    """

    def __init__(self, *, allow_network: bool = False) -> None:
        self._allow_network = allow_network

    def lock(self, directory: Path) -> Callable[[], None]:
        """See `Disk.lock`."""
        return take_directory(directory, allow_network=self._allow_network)

    def kind(self, path: Path) -> Kind | None:
        """See `Disk.kind`."""
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(mode):
            return "link"
        if stat.S_ISDIR(mode):
            return "directory"
        return "file" if stat.S_ISREG(mode) else "other"

    def listdir(self, path: Path) -> list[str]:
        """See `Disk.listdir`."""
        return os.listdir(path)

    def mkdir(self, path: Path) -> None:
        """See `Disk.mkdir`."""
        failpoint("disk.mkdir")
        os.mkdir(path, 0o700)

    def create(self, path: Path) -> BinaryIO:
        """See `Disk.create`."""
        failpoint("disk.create")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        return cast("BinaryIO", os.fdopen(handle, "wb", buffering=0))

    def fsync(self, file: BinaryIO) -> None:
        """See `Disk.fsync`."""
        failpoint("disk.fsync")
        os.fsync(file.fileno())

    def open(self, path: Path) -> BinaryIO:
        """See `Disk.open`."""
        # O_NONBLOCK: opening a FIFO for reading would otherwise wait for somebody to write.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.ELOOP, "not a regular file", str(path))
        return os.fdopen(handle, "rb")

    def rename(self, old: Path, new: Path) -> None:
        """See `Disk.rename`."""
        failpoint("disk.rename")
        os.rename(old, new)

    def sync_dir(self, path: Path) -> None:
        """See `Disk.sync_dir`."""
        failpoint("disk.sync_dir")
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def unlink(self, path: Path) -> None:
        """See `Disk.unlink`."""
        failpoint("disk.unlink")
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """See `Disk.rmdir`."""
        failpoint("disk.rmdir")
        os.rmdir(path)

    def free_bytes(self, path: Path) -> int:
        """See `Disk.free_bytes`."""
        return shutil.disk_usage(path).free


def remove_tree(disk: Disk, path: Path) -> None:
    """Remove whatever is at ``path``, links not followed. The order and a crash half way do not matter to anyone."""
    if disk.kind(path) != "directory":
        disk.unlink(path)
        return
    for name in disk.listdir(path):
        remove_tree(disk, path / name)
    disk.rmdir(path)
