"""One process per state directory: who may use it, and who does."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

from engine.checkpoint.errors import StateLockedError
from engine.errors import StorageError

NETWORK_FILE_SYSTEMS = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "lustre", "nfs"}
    | {"nfs4", "smb3", "smbfs"}
)


def take_directory(directory: Path, *, allow_network: bool) -> Callable[[], None]:
    """Create ``directory`` if need be and take its lock; return what gives it back.

    The kernel frees the lock when the process ends, however it ends; the process id in the file only serves messages.
    The file itself is never removed: another process might be opening it.

    Raises:
        StateLockedError: Another process holds the lock.
        StorageError: The directory is not one, belongs to another user, is open to everybody, cannot be written, or
            is on a network file system and ``allow_network`` is false.
    """
    try:
        _prepare(directory, allow_network=allow_network)
        handle = os.open(directory / "LOCK", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"state directory {directory} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
    except BlockingIOError:
        holder = _holder(handle)
        os.close(handle)
        raise StateLockedError(directory, holder) from None
    except OSError as error:
        os.close(handle)
        raise StorageError(f"state directory {directory} cannot be locked: {error.strerror}") from error

    def give_back() -> None:
        os.ftruncate(handle, 0)
        os.close(handle)

    return give_back


def _prepare(directory: Path, *, allow_network: bool) -> None:
    _make(directory)
    found = os.stat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise StorageError(f"state directory {directory} is not a directory; choose another `state`")
    if found.st_mode & stat.S_IWOTH:
        raise StorageError(f"state directory {directory} can be written by everybody; run: chmod o-w {directory}")
    if found.st_uid not in (0, os.geteuid()):
        raise StorageError(
            f"state directory {directory} belongs to user {found.st_uid}, this process runs as {os.geteuid()}; "
            "run as its owner or choose another `state`"
        )
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise StorageError(f"state directory {directory} cannot be written by user {os.geteuid()}")
    kind = _file_system(directory)
    if kind in NETWORK_FILE_SYSTEMS and not allow_network:
        raise StorageError(
            f"state directory {directory} is on a network file system ({kind}), where a checkpoint may be "
            "lost after it was promised; choose a local disk for `state`"
        )


def _make(directory: Path) -> None:
    """Make the directory and the ones above it, and make their names durable."""
    if directory.exists():
        return
    _make(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _holder(handle: int) -> int | None:
    """The living process named in the lock file."""
    try:
        pid = int(os.pread(handle, 20, 0))
        if pid <= 0:  # to `kill` that would mean a group of processes
            return None
        os.kill(pid, 0)
    except PermissionError:
        return pid  # alive, and another user's
    except (ValueError, OSError, OverflowError):
        return None
    return pid


def _file_system(directory: Path) -> str:
    """The type of the file system below ``directory``; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    target, best, kind = directory.resolve(), -1, ""
    for line in lines:
        _, mount, its_kind, *_ = line.split(" ")
        point = Path(mount.replace("\\040", " "))
        if target.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), its_kind
    return kind
