"""A disk in memory that forgets: which states may a crash leave behind, after each of the operations done on it?

The model is that of a local journalling file system, at its least helpful:

- bytes that were written and not synced may be there, absent, there up to any of the writes or to the middle of one,
  or there in length and zero in content;
- changes of names in a directory (create, remove, rename) that were not synced may each be there or not, in any
  combination, also when the bytes that they name are missing;
- a rename inside one directory is one change; across directories it is two.
"""

from __future__ import annotations

import errno
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from engine.checkpoint.disk import Kind

Tree: TypeAlias = "dict[str, Tree | bytes]"
"""What is on a disk: directories and files by name."""


@dataclass(eq=False)
class File:
    written: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    ends: list[int] = field(default_factory=list)
    """How long it was after each write since the last sync."""

    def append(self, data: bytes | memoryview) -> None:
        self.written += data
        self.ends.append(len(self.written))

    def sync(self) -> None:
        self.durable = bytes(self.written)
        self.ends.clear()


@dataclass(eq=False)
class Directory:
    names: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[dict[str, File | Directory | None]] = field(default_factory=list)
    """Changes of names since the last sync; None removes."""

    def change(self, names: dict[str, File | Directory | None]) -> None:
        self.pending.append(names)
        apply(self.names, names)

    def sync(self) -> None:
        self.durable = dict(self.names)
        self.pending.clear()


def apply(names: dict[str, File | Directory], change: Mapping[str, File | Directory | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class MemoryFile(io.RawIOBase):
    def __init__(self, disk: MemoryDisk, node: File) -> None:
        self.disk = disk
        self.node = node

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        self.disk.happens("write")
        view = memoryview(cast("bytes", data))[: self.disk.most]
        self.node.append(view)
        return len(view)


class MemoryDisk:
    """A `Disk` that holds ``root`` alone and calls ``watch`` before every operation that changes something."""

    def __init__(self, root: Path, tree: Tree | None = None) -> None:
        self.root = root
        self.top = _grow(tree or {})
        self.watch: Callable[[str], None] = lambda operation: None
        self.free = 1 << 40
        self.most = 1 << 40
        """Bytes that one write takes."""

    def happens(self, operation: str) -> None:
        self.watch(operation)

    def lock(self, directory: Path) -> Callable[[], None]:
        assert directory == self.root
        return lambda: None

    def kind(self, path: Path) -> Kind | None:
        try:
            node = self._find(path)
        except FileNotFoundError:
            return None
        return "directory" if isinstance(node, Directory) else "file"

    def listdir(self, path: Path) -> list[str]:
        return list(self._directory(path).names)

    def mkdir(self, path: Path) -> None:
        self.happens("mkdir")
        self._add(path, Directory())

    def create(self, path: Path) -> BinaryIO:
        self.happens("create")
        node = File()
        self._add(path, node)
        return cast("BinaryIO", MemoryFile(self, node))

    def fsync(self, file: BinaryIO) -> None:
        self.happens("fsync")
        cast("MemoryFile", file).node.sync()

    def open(self, path: Path) -> BinaryIO:
        node = self._find(path)
        assert isinstance(node, File)
        return io.BytesIO(bytes(node.written))

    def rename(self, old: Path, new: Path) -> None:
        self.happens("rename")
        node, source, target = self._find(old), self._directory(old.parent), self._directory(new.parent)
        there = target.names.get(new.name)
        if isinstance(there, Directory) and there.names:
            raise OSError(errno.ENOTEMPTY, "directory not empty", str(new))
        if source is target:
            source.change({old.name: None, new.name: node})
        else:
            source.change({old.name: None})
            target.change({new.name: node})

    def sync_dir(self, path: Path) -> None:
        self.happens("sync_dir")
        self._directory(path).sync()

    def unlink(self, path: Path) -> None:
        self.happens("unlink")
        assert isinstance(self._find(path), File)
        self._directory(path.parent).change({path.name: None})

    def rmdir(self, path: Path) -> None:
        self.happens("rmdir")
        assert not self._directory(path).names
        self._directory(path.parent).change({path.name: None})

    def free_bytes(self, path: Path) -> int:
        return self.free

    def crash_states(self) -> Iterator[Tree]:
        """Every tree that may be found after a crash at this instant."""
        return _directory_states(self.top)

    def _find(self, path: Path) -> File | Directory:
        node: File | Directory = self.top
        above, parts = self.root.parts, path.parts  # `relative_to` takes most of the time of all crash states
        if parts[: len(above)] != above:
            raise ValueError(f"{path} is not on this disk")
        for name in parts[len(above) :]:
            if not isinstance(node, Directory) or name not in node.names:
                raise FileNotFoundError(errno.ENOENT, "no such file or directory", str(path))
            node = node.names[name]
        return node

    def _directory(self, path: Path) -> Directory:
        node = self._find(path)
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        return node

    def _add(self, path: Path, node: File | Directory) -> None:
        parent = self._directory(path.parent)
        if path.name in parent.names:
            raise FileExistsError(errno.EEXIST, "file exists", str(path))
        parent.change({path.name: node})


def freeze(tree: Tree) -> frozenset[tuple[str, object]]:
    """The same as something that can be compared and put into a set."""
    return frozenset((name, node if isinstance(node, bytes) else freeze(node)) for name, node in tree.items())


def _grow(tree: Tree) -> Directory:
    names = {
        name: File(bytearray(node), node) if isinstance(node, bytes) else _grow(node) for name, node in tree.items()
    }
    return Directory(dict(names), dict(names))


def _directory_states(directory: Directory) -> Iterator[Tree]:
    seen = set()
    for kept in itertools.product((False, True), repeat=len(directory.pending)):
        names = dict(directory.durable)
        for change in itertools.compress(directory.pending, kept):
            apply(names, change)
        key = frozenset((name, id(node)) for name, node in names.items())
        if key in seen:
            continue
        seen.add(key)
        choices = [list(_states(node)) for node in names.values()]
        for contents in itertools.product(*choices):
            yield dict(zip(names, contents, strict=True))


def _states(node: File | Directory) -> Iterator[Tree | bytes]:
    if isinstance(node, Directory):
        yield from _directory_states(node)
        return
    whole, durable = bytes(node.written), node.durable
    if whole == durable:
        yield whole
        return
    found = {durable, whole}
    if whole.startswith(durable):
        found.add(durable + bytes(len(whole) - len(durable)))
        for before, after in itertools.pairwise([len(durable), *node.ends]):
            found |= {whole[: (before + after) // 2], whole[:after]}
    yield from found
