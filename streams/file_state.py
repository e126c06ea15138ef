"""What a file source remembers between runs: committed offsets, and which file began at which offset."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from streams.base import Partition, StreamError
from streams.seams import failpoint

HEAD_BYTES: Final = 1024
"""A file is known by the checksum of this many first bytes; they never change while a file only grows."""

MAX_SEGMENTS: Final = 16
"""Rotated files remembered for one partition; more than any checkpoint kept can reach back to in practice."""

_NAME: Final = "offsets.json"
_VERSION: Final = 1


class Identity(NamedTuple):
    """What tells a file from another that takes its name, or its inode, later."""

    device: int
    inode: int
    head: int
    """First bytes that are covered by the checksum; fewer than `HEAD_BYTES` while the file was short."""
    crc: int


def identify(fd: int) -> Identity:
    """Take the identity of an open file."""
    status = os.fstat(fd)
    head = os.pread(fd, HEAD_BYTES, 0)
    return Identity(status.st_dev, status.st_ino, len(head), zlib.crc32(head))


def begins_alike(fd: int, identity: Identity) -> bool:
    """Whether the file still begins with the bytes that the identity was taken of."""
    head = os.pread(fd, identity.head, 0)
    return len(head) == identity.head and zlib.crc32(head) == identity.crc


def same_inode(fd: int, identity: Identity) -> bool:
    """Whether the file is where the identity was taken, whatever it holds now."""
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino) == (identity.device, identity.inode)


class Segment(NamedTuple):
    """One of the files that a partition has been in, in the course of rotation."""

    base: int
    """Offset of its first byte."""
    identity: Identity


@dataclass
class PartitionState:
    """What is remembered of one partition."""

    name: str
    committed: int | None = None
    segments: list[Segment] = field(default_factory=list)

    def begin(self, segment: Segment) -> None:
        """Remember that the partition goes on in another file."""
        self.segments = [*self.segments[1 - MAX_SEGMENTS :], segment]


class FileState:
    """The memory of a file source: one small file, replaced atomically; without a directory it lives in memory.

    Args:
        directory: Where to keep ``offsets.json``; made if it is not there.
    """

    def __init__(self, directory: Path | None) -> None:
        self.partitions: dict[Partition, PartitionState] = {}
        self._path = None if directory is None else directory / _NAME

    def load(self) -> None:
        """Read what was saved, if anything was.

        Raises:
            StreamError: The file cannot be read or is not what `save` writes.
        """
        if self._path is None or self.partitions:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise StreamError(f"cannot read {self._path}: {error.strerror}") from error
        try:
            self.partitions = _decode(json.loads(raw))
        except (ValueError, TypeError, KeyError) as error:
            raise StreamError(
                f"{self._path} is not a file of offsets of version {_VERSION}; move it away to begin at the checkpoint"
            ) from error

    def save(self) -> None:
        """Replace the file; once this returns it survives a crash.

        Raises:
            StreamError: It could not be written.
        """
        if self._path is None:
            return
        temporary = self._path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(json.dumps(_encode(self.partitions), indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            failpoint("files.written")
            temporary.replace(self._path)
            failpoint("files.renamed")
            sync_directory(self._path.parent)
        except OSError as error:
            raise StreamError(f"cannot write {self._path}: {error.strerror}") from error


def sync_directory(directory: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encode(partitions: dict[Partition, PartitionState]) -> dict[str, Any]:
    rows = [{"stream": stream, "partition": number} | asdict(kept) for (stream, number), kept in partitions.items()]
    return {"version": _VERSION, "partitions": rows}


def _decode(saved: dict[str, Any]) -> dict[Partition, PartitionState]:
    if saved["version"] != _VERSION:
        raise ValueError(saved["version"])
    partitions = {}
    for row in saved["partitions"]:
        segments = [Segment(int(base), Identity(*map(int, identity))) for base, identity in row["segments"]]
        committed = None if row["committed"] is None else int(row["committed"])
        partitions[str(row["stream"]), int(row["partition"])] = PartitionState(str(row["name"]), committed, segments)
    return partitions
