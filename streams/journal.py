"""The journal: in which order records became batches, written down before each batch is applied.

A segment ``journal-<step>.log`` begins at the instant of the checkpoint of that step and holds what came after it,
until the next segment begins. Sequence numbers run on from segment to segment. So from any checkpoint (the newest, an
older one, or one whose successor began a segment but was never published) what to replay is the segments from its own
step on.

A killed process can tear only the end of the last segment; power loss as well, because a segment is synced before the
next one is begun. The torn end is cut off and counted. Damage anywhere else stops the reader.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from streams.journal_format import (
    HEADER_BYTES,
    Entry,
    JournalError,
    JournalUnavailableError,
    Kind,
    Run,
    frame_at,
    frame_bytes,
    is_sound_after,
    pack_entry,
    pack_header,
    runs_of,
    unpack_entry,
)
from streams.journal_sync import SyncAhead
from streams.seams import failpoint

__all__ = ["Entry", "Journal", "JournalError", "JournalUnavailableError", "Kind", "Run", "runs_of"]

_NAME = re.compile(r"journal-(\d{12,})\.log")
_ADVICE = "bring the file back, or start anew with --fresh, which sets aside what is there"
_BROKEN = "broken"
_KEEP_BROKEN = 2
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class _Placed(NamedTuple):
    """An entry and the byte behind it."""

    entry: Entry
    end: int


class Journal:
    """The journal of one state directory. Used by one thread, while the directory is locked.

    A new life of the process calls `read` (replaying what it gives), then `reopen`, then `append`; the very first one
    calls `start` instead. `start` and `reopen` may both be called: `start` reopens by itself what lies there.

    Args:
        directory: Where the segments lie.
        sync_each: Whether an entry must be on the disk itself before `append` returns.
    """

    def __init__(self, directory: Path, *, sync_each: bool = False) -> None:
        self.torn_bytes = 0
        """Bytes cut off because a write had not been finished."""
        self._directory = directory
        self._sync_each = sync_each
        self._descriptor: int | None = None
        self._step = -1
        self._size = 0
        self._next: int | None = None
        self._is_new = False
        self._ahead = SyncAhead()

    @property
    def next_sequence(self) -> int | None:
        """The sequence number that the next entry must have; None while the journal has never had one."""
        return self._next

    def start(self, step: int) -> None:
        """Begin the segment of a step, at the instant of its checkpoint's snapshot; syncs what came before.

        Where the last segment is that of this step already (a checkpoint that was begun here before and never
        published, or another one at the same step), entries go on being appended to it: what it holds stays, and the
        sequence number in the checkpoint tells `read` which of its entries the checkpoint covers.

        Raises:
            JournalUnavailableError: The segment cannot be made; entries go on being appended to the one before.
            JournalError: A later segment exists, or what came before cannot be synced.
        """
        if self._descriptor is None and self._steps():
            self.reopen()
        if self._descriptor is not None:
            self.sync()
            if step == self._step:
                return
            if step < self._step:
                raise JournalError(f"{self._path(step)} cannot begin after that of step {self._step}; steps only grow")
        descriptor = self._make(step)
        failpoint("journal.begun")
        self.close()
        self._descriptor, self._step, self._size, self._is_new = descriptor, step, HEADER_BYTES, True

    def _make(self, step: int) -> int:
        path = self._path(step)
        try:
            descriptor = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise JournalUnavailableError(f"{path} cannot be made: {error}; check the state directory") from error
        try:
            if os.write(descriptor, pack_header(step)) < HEADER_BYTES:
                raise OSError("only a part was written")
        except OSError as error:
            os.close(descriptor)
            self._remove(step)
            raise JournalUnavailableError(f"{path} cannot be written: {error}; check its disk") from error
        return descriptor

    def append(self, entry: Entry) -> None:
        """Write one entry, in one system call. It survives the process at once, a power loss only after `sync`.

        Raises:
            JournalUnavailableError: The disk does not take it; nothing of it is kept, and it may be tried again.
            JournalError: It does not belong here, or the journal is closed.
        """
        if self._descriptor is None:
            raise JournalError(f"the journal in {self._directory} is closed; restart from the last checkpoint")
        if self._next is not None and entry.sequence != self._next:
            raise JournalError(f"entry {entry.sequence} cannot follow {self._next - 1} in {self._path(self._step)}")
        failpoint("journal.append")
        self._write(pack_entry(entry))
        failpoint("journal.appended")
        self._next = entry.sequence + 1
        if self._sync_each:
            self.sync()

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        reason: object = "only a part was written"
        try:
            if os.write(self._descriptor, data) == len(data):
                self._size += len(data)
                return
        except OSError as error:
            reason = error
        path = self._path(self._step)
        try:
            # Half an entry in front of whole ones would be taken for damage.
            os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            self.close()
            raise JournalError(f"{path} cannot be written: {reason}; the journal is closed") from error
        raise JournalUnavailableError(f"{path} cannot be written at byte {self._size}: {reason}; check its disk")

    def sync(self) -> None:
        """Return once everything appended survives a power loss.

        Raises:
            JournalError: The disk reports an error. The journal is closed then: the kernel may have dropped what it
                could not write, and would report success if asked again.
        """
        if self._descriptor is None:
            return
        try:
            os.fdatasync(self._descriptor)
            self._ahead.check()
            if self._is_new:
                _sync_directory(self._directory)
        except OSError as error:
            self.close()
            path = self._path(self._step)
            raise JournalError(f"{path} cannot be synced: {error}; the journal is closed") from error
        self._is_new = False

    def ahead(self) -> Callable[[], None]:
        """Return what another thread may call to sync the entries so far, so that `start` has little to wait for."""
        return (lambda: None) if self._descriptor is None else self._ahead.of(self._path(self._step))

    def read(self, step: int, *, after: int | None = None) -> Iterator[Entry]:
        """Yield the entries of the segments from a step on, in order; the torn end of the last one is cut off.

        Args:
            step: Step of the checkpoint that was loaded.
            after: The last sequence number that this checkpoint covers; entries up to it are left out.

        Raises:
            JournalError: A segment or an entry is missing or damaged.
        """
        steps = self._steps()
        wanted = [other for other in steps if other >= step]
        if wanted and wanted[0] != step:
            raise JournalError(f"{self._path(step)} is missing although later segments exist; {_ADVICE}")
        last: int | None = None
        for other in wanted:
            for entry, _ in self._scan(other, is_last=other == steps[-1]):
                self._check_order(other, entry, after if last is None else last, first=last is None)
                last = entry.sequence
                if after is None or last > after:
                    yield entry

    def _check_order(self, step: int, entry: Entry, last: int | None, *, first: bool) -> None:
        if last is None or entry.sequence == last + 1 or (first and entry.sequence <= last):
            return
        raise JournalError(f"{self._path(step)} has entry {entry.sequence} where {last + 1} belongs; {_ADVICE}")

    def reopen(self, *, after: int | None = None) -> None:
        """Go on behind the last entry; its torn end is cut off. Does nothing where there is no segment.

        Args:
            after: The last sequence number that the loaded checkpoint covers, which is also its step: older segments
                are not looked at.

        Raises:
            JournalError: The last segment is damaged or cannot be opened.
        """
        self.close()
        steps = self._steps()
        for step in reversed(steps):
            if after is not None and step < after:
                self._next = after + 1
                break
            placed = self._scan(step, is_last=step == steps[-1])
            if placed:
                self._next = placed[-1].entry.sequence + 1
                break
        if steps:
            self._open(steps[-1])

    def _open(self, step: int) -> None:
        path = self._path(step)
        try:
            self._descriptor = os.open(path, _FLAGS)
            self._size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise JournalError(f"{path} cannot be opened: {error}; check the state directory") from error
        self._step, self._is_new = step, True
        if not self._size:
            self._write(pack_header(step))

    def discard_after(self, sequence: int) -> None:
        """Remove every entry with a higher number, where replay cannot or shall not go on; then go on from there.

        Raises:
            JournalError: A segment is damaged or cannot be changed.
        """
        self.close()
        steps = self._steps()
        base = 0
        keep, size = -1, 0
        for step in steps[max(bisect_right(steps, sequence) - 1, 0) :]:  # older ones hold nothing with a higher number
            placed = self._scan(step, is_last=step == steps[-1])
            base = placed[0].entry.sequence if placed else base
            if base <= sequence + 1 or keep < 0:
                keep, size = step, max([HEADER_BYTES, *(end for entry, end in placed if entry.sequence <= sequence)])
            base = placed[-1].entry.sequence + 1 if placed else base
        # Newest first, so that a crash in between leaves no hole.
        for step in reversed(steps):
            if step > keep:
                self._remove(step)
            elif step == keep:
                self._cut(step, size)
        self._next = None
        self.reopen()

    def drop_before(self, step: int) -> int:
        """Delete the segments older than that of a step (the oldest kept checkpoint's), and say how many.

        Raises:
            JournalError: A segment cannot be deleted.
        """
        old = [other for other in self._steps() if other < step and other != self._step]
        for other in old:
            failpoint("journal.drop")
            self._remove(other)
        return len(old)

    def set_aside(self, before: int) -> list[Path]:
        """Move damaged segments older than that of a step into ``broken/``, and say where they are.

        They are needed by older checkpoints alone: a start from the checkpoint of the step goes on without them. The
        newest two are kept.

        Raises:
            JournalError: A segment cannot be read or moved.
        """
        moved = [self._set_aside(step) for step in self._steps() if step < before and self._damage(step)]
        if moved:
            broken = self._directory / _BROKEN
            for old in sorted(broken.glob("journal-*.log"))[:-_KEEP_BROKEN]:
                old.unlink()
        return moved

    def _set_aside(self, step: int) -> Path:
        place = self._directory / _BROKEN / self._path(step).name
        try:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            self._path(step).rename(place)
        except OSError as error:
            raise JournalError(f"{self._path(step)} cannot be set aside: {error}; check the state directory") from error
        return place

    def verify(self) -> Iterator[tuple[Path, str]]:
        """Read every segment and change nothing; yield its path and what is wrong with it, empty where nothing is.

        A torn end of the last one is nothing wrong: the next start cuts it off, or it is being written just now.

        Raises:
            JournalError: A segment cannot be read.
        """
        steps = self._steps()
        for step in steps:
            yield self._path(step), self._damage(step, is_last=step == steps[-1])

    def _damage(self, step: int, *, is_last: bool = False) -> str:
        """What is wrong with a segment; its entries are proven whole and not unpacked."""
        data = self._read(step)
        at = HEADER_BYTES if data[:HEADER_BYTES] == pack_header(step) else 0
        while at and at < len(data) and (payload := frame_at(data, at)) is not None:
            at += frame_bytes(payload)
        if (at and at == len(data)) or (is_last and not is_sound_after(data, at)):
            return ""
        return f"damaged at byte {at}"

    def close(self) -> None:
        """Let go of the file; nothing is synced. Safe to call twice."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _steps(self) -> list[int]:
        try:
            names = os.listdir(self._directory)
        except OSError as error:
            raise JournalError(f"{self._directory} cannot be listed: {error}; check the state directory") from error
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def _path(self, step: int) -> Path:
        return self._directory / f"journal-{step:012d}.log"

    def _scan(self, step: int, *, is_last: bool) -> list[_Placed]:
        """Return the entries of one segment; of the last one, cut off a torn end."""
        data = self._read(step)
        if data[:HEADER_BYTES] != pack_header(step):
            self._cut_torn(step, data, 0, is_last=is_last)
            return []
        placed, at = [], HEADER_BYTES
        while at < len(data):
            payload = frame_at(data, at)
            if payload is None:
                self._cut_torn(step, data, at, is_last=is_last)
                break
            placed.append(_Placed(self._entry(step, at, payload), at := at + frame_bytes(payload)))
        for (before, _), (entry, _) in pairwise(placed):
            self._check_order(step, entry, before.sequence, first=False)
        return placed

    def _read(self, step: int) -> bytes:
        try:
            return self._path(step).read_bytes()
        except OSError as error:
            raise JournalError(f"{self._path(step)} cannot be read: {error}; check the state directory") from error

    def _entry(self, step: int, at: int, payload: bytes) -> Entry:
        try:
            return unpack_entry(payload)
        except JournalError as error:
            raise JournalError(f"{self._path(step)}, entry at byte {at}: {error}") from error

    def _cut_torn(self, step: int, data: bytes, at: int, *, is_last: bool) -> None:
        if not is_last or is_sound_after(data, at):
            raise JournalError(f"{self._path(step)} is damaged at byte {at}; {_ADVICE}")
        self._cut(step, at)
        self.torn_bytes += len(data) - at

    def _cut(self, step: int, size: int) -> None:
        try:
            os.truncate(self._path(step), size)
        except OSError as error:
            raise JournalError(f"{self._path(step)} cannot be cut: {error}; check the state directory") from error

    def _remove(self, step: int) -> None:
        try:
            self._path(step).unlink()
        except OSError as error:
            raise JournalError(f"{self._path(step)} cannot be deleted: {error}; check the state directory") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
