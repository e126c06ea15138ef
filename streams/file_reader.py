"""Reading one partition of a file stream, through rotation and truncation.

Offsets are logical: the base of the present file plus a byte of it. When writing goes on in another file, its base is
the offset where the last one was left, so offsets of a partition only ever increase.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from streams.base import Partition, Record, StreamError
from streams.file_state import HEAD_BYTES, Identity, PartitionState, Segment, begins_alike, identify, same_inode
from streams.framing import FrameError, Origin, split_of

BLOCK_BYTES: Final = 1024 * 1024


class Reader(Protocol):
    """Reads one partition."""

    partition: Partition
    position: int
    """Offset where the next `take` begins."""
    torn: int
    """Bytes passed over because a crash or a truncation left only part of a record."""

    @property
    def bounded(self) -> bool:
        """Whether the partition ends."""
        ...

    @property
    def ended(self) -> bool:
        """Whether everything has been taken of a partition that ends."""
        ...

    def open(self, position: int) -> None:
        """Begin at an offset.

        Raises:
            StreamError: There is nothing to read there.
        """
        ...

    def take(self, max_records: int) -> Sequence[Record]:
        """Return the next records there are, without waiting."""
        ...

    def lag(self) -> int:
        """How much there is behind `position`: bytes, or rows of ``.npz``."""
        ...

    def refresh(self) -> None:
        """Update what is remembered of the present file."""
        ...

    def close(self) -> None:
        """Let go of the file. Safe to call twice."""
        ...


class FileReader:
    """Reads lines or frames of one file and of those that take its place.

    Args:
        partition: Stream and number of the partition.
        path: The file, by the name that writers use.
        follow: Wait for more at the end, and go on in the next file after rotation.
        state: What is remembered of the partition; changed here.
        save: Makes ``state`` durable; called when the file changes.

    Raises:
        StreamError: The name ends in neither ``.jsonl`` nor ``.rec``.
    """

    def __init__(
        self, partition: Partition, path: Path, *, follow: bool, state: PartitionState, save: Callable[[], None]
    ) -> None:
        self.partition = partition
        self.position = 0
        self.torn = 0
        self._path = path
        self._follow = follow
        self._state = state
        self._save = save
        self._split = split_of(path)
        self._lines = path.suffix == ".jsonl"
        self._fd = -1
        self._base = 0
        self._byte = 0
        self._limit: int | None = None
        self._renamed = False
        self._carry = b""
        self._ready: list[Record] = []
        self._next = 0
        self._done = False

    @property
    def bounded(self) -> bool:
        """Whether the partition ends."""
        return not self._follow

    @property
    def ended(self) -> bool:
        """Whether everything has been taken of a partition that ends."""
        return self._done and self._next >= len(self._ready)

    def open(self, position: int) -> None:
        """Begin at an offset.

        Raises:
            StreamError: The file is not there, or no file that is there holds the offset.
        """
        self.close()
        self.position = position
        self._ready, self._next, self._carry, self._done = [], 0, b"", False
        segments = self._state.segments
        if segments:
            index = max((i for i, segment in enumerate(segments) if segment.base <= position), default=-1)
            if index < 0:
                raise StreamError(f"{self._path}: offset {position} lies in a file that was rotated away long ago")
            self._enter(self._locate(segments[index]), segments[index].base, position)
        elif self._path.exists():
            self._enter(_open(self._path), 0, position)
            self._remember()
        elif position or not self._follow:
            raise StreamError(f"{self._path} does not exist")

    def take(self, max_records: int) -> list[Record]:
        """Return the next records there are, without waiting.

        Raises:
            StreamError: The file is damaged or cannot be read.
        """
        if self._next >= len(self._ready):
            self._fill()
        records = self._ready[self._next : self._next + max_records]
        self._next += len(records)
        if records:
            self.position = records[-1].end
        return records

    def lag(self) -> int:
        """Bytes behind `position`, as far as they are known."""
        if self._fd < 0:
            return 0
        end = self._base + os.fstat(self._fd).st_size
        if self._renamed or not self._is_current():
            end += _size(self._path)
        return max(0, end - self.position)

    def refresh(self) -> None:
        """Take the identity anew while the file was too short for a full one."""
        segments = self._state.segments
        if self._fd >= 0 and segments[-1].base == self._base and segments[-1].identity.head < HEAD_BYTES:
            segments[-1] = Segment(self._base, identify(self._fd))

    def close(self) -> None:
        """Let go of the file. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _fill(self) -> None:
        """Read blocks until there is a record, or nothing more for now."""
        self._ready, self._next = [], 0
        if self._fd < 0 and not self._appear():
            return
        while not self._ready and not self._done:
            if self._follow and not self._renamed and self._was_truncated():
                self._restart()
            block = self._read()
            if block:
                self._cut(block)
            elif not self._advance():
                return
        if not self._follow and not self._done and self._limit is not None and self._byte >= self._limit:
            self._advance()  # so that the end is known together with the last records

    def _appear(self) -> bool:
        """Open a followed file that was not there when the source was opened."""
        if not self._path.exists():
            return False
        self._enter(_open(self._path), 0, self.position)
        self._remember()
        return True

    def _read(self) -> bytes:
        size = BLOCK_BYTES if self._limit is None else min(BLOCK_BYTES, self._limit - self._byte)
        try:
            block = os.pread(self._fd, max(0, size), self._byte)
        except OSError as error:
            raise StreamError(f"cannot read {self._path}: {error.strerror}") from error
        self._byte += len(block)
        return block

    def _cut(self, block: bytes) -> None:
        buffer = self._carry + block if self._carry else block
        origin = Origin(*self.partition, self._base, self._byte - len(buffer))
        try:
            used = self._split(buffer, origin, self._ready)
        except FrameError as error:
            if self._ready:  # give what comes before the damage; the next call meets it first
                self._byte, self._carry = self._ready[-1].end - self._base, b""
                return
            raise StreamError(
                f"{self._path} is damaged at byte {origin.byte + error.at}: {error.message}; "
                f"restore the file, or cut it there"
            ) from None
        self._carry = buffer[used:]

    def _advance(self) -> bool:
        """At the end of a file: go on in the next one if there is one; say whether reading can go on."""
        following = self._following()
        if following is None:
            if not self._follow:
                self._finish_file()
                self._done = True
            return False
        if not following[1] and (block := self._read()):  # written between the last read and the rotation
            os.close(following[0])
            self._cut(block)
            return True
        fd, known = following
        self._finish_file()
        base = known.base if known else self._base + self._byte
        self.close()
        self._enter(fd, base, base)
        if known is None:
            self._remember()
        return True

    def _finish_file(self) -> None:
        """Give what is left at the end of a file that will not grow: a last line, or nothing of a torn frame."""
        carry, self._carry = self._carry, b""
        if not self._lines:
            self.torn += len(carry)
            return
        if not carry.strip():
            return
        end = self._base + self._byte
        self._ready.append(Record(*self.partition, end - len(carry), end, float("nan"), None, carry))

    def _following(self) -> tuple[int, Segment | None] | None:
        """Open the file after the present one; with its segment if it has been read before."""
        for segment in self._state.segments:
            if segment.base > self._base:
                return self._locate(segment), segment
        if not self._renamed and (not self._follow or self._is_current()):
            return None
        path = self._successor()
        # An empty successor may still see its predecessor grow: whoever writes has not moved on yet.
        if _size(path) == 0:
            return None
        return _open(path), None

    def _successor(self) -> Path:
        """The oldest file of the same name that was written after the present one and is not known yet."""
        written = os.fstat(self._fd).st_mtime_ns
        dated = re.compile(re.escape(self._path.name) + r"[.-]\d[\d.:_TZ-]*")
        found = [entry for entry in os.scandir(self._path.parent) if dated.fullmatch(entry.name)]
        later = sorted((entry.stat().st_mtime_ns, entry.path) for entry in found)
        fresh = (Path(path) for time, path in later if time > written and not self._is_known(Path(path)))
        return next(fresh, self._path)

    def _is_known(self, path: Path) -> bool:
        fd = _open(path)
        try:
            return any(same_inode(fd, s.identity) and begins_alike(fd, s.identity) for s in self._state.segments)
        finally:
            os.close(fd)

    def _is_current(self) -> bool:
        """Whether the open file still has the name that writers use, or nothing has that name."""
        try:
            there = self._path.stat()
        except OSError:
            return True
        return os.path.samestat(there, os.fstat(self._fd))

    def _was_truncated(self) -> bool:
        segment = self._state.segments[-1]
        if segment.base != self._base:
            return False
        if os.fstat(self._fd).st_size < self._byte or not begins_alike(self._fd, segment.identity):
            return True
        self.refresh()
        return False

    def _restart(self) -> None:
        """Go on at the start of a file that was cut and is written anew."""
        self.torn += len(self._carry)
        base = self._base + self._byte
        fd = os.dup(self._fd)
        self.close()
        self._enter(fd, base, base)
        self._remember()

    def _enter(self, fd: int, base: int, position: int) -> None:
        """Go on in an open file at an offset."""
        self._fd, self._base, self._byte, self._carry = fd, base, position - base, b""
        size = os.fstat(fd).st_size
        later = [segment.base for segment in self._state.segments if segment.base > base]
        self._renamed = bool(later) or not self._is_current()
        self._limit = later[0] - base if later else None if self._follow else size
        if self._byte > size:
            self.close()
            raise StreamError(
                f"{self._path} ends at offset {base + size}, before offset {position} where reading should go on: "
                f"it was cut or replaced; restore it, or begin anew without the old state"
            )
        if self._lines and self._byte and os.pread(fd, 1, self._byte - 1) != b"\n":
            self._check_glued(position)

    def _check_glued(self, position: int) -> None:
        """Accept an offset after an unfinished line only if the line is finished there."""
        if os.pread(self._fd, 1, self._byte) not in (b"", b"\n"):
            self.close()
            raise StreamError(
                f"{self._path}: offset {position} is inside a line, so the file is not the one read before"
            )

    def _remember(self) -> None:
        self._state.begin(Segment(self._base, identify(self._fd)))
        self._save()

    def _locate(self, segment: Segment) -> int:
        """Open the file that a segment speaks of, under whatever name rotation gave it."""
        siblings = [Path(e.path) for e in os.scandir(self._path.parent) if e.name.startswith(self._path.stem)]
        paths = sorted((path for path in siblings if path.is_file()), key=lambda path: (path != self._path, path))
        # A rename keeps the inode; a copy, or a file brought from another machine, keeps only what it begins with.
        for is_it in (same_inode, _has_head):
            for path in paths:
                fd = _open(path)
                if begins_alike(fd, segment.identity) and is_it(fd, segment.identity):
                    return fd
                os.close(fd)
        raise StreamError(
            f"{self._path}: the file that held offset {segment.base} and up is gone, or was replaced by another; "
            f"restore it, or begin anew without the old state"
        )


def _has_head(_fd: int, identity: Identity) -> bool:
    return identity.head > 0


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    except OSError as error:
        raise StreamError(f"cannot read {path}: {error.strerror}") from error
    raise StreamError(f"{path} is not an ordinary file")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
