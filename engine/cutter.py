"""Cutting streams into batches: by arrival, by event time, or as the journal says.

`ArrivalCutter` is for live streams: a batch is cut when it is full or its oldest record has waited long enough.
`TimeCutter` is for bounded streams: records of all partitions are merged by event time and batches are always full,
so that the same records give the same batches however fast they are read. Either first repeats what the journal
holds, batch for batch. The cutter is used by one task and reads no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from typing import NamedTuple, cast

from engine.rebuild import Rebuild
from streams.base import Partition, Positions, Record, StreamError
from streams.codec import BadRecord, Event, Events, Feedback
from streams.journal import Entry, Kind, Run, runs_of


class Bad(NamedTuple):
    """A record that could not be decoded."""

    record: Record
    error: BadRecord

    @property
    def time(self) -> float:
        """Before everything else: it has no event time that could be trusted."""
        return -math.inf


class ReplayError(StreamError):
    """What the journal says was applied is not there."""


Item = Event | Feedback | Bad


class Cut(NamedTuple):
    """What one journal entry is about: a batch, or that the background job is taken in (no items)."""

    kind: Kind
    items: Sequence[Item]
    runs: tuple[Run, ...]
    replayed: bool = False

    def positions(self) -> Positions:
        """The next offset to read of every partition in the cut."""
        return {(run.stream, run.partition): run.end for run in self.runs}


def split(items: Sequence[Item]) -> tuple[Sequence[Event | Feedback], list[Bad]]:
    """The items that could be decoded and those that could not, each in order."""
    if isinstance(items, Events):
        return items, []
    bad = [item for item in items if type(item) is Bad]
    if not bad:
        return cast("list[Event | Feedback]", list(items)), []
    return [item for item in items if not isinstance(item, Bad)], bad


def times_of(items: Sequence[Item]) -> Sequence[float]:
    """The times of items, in seconds."""
    return items.times if isinstance(items, Events) else [item.time for item in items]


def _by_stream(items: Sequence[Item]) -> list[tuple[str, Sequence[Item]]]:
    """Items in runs of one stream each; columns are of one."""
    if isinstance(items, Events):
        return [(items.records.streams[0], items)]
    return [(stream, list(run)) for stream, run in groupby(items, lambda item: item.record.stream)]


class Line:
    """Items in the order in which they came, and in the parts in which they came."""

    def __init__(self) -> None:
        self._parts: deque[Sequence[Item]] = deque()
        self._at = self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        return islice(chain.from_iterable(self._parts), self._at, None)

    def extend(self, items: Sequence[Item]) -> None:
        """Append items."""
        if items:
            self._parts.append(items)
            self._count += len(items)

    def take(self, most: int) -> Sequence[Item]:
        """Remove up to ``most`` items and return them."""
        count = min(most, self._count)
        self._count -= count
        taken: list[Sequence[Item]] = []
        while count:
            part = self._parts[0]
            piece = part[self._at : self._at + count] if self._at or len(part) > count else part
            taken.append(piece)
            count -= len(piece)
            self._at += len(piece)
            if self._at == len(part):
                self._parts.popleft()
                self._at = 0
        if len(taken) == 1:
            return taken[0]
        columns = [piece for piece in taken if isinstance(piece, Events)]
        return Events.joined(columns) if len(columns) == len(taken) else list(chain.from_iterable(taken))


MOVES = (Kind.TAKEN, Kind.LEFT)
"""Entries that tell which partitions came and went, and that have no records."""

_SEEN = {Kind.DATA: Kind.SEEN_DATA, Kind.FEEDBACK: Kind.SEEN_FEEDBACK}


class Cutter:
    """What both cutters share: queues by partition, and the journal's entries to repeat first.

    Args:
        kinds: `Kind.DATA` or `Kind.FEEDBACK` of every stream.
        max_size: Rows of a full batch.
        replay: Journal entries to repeat before anything else.
    """

    def __init__(self, kinds: Mapping[str, Kind], max_size: int, replay: Iterable[Entry] = ()) -> None:
        self._kinds = kinds
        self._max_size = max_size
        self._replay = deque(replay)
        self._queues: dict[Partition, deque[Item]] = {}
        self._ended: set[Partition] = set()
        self._moves: deque[Cut] = deque()
        self.rebuild = Rebuild(kinds)
        self.taken: dict[str, int] = dict.fromkeys(kinds, 0)
        """Records cut so far, by stream."""
        self.starved: frozenset[str] = frozenset()
        """Streams without more of which the journal cannot be repeated further, however much of others waits."""

    @property
    def replaying(self) -> int:
        """Journal entries still to repeat."""
        return len(self._replay)

    @property
    def rebuilding(self) -> Positions:
        """Partitions whose waiting joins are being made anew, with the position up to which records do that."""
        return self.rebuild.until

    @property
    def moves(self) -> Sequence[Cut]:
        """What is to be cut of partitions that came or went."""
        return tuple(self._moves)

    def awaited(self) -> set[Partition]:
        """Partitions of which the journal entries still to repeat name records."""
        entries = [entry for entry in self._replay if entry.kind not in MOVES]
        return {(run.stream, run.partition) for entry in entries for run in entry.runs}

    def named(self) -> set[Partition]:
        """Partitions that anything names which is still to be repeated, or moved."""
        runs = [run for entry in self._replay for run in entry.runs] + [
            run for move in self._moves for run in move.runs
        ]
        return {(run.stream, run.partition) for run in runs}

    def abandon(self) -> None:
        """Repeat no more of the journal but what moved; records that wait are cut as new ones are."""
        left = [Cut(Kind(entry.kind), (), entry.runs) for entry in self._replay if entry.kind in MOVES]
        self._moves.extendleft(reversed(left))
        self._replay.clear()
        self.starved = frozenset()

    def assigned(self, partitions: Iterable[Partition], seen: Mapping[Partition, int] | None = None) -> None:
        """Expect records of these partitions; what lies before the positions in ``seen`` was seen before."""
        for partition in partitions:
            self._queues.setdefault(partition, deque())
            self._ended.discard(partition)

    def read(self, partitions: Iterable[Partition]) -> None:
        """Hear that everything seen before of these partitions has been fed."""

    def move(self, kind: Kind, runs: Iterable[Run]) -> None:
        """Cut, before all that is not journaled yet, that partitions came or went."""
        cut = Cut(kind, (), tuple(runs))
        if cut.runs:
            self._moves.append(cut)

    def take_moves(self) -> list[Cut]:
        """The moves that are to be applied now; none while the journal is repeated."""
        moves, self._moves = ([], self._moves) if self._replay else (list(self._moves), deque())
        return moves

    def revoked(self, partitions: Iterable[Partition]) -> None:
        """Drop what waits of these partitions: it was never journaled, so whoever reads them next will see it."""
        gone = set(partitions)
        moves, self._moves = self._moves, deque()
        for move in moves:
            self.move(move.kind, [run for run in move.runs if move.kind is Kind.LEFT or run[:2] not in gone])
        for partition in gone:
            for item in self._queues.pop(partition, ()):
                self.taken[item.record.stream] += 1

    def ended(self, partitions: Iterable[Partition]) -> None:
        """Expect no more records of these partitions."""
        self._ended.update(partitions)

    def feed(self, items: Sequence[Item], now: float) -> None:
        """Take in items, in order within each partition; ``now`` is when they arrived, in seconds."""
        for item in items:
            record = item.record
            self._queues[record.stream, record.partition].append(item)

    def resize(self, max_size: int, max_delay: float) -> None:
        """Cut by other limits from the next batch on; ``max_delay`` in seconds."""
        self._max_size = max_size

    def next(self, now: float) -> Cut | None:
        """The next cut, or None when more records or more time are needed."""
        if self._replay:
            return self._repeat()
        if self._moves:
            return self._moves.popleft()
        return self._cut(now)

    def deadline(self) -> float:
        """When `next` may give a cut without more records, in the time of `feed`: -inf if one is full, inf if never."""
        return math.inf

    def exhausted(self) -> bool:
        """Whether every partition has ended and everything has been cut."""
        raise NotImplementedError

    def _cut(self, now: float) -> Cut | None:
        raise NotImplementedError

    def _make(self, kind: Kind, items: Sequence[Item]) -> Cut:
        runs = runs_of(items.records if isinstance(items, Events) else [item.record for item in items])
        for run in runs:
            self.taken[run.stream] += run.count
        return Cut(kind, items, runs)

    def _repeat(self) -> Cut | None:
        entry = self._replay[0]
        self.starved = self._missing(entry)
        if self.starved:
            return None
        items: list[Item] = []
        for run in () if entry.kind in MOVES else entry.runs:
            queue = self._queues[run.stream, run.partition]
            items += [queue.popleft() for _ in range(run.count)]
            self.taken[run.stream] += run.count
        self._replay.popleft()
        return Cut(Kind(entry.kind), items, entry.runs, replayed=True)

    def _missing(self, entry: Entry) -> frozenset[str]:
        """Streams of which an entry needs more records than wait; what waits is compared with it, nothing taken."""
        missing = set()
        needed: dict[Partition, int] = {}
        for run in () if entry.kind in MOVES else entry.runs:
            partition = run.stream, run.partition
            needed[partition] = count = needed.get(partition, 0) + run.count
            queue = self._queues.get(partition, ())
            if len(queue) >= count:
                if queue[count - 1].record.end != run.end:
                    raise self._changed(partition)
            elif partition in self._ended or run.stream not in self._kinds:
                raise self._changed(partition)
            else:
                missing.add(run.stream)
        return frozenset(missing)

    def _changed(self, partition: Partition) -> ReplayError:
        return ReplayError(
            f"{partition[0]}-{partition[1]} does not hold the records that the journal says were applied; the stream"
            " has changed since. Restore it, or start anew with --fresh, which keeps what is there in a folder aside-N"
        )


class ArrivalCutter(Cutter):
    """Cuts by arrival: data and feedback in turn, each when full or when its oldest record has waited ``max_delay``."""

    def __init__(
        self, kinds: Mapping[str, Kind], max_size: int, replay: Iterable[Entry] = (), *, max_delay: float
    ) -> None:
        super().__init__(kinds, max_size, replay)
        self._max_delay = max_delay
        self._lines: dict[Kind, Line] = {Kind.DATA: Line(), Kind.FEEDBACK: Line()}
        self._arrived: dict[Kind, deque[tuple[float, int]]] = {Kind.DATA: deque(), Kind.FEEDBACK: deque()}
        self._turn = Kind.DATA
        self._seen_last = False

    def assigned(self, partitions: Iterable[Partition], seen: Mapping[Partition, int] | None = None) -> None:
        """See `Cutter.assigned`."""
        super().assigned(partitions)
        self.rebuild.begin(seen or {})

    def read(self, partitions: Iterable[Partition]) -> None:
        """See `Cutter.read`."""
        self.rebuild.read(partitions)

    def feed(self, items: Sequence[Item], now: float) -> None:
        """Take in items; see `Cutter.feed`."""
        if self._replay:
            super().feed(items, now)
            return
        self._leave_replay(now)
        if self.rebuild.until:
            items = self.rebuild.sort(items)
        for stream, part in _by_stream(items):
            kind = self._kinds[stream]
            self._lines[kind].extend(part)
            self._arrived[kind].append((now, len(part)))

    def resize(self, max_size: int, max_delay: float) -> None:
        """See `Cutter.resize`."""
        super().resize(max_size, max_delay)
        self._max_delay = max_delay

    def revoked(self, partitions: Iterable[Partition]) -> None:
        """Drop what waits of these partitions; see `Cutter.revoked`."""
        gone = set(partitions)
        super().revoked(gone)
        for item in self.rebuild.drop(gone):
            self.taken[item.record.stream] += 1
        for kind, line in self._lines.items():
            kept: list[Item] = []
            for item in line:
                if (item.record.stream, item.record.partition) in gone:
                    self.taken[item.record.stream] += 1
                else:
                    kept.append(item)
            when = self._arrived[kind][0][0] if kept else 0.0
            self._lines[kind] = Line()
            self._lines[kind].extend(kept)
            self._arrived[kind] = deque([(when, len(kept))] if kept else ())

    def _cut(self, now: float) -> Cut | None:
        self._leave_replay(now)
        self.feed(self.rebuild.finish() or (), now)
        turns = (self._cut_new, self._cut_seen) if self._seen_last else (self._cut_seen, self._cut_new)
        cut = turns[0](now) or turns[1](now)
        self._seen_last = cut is not None and cut.kind in _SEEN.values()
        self.starved = self.rebuild.starved()
        return cut

    def _cut_seen(self, now: float) -> Cut | None:
        taken = self.rebuild.take(self._max_size)
        return None if taken is None else self._make(_SEEN[taken[0]], taken[1])

    def _cut_new(self, now: float) -> Cut | None:
        for kind in (self._turn, Kind.DATA, Kind.FEEDBACK):
            line = self._lines[kind]
            if line and (now >= self._due(kind) or self._over(kind)):
                self._turn = Kind.FEEDBACK if kind is Kind.DATA else Kind.DATA
                items = line.take(self._max_size)
                self._forget(kind, len(items))
                return self._make(kind, items)
        return None

    def _leave_replay(self, now: float) -> None:
        """Line up what the replay left over."""
        left = [item for queue in self._queues.values() for item in queue]
        if left:
            for queue in self._queues.values():
                queue.clear()
            left.sort(key=lambda item: item.record.stream)
            self.feed(left, now)

    def _due(self, kind: Kind) -> float:
        if len(self._lines[kind]) >= self._max_size:
            return -math.inf
        return self._arrived[kind][0][0] + self._max_delay if self._arrived[kind] else math.inf

    def _over(self, kind: Kind) -> bool:
        return all(p in self._ended for p in self._queues if self._kinds[p[0]] is kind)

    def _forget(self, kind: Kind, count: int) -> None:
        arrived = self._arrived[kind]
        while count:
            when, size = arrived.popleft()
            if size > count:
                arrived.appendleft((when, size - count))
                return
            count -= size

    def deadline(self) -> float:
        """See `Cutter.deadline`."""
        return min(self._due(Kind.DATA), self._due(Kind.FEEDBACK))

    def exhausted(self) -> bool:
        """See `Cutter.exhausted`."""
        empty = self.rebuild.empty and not any(self._lines.values()) and not any(self._queues.values())
        return empty and not self._replay and all(p in self._ended for p in self._queues)
