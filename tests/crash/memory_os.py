"""A `MemoryDisk` for code that calls ``os`` and `pathlib` itself: what the journal needs of both."""

from __future__ import annotations

import os
from pathlib import Path, PosixPath
from types import SimpleNamespace

from tests.crash.enumerator import File, MemoryDisk


class MemoryOs:
    """Stands in the place of the module ``os``, on one disk in memory. Files are written at their ends alone."""

    O_WRONLY, O_APPEND, O_CLOEXEC, O_NOFOLLOW = os.O_WRONLY, os.O_APPEND, os.O_CLOEXEC, os.O_NOFOLLOW
    O_CREAT, O_EXCL, O_RDONLY, O_DIRECTORY = os.O_CREAT, os.O_EXCL, os.O_RDONLY, os.O_DIRECTORY

    def __init__(self, disk: MemoryDisk) -> None:
        self.disk = disk
        self._open: dict[int, Path] = {}
        self._next = 100

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            self.disk.create(path)
        assert self.disk.kind(path) is not None, path
        self._next += 1
        self._open[self._next] = path
        return self._next

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]

    def write(self, descriptor: int, data: bytes) -> int:
        self.disk.happens("write")
        self._file(self._open[descriptor]).append(data)
        return len(data)

    def fstat(self, descriptor: int) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(self._file(self._open[descriptor]).written))

    def ftruncate(self, descriptor: int, size: int) -> None:
        self.truncate(self._open[descriptor], size)

    def truncate(self, path: Path, size: int) -> None:
        self.disk.happens("truncate")
        file = self._file(path)
        del file.written[size:]
        file.ends = [end for end in file.ends if end <= size]

    def fdatasync(self, descriptor: int) -> None:
        self.disk.happens("fsync")
        self._file(self._open[descriptor]).sync()

    def fsync(self, descriptor: int) -> None:
        """Of a directory: the journal syncs no file this way."""
        self.disk.sync_dir(self._open[descriptor])

    def listdir(self, path: Path) -> list[str]:
        return self.disk.listdir(path)

    def _file(self, path: Path) -> File:
        node = self.disk._find(path)
        assert isinstance(node, File)
        return node


def path_on(disk: MemoryDisk) -> Path:
    """The root of a disk as a path whose methods work on it."""

    class OnDisk(PosixPath):
        def read_bytes(self) -> bytes:
            with disk.open(self) as file:
                return file.read()

        def unlink(self, missing_ok: bool = False) -> None:
            disk.unlink(self)

        def rename(self, target: str | os.PathLike[str]) -> OnDisk:
            disk.rename(self, Path(target))
            return OnDisk(target)

        def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            if not exist_ok or disk.kind(self) is None:
                disk.mkdir(self)

    return OnDisk(disk.root)
