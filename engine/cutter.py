"""Cutting streams into batches: by arrival, by event time, or as the journal says.

`ArrivalCutter` is for live streams: a batch is cut when it is full or its oldest record has waited long enough.
`TimeCutter` is for bounded streams: records of all partitions are merged by event time and batches are always full,
so that the same records give the same batches however fast they are read. Either first repeats what the journal
holds, batch for batch. The cutter is used by one task and reads no clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

from streams.base import Partition, Positions, Record, StreamError
from streams.codec import BadRecord, Event, Feedback
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


def split(items: Sequence[Item]) -> tuple[list[Event | Feedback], list[Bad]]:
    """The items that could be decoded and those that could not, each in order."""
    bad = [item for item in items if type(item) is Bad]
    if not bad:
        return cast("list[Event | Feedback]", list(items)), []
    return [item for item in items if not isinstance(item, Bad)], bad


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
        self.taken: dict[str, int] = dict.fromkeys(kinds, 0)
        """Records cut so far, by stream."""
        self.starved: frozenset[str] = frozenset()
        """Streams without more of which the journal cannot be repeated further, however much of others waits."""

    @property
    def replaying(self) -> int:
        """Journal entries still to repeat."""
        return len(self._replay)

    def awaited(self) -> set[Partition]:
        """Partitions that the journal entries still to repeat name."""
        return {(run.stream, run.partition) for entry in self._replay for run in entry.runs}

    def abandon(self) -> None:
        """Repeat no more of the journal; records that wait are cut as new ones are."""
        self._replay.clear()
        self.starved = frozenset()

    def assigned(self, partitions: Iterable[Partition]) -> None:
        """Expect records of these partitions."""
        for partition in partitions:
            self._queues.setdefault(partition, deque())
            self._ended.discard(partition)

    def revoked(self, partitions: Iterable[Partition]) -> None:
        """Drop what waits of these partitions: it was never journaled, so whoever reads them next will see it."""
        for partition in partitions:
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
        return self._cut(now)

    def deadline(self) -> float:
        """When `next` may give a cut without more records, in the seconds given to `feed`; infinite if never."""
        return math.inf

    def exhausted(self) -> bool:
        """Whether every partition has ended and everything has been cut."""
        raise NotImplementedError

    def _cut(self, now: float) -> Cut | None:
        raise NotImplementedError

    def _make(self, kind: Kind, items: Sequence[Item]) -> Cut:
        runs = runs_of([item.record for item in items])
        for run in runs:
            self.taken[run.stream] += run.count
        return Cut(kind, items, runs)

    def _repeat(self) -> Cut | None:
        entry = self._replay[0]
        self.starved = self._missing(entry)
        if self.starved:
            return None
        items: list[Item] = []
        for run in entry.runs:
            queue = self._queues[run.stream, run.partition]
            items += [queue.popleft() for _ in range(run.count)]
            self.taken[run.stream] += run.count
        self._replay.popleft()
        return Cut(Kind(entry.kind), items, entry.runs, replayed=True)

    def _missing(self, entry: Entry) -> frozenset[str]:
        """Streams of which an entry needs more records than wait; what waits is compared with it, nothing taken."""
        missing = set()
        needed: dict[Partition, int] = {}
        for run in entry.runs:
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
        self._lines: dict[Kind, deque[Item]] = {Kind.DATA: deque(), Kind.FEEDBACK: deque()}
        self._arrived: dict[Kind, deque[tuple[float, int]]] = {Kind.DATA: deque(), Kind.FEEDBACK: deque()}
        self._turn = Kind.DATA

    def feed(self, items: Sequence[Item], now: float) -> None:
        """Take in items; see `Cutter.feed`."""
        if self._replay:
            super().feed(items, now)
            return
        self._leave_replay(now)
        start = 0
        for index in range(1, len(items) + 1):  # one chunk mostly holds one stream
            stream = items[start].record.stream
            if index == len(items) or items[index].record.stream != stream:
                kind = self._kinds[stream]
                self._lines[kind].extend(items[start:index])
                self._arrived[kind].append((now, index - start))
                start = index

    def resize(self, max_size: int, max_delay: float) -> None:
        """See `Cutter.resize`."""
        super().resize(max_size, max_delay)
        self._max_delay = max_delay

    def revoked(self, partitions: Iterable[Partition]) -> None:
        """Drop what waits of these partitions; see `Cutter.revoked`."""
        gone = set(partitions)
        super().revoked(gone)
        for kind, line in self._lines.items():
            kept = deque(item for item in line if (item.record.stream, item.record.partition) not in gone)
            for item in line:
                if (item.record.stream, item.record.partition) in gone:
                    self.taken[item.record.stream] += 1
            when = self._arrived[kind][0][0] if kept else 0.0
            self._lines[kind] = kept
            self._arrived[kind] = deque([(when, len(kept))] if kept else ())

    def _cut(self, now: float) -> Cut | None:
        self._leave_replay(now)
        for kind in (self._turn, Kind.DATA, Kind.FEEDBACK):
            line = self._lines[kind]
            if line and (len(line) >= self._max_size or now >= self._due(kind) or self._over(kind)):
                self._turn = Kind.FEEDBACK if kind is Kind.DATA else Kind.DATA
                items = [line.popleft() for _ in range(min(self._max_size, len(line)))]
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
        empty = not any(self._lines.values()) and not any(self._queues.values())
        return empty and not self._replay and all(p in self._ended for p in self._queues)


class _Head(NamedTuple):
    """What orders the queues of a `TimeCutter`: the oldest first."""

    time: float
    kind: int
    stream: str
    partition: int


_LAST = _Head(math.inf, max(Kind) + 1, "", 0)


class TimeCutter(Cutter):
    """Merges bounded streams by event time. Before a full batch of data comes the feedback that is older."""

    def __init__(self, kinds: Mapping[str, Kind], max_size: int, replay: Iterable[Entry] = ()) -> None:
        super().__init__(kinds, max_size, replay)
        self._open: dict[Kind, list[Item]] = {Kind.DATA: [], Kind.FEEDBACK: []}
        self._ready: deque[Cut] = deque()

    def _cut(self, now: float) -> Cut | None:
        while not self._ready:
            heads = self._heads()
            if not heads:
                return None
            first = min(heads)
            self._take(first, min((head for head in heads if head is not first), default=_LAST))
        return self._ready.popleft()

    def _heads(self) -> list[_Head]:
        """The head of every queue; none at all while a partition that has not ended has no head."""
        heads = [_Head(q[0].time, int(self._kinds[p[0]]), *p) for p, q in self._queues.items() if q]
        self.starved = frozenset([p[0] for p, q in self._queues.items() if not q and p not in self._ended])
        return [] if self.starved else heads

    def _take(self, first: _Head, following: _Head) -> None:
        """Move what comes before the head of every other queue into the open batch, until that is full."""
        queue = self._queues[first.stream, first.partition]
        items = self._open[Kind(first.kind)]
        room = max(0, self._max_size - len(items))  # there may be more than a batch has had room for since `resize`
        limit, wins_ties = following.time, first[1:] < following[1:]
        while room and queue and ((time := queue[0].time) < limit or (wins_ties and time == limit)):
            items.append(queue.popleft())
            room -= 1
        if not room or (not queue and self._over()):
            self._close()

    def _close(self) -> None:
        """Cut what is open, feedback first."""
        for kind in (Kind.FEEDBACK, Kind.DATA):
            items = self._open[kind]
            if items and (kind is Kind.FEEDBACK or len(items) >= self._max_size or self._over()):
                self._ready.append(self._make(kind, items))
                self._open[kind] = []

    def _over(self) -> bool:
        return all(not queue and partition in self._ended for partition, queue in self._queues.items())

    def next(self, now: float) -> Cut | None:
        """See `Cutter.next`. The last batches are cut once every partition has ended."""
        cut = super().next(now)
        if cut is None and not self._replay and self._over() and any(self._open.values()):
            self._close()
            cut = self._ready.popleft()
        return cut

    def exhausted(self) -> bool:
        """See `Cutter.exhausted`."""
        return not self._replay and self._over() and not self._ready and not any(self._open.values())
