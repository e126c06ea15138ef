"""Cutting bounded streams into batches by event time: the same records always give the same batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from engine.cutter import Cut, Cutter, Item
from streams.journal import Entry, Kind


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
