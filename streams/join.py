"""The join store: inputs of answered events wait by event id until their feedback arrives.

Time here is event time: the caller says how far the streams have come (the watermark), no clock is read, and the same
calls give the same results in the same order, always, also after the state was written down and restored in between.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from streams.join_format import (
    Early,
    FeedbackLike,
    Fields,
    Joined,
    JoinError,
    Waiting,
    read_frames,
    unpack_early,
    unpack_entries,
    unpack_settled,
)
from streams.join_moves import Moves
from streams.join_pack import Packed, WaitingRows
from streams.join_rows import Rows
from streams.join_scalars import Scalars, read_scalars
from streams.join_settled import How, Settled
from streams.join_size import text_bytes
from streams.join_snapshot import JoinSnapshot
from streams.join_spill import Row, Spill

__all__ = ["FeedbackLike", "JoinError", "JoinSnapshot", "JoinStore", "Joined", "Waiting", "WaitingRows"]

KINDS = (
    "joined",
    "early",
    "duplicate",
    "late",
    "orphan",
    "overflow",
    "expired",
    "evicted",
    "redelivered",
    "spill_failed",
    "moved",
)
_EARLY_BYTES = 320
_SHARE = 8  # early feedback and settled ids may take an eighth of the memory each
_SWEEPS = 16  # sweeps a window: expiry is exact all the same, since each access looks at the time
_CHUNK_BYTES = 1 << 20  # what one move to disk takes: some milliseconds

_Bytes = bytes  # the store has a property of that name


class JoinStore(Moves):
    """Waiting events and early feedback, bounded in event time and bytes. Used by one thread.

    An event waits until the watermark has passed its time by more than ``window``. Every feedback ends as exactly one
    of: ``joined``; ``duplicate`` (the id is joined already, or other feedback waits for it); ``late`` (more than
    ``window`` after its event, or its event expired or was evicted); ``orphan`` (its event had not come when the
    watermark had passed the feedback by more than ``window``); ``overflow`` (it came before its event and too much
    such feedback waited). ``early`` counts feedback that came before its event, however it ends, and ``moved`` what
    waited of a partition that went to another process.

    Memory holds the events that came last; older ones lie in a SQLite file, and what exceeds that is evicted, oldest
    first. Early feedback and the ids remembered to tell duplicates and late feedback take an eighth of the memory
    each at most. Remembered ids are forgotten one window (of watermark) after they were settled, or oldest first.

    Args:
        window: How long an event waits for its feedback, seconds of event time.
        max_bytes: What everything in memory may take.
        max_disk_bytes: What waiting events on disk may take.
        directory: Where to put the file; None keeps everything in memory.

    Raises:
        ValueError: A limit makes no sense.
        JoinError: The file cannot be made.
    """

    def __init__(
        self, *, window: float, max_bytes: int, max_disk_bytes: int = 0, directory: Path | None = None
    ) -> None:
        if not 0 < window < float("inf"):
            raise ValueError(f"window of the join store is {window} s; give a positive, finite number of seconds")
        if max_bytes <= 0 or max_disk_bytes < 0:
            raise ValueError(f"the join store cannot keep to {max_bytes} bytes and {max_disk_bytes} on disk")
        self._window = window
        self._max_bytes = max_bytes
        self._max_disk_bytes = max_disk_bytes
        self._spill = Spill(directory) if directory is not None and max_disk_bytes else None
        self._reset()

    def _reset(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._watermark = self._swept = float("-inf")
        self._limit = float("-inf")  # events older than this have expired
        self._waiting = Rows()
        self._early: dict[str, Early] = {}
        self._early_bytes = 0
        self._settled = Settled()
        if self._spill is not None:
            self._spill.clear()

    @property
    def pending(self) -> int:
        """Events that wait for feedback, in memory and on disk."""
        return len(self._waiting) + (self._spill.count if self._spill is not None else 0)

    @property
    def early(self) -> int:
        """Feedback that waits for its event."""
        return len(self._early)

    @property
    def bytes(self) -> int:
        """What events, early feedback and remembered ids take in memory."""
        return self._waiting.bytes + self._early_bytes + self._settled.bytes

    @property
    def disk_bytes(self) -> int:
        """What events take on disk."""
        return self._spill.bytes if self._spill is not None else 0

    def answered(self, items: Sequence[Waiting], watermark: float) -> list[Joined]:
        """Keep answered events.

        Args:
            items: The events, in order. An id that was seen before is counted ``redelivered`` and left out.
            watermark: How far event time has come, seconds; a smaller one than before changes nothing.

        Returns:
            The events whose feedback had come before them, in order.
        """
        self._advance(watermark)
        joined: list[Joined] = []
        events = WaitingRows.of(items)
        gone = self._sort(events, joined)
        self.counts["redelivered"] += self._waiting.extend(events.without(gone) if gone else events)
        self._keep_bounds()
        return joined

    def _sort(self, events: WaitingRows, joined: list[Joined]) -> list[int]:
        """Settle events that are known but do not wait in memory, or are too old; return the rows that do not wait."""
        ids, on_disk, kept = events.ids, self._on_disk(events.ids), set[str]()
        how, early = self._settled.how, self._early
        rows: Sequence[int] = range(len(ids))
        if min(events.times, default=self._limit) >= self._limit:
            if not on_disk and how.keys().isdisjoint(ids) and early.keys().isdisjoint(ids):
                return []
            rows = [at for at, name in enumerate(ids) if name in how or name in early or name in on_disk]
        return [at for at in rows if not self._waits(events[at], on_disk, kept, joined)]

    def _waits(self, item: Waiting, on_disk: set[str], kept: set[str], joined: list[Joined]) -> bool:
        """Whether an event waits from now on; it is settled if not. ``kept`` are those of its batch that do."""
        name = item.id
        if name in kept or name in self._waiting or name in self._settled.how or name in on_disk:
            self._seen_before(name)
        elif name in self._early and self._meet(item, joined):
            pass
        elif item.time < self._limit:
            self._expire(name)
        else:
            kept.add(name)
            return True
        return False

    def _seen_before(self, name: str) -> None:
        if self._settled.how.get(name) is How.INLINE:
            self._settled.how[name] = How.JOINED
        else:
            self.counts["redelivered"] += 1

    def _meet(self, item: Waiting, joined: list[Joined]) -> bool:
        """Join an event with the feedback that came before it; say whether that is the end of it."""
        label, reward, time, _, seen = self._pop_early(item.id)
        if time < self._limit:
            self.counts["orphan"] += not seen
            return False
        if time - item.time > self._window:
            self.counts["late"] += 1
            return False
        self.counts["joined"] += 1
        self._settled.add(item.id, How.JOINED)
        joined.append(Joined(*item[:6], label, reward, time))
        return True

    def _pop_early(self, name: str) -> Early:
        self._early_bytes -= _EARLY_BYTES + text_bytes(name)
        return self._early.pop(name)

    def _expire(self, name: str, kind: str = "expired") -> None:
        self.counts[kind] += 1
        self._settled.add(name, How.GONE)

    def feedback(self, items: Sequence[FeedbackLike], watermark: float) -> list[Joined]:
        """Take in feedback.

        Args:
            items: The feedback, in order. One with ``inputs`` joins at once, with ``predicted`` -1 and its own time
                where its event does not wait.
            watermark: How far event time has come, seconds; a smaller one than before changes nothing.

        Returns:
            The joined events, in order.
        """
        self._advance(watermark)
        joined: list[Joined] = []
        rows: dict[str, Row] = {}
        if self._spill is not None and self._spill.count:
            rows = self._spill.find([item.id for item in items if item.id not in self._waiting])
        removed: list[tuple[int, int]] = []
        for item in items:
            name = item.id
            fields = self._waiting.get(name)
            if fields is None and name in rows:
                fields = rows[name].fields
            if fields is None:
                self._unmatched(item, joined)
            elif self._is_late(item, fields):
                self.counts["late"] += 1
            else:
                if name in rows:
                    row = rows.pop(name)
                    removed.append((row.seq, row.cost))
                else:
                    self._waiting.remove(name, fields)
                self._settled.add(name, How.JOINED)
                inputs = fields[0] if item.inputs is None else item.inputs
                joined.append(Joined(name, inputs, *fields[1:5], item.label, item.reward, item.time))
        if removed and self._spill is not None:
            self._spill.remove(removed)
        self.counts["joined"] += len(joined)
        self._keep_bounds()
        return joined

    def _is_late(self, item: FeedbackLike, fields: Fields) -> bool:
        # An expired event is still there until the next sweep.
        return fields[1] < self._limit or item.time - fields[1] > self._window

    def _unmatched(self, item: FeedbackLike, joined: list[Joined]) -> None:
        """Settle, or keep, feedback whose event does not wait."""
        name = item.id
        if name in self._early and self._early[name][2] < self._limit:
            self._lose_early(name, "orphan")
        how = self._settled.how.get(name)
        if how is not None:
            self.counts["late" if how is How.GONE else "duplicate"] += 1
        elif name in self._early:
            self.counts["duplicate"] += 1
        elif item.inputs is not None:
            self._settled.add(name, How.INLINE)
            joined.append(Joined(name, item.inputs, item.time, None, -1, -1, item.label, item.reward, item.time))
        elif item.time < self._limit:
            self.counts["orphan"] += 1
        else:
            self.counts["early"] += 1
            self._keep_early(item, seen=False)

    def _keep_early(self, item: FeedbackLike, *, seen: bool) -> None:
        self._early[item.id] = (item.label, item.reward, item.time, item.record.partition, seen)
        self._early_bytes += _EARLY_BYTES + text_bytes(item.id)

    def _lose_early(self, name: str, kind: str) -> None:
        """Let go of early feedback; what somebody else had before has been counted there."""
        self.counts[kind] += not self._pop_early(name)[4]

    def _advance(self, watermark: float) -> None:
        if not watermark > self._watermark:
            return
        self._watermark = watermark
        self._limit = watermark - self._window
        if watermark < self._swept + self._window / _SWEEPS:
            return
        self._swept = watermark
        if self._spill is not None and self._spill.count:
            for name in self._spill.take_before(self._limit):
                self._expire(name)
        limit = self._limit
        for name in self._waiting.take_before(limit):
            self._expire(name)
        for name in [name for name, early in self._early.items() if early[2] < limit]:
            self._lose_early(name, "orphan")
        self._settled.sweep(watermark, self._window)

    def _keep_bounds(self) -> None:
        """Move or evict what is oldest until every part keeps to its bound."""
        share = self._max_bytes // _SHARE
        while self._early_bytes > share:
            for name in list(islice(self._early, 1 + len(self._early) // 16)):
                self._lose_early(name, "overflow")
        self._settled.shrink(share)
        while self._waiting and self.bytes > self._max_bytes:
            self._make_room(self.bytes - self._max_bytes + min(_CHUNK_BYTES, self._max_bytes // 16))
            self._settled.shrink(share)
        if self._spill is not None and self._spill.bytes > self._max_disk_bytes:
            excess = self._spill.bytes - self._max_disk_bytes + min(_CHUNK_BYTES, self._max_disk_bytes // 16)
            for name in self._spill.take_oldest(excess):
                self._expire(name, "evicted")
            self._settled.shrink(share)

    def _make_room(self, size: int) -> None:
        """Move the oldest events of at least ``size`` bytes to disk; evict them if that cannot be."""
        oldest = self._waiting.take_oldest(size)
        if self._spill is not None:
            try:
                self._spill.put(oldest)
            except JoinError:
                self.counts["spill_failed"] += 1
            else:
                return
        for name in oldest.ids:
            self._expire(name, "evicted")

    def snapshot(self) -> JoinSnapshot:
        """Return the state as it is now; the store may go on at once. The snapshot must be written or closed."""
        scalars = {
            "watermark": self._watermark.hex(),
            "swept": self._swept.hex(),
            "counts": dict(self.counts),
            "marks": [[watermark.hex(), count] for watermark, count in self._settled.marks()],
        }
        reader = self._spill.reader() if self._spill is not None and self._spill.count else None
        return JoinSnapshot(scalars, reader, self._waiting.share(), self._early.copy(), self._settled.how.copy())

    def restore(self, file: BinaryIO) -> None:
        """Replace the state by what `JoinSnapshot.write` wrote.

        With the same limits every later call gives what it would have given there. Smaller limits evict at once what
        exceeds them.

        Raises:
            JoinError: The file is cut short or damaged; the store is empty then.
        """
        self._reset()
        try:
            for kind, payload in read_frames(file):
                self._load(kind, payload)
        except (ValueError, KeyError, TypeError, struct.error) as error:
            self._reset()
            raise JoinError(f"the saved joins cannot be read: {error}; load an older checkpoint") from error
        except JoinError:
            self._reset()
            raise
        self._keep_bounds()

    def _load(self, kind: _Bytes, payload: _Bytes) -> None:
        if kind in (b"D", b"W"):
            self._load_waiting(_waiting(payload), on_disk=kind == b"D")
        elif kind == b"B":
            self._load_waiting(Packed.read(payload).rows, on_disk=False)
        elif kind == b"F":
            self._load_early(payload)
        elif kind == b"R":
            for name, how in unpack_settled(payload):
                if name in self._settled.how:
                    raise JoinError("the saved joins are damaged: an id is settled twice")
                self._settled.add(name, How(how))
        elif kind == b"S":
            self._load_scalars(read_scalars(payload, KINDS))
        else:
            raise JoinError(f"the saved joins have a part {kind!r} that this version does not know")

    def _load_waiting(self, events: WaitingRows, *, on_disk: bool) -> None:
        if on_disk and self._spill is not None:
            twice = bool(self._waiting) and any(name in self._waiting for name in events.ids)
            self._spill.put(events)  # refuses an id that it has
        else:
            twice = bool(self._on_disk(events.ids) or self._waiting.extend(events))
            self._keep_bounds()
        if twice:
            raise JoinError("the saved joins are damaged: an event waits twice")

    def _load_early(self, payload: _Bytes) -> None:
        for name, feedback in unpack_early(payload):
            if name in self._early:
                raise JoinError("the saved joins are damaged: feedback waits twice")
            self._early[name] = feedback
            self._early_bytes += _EARLY_BYTES + text_bytes(name)

    def _load_scalars(self, scalars: Scalars) -> None:
        self.counts, self._watermark, self._swept, marks = scalars
        self._limit = self._watermark - self._window
        self._settled.set_marks(marks)

    def close(self) -> None:
        """Let go of the file on disk. Safe to call twice."""
        if self._spill is not None:
            self._spill.close()
            self._spill = None


def _waiting(entries: bytes) -> WaitingRows:
    return WaitingRows.of([Waiting(name, *fields) for name, fields in unpack_entries(entries)])
