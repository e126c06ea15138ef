"""Records of partitions that came from another process: which of them it had applied before, and in what order.

The former owner had applied everything before a certain position. Its data comes first, then its feedback, then what
is new of these partitions; other partitions go on meanwhile. So a label meets its event as it did there, and where
work on a partition stops half-way, whoever takes it over begins as if nothing had been done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from streams.base import Partition, Positions
from streams.journal import Kind

if TYPE_CHECKING:
    from engine.cutter import Item


class Rebuild:
    """Lines of records that were seen before, and of those that must wait behind them.

    Args:
        kinds: What each stream carries.

    Attributes:
        until: Of each partition that is rebuilt, the position before which everything was seen before.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self.until: Positions = {}
        self._seen: dict[Kind, deque[Item]] = {Kind.DATA: deque(), Kind.FEEDBACK: deque()}
        self._held: deque[Item] = deque()
        self._read: set[Partition] = set()

    def begin(self, until: Mapping[Partition, int]) -> None:
        """Expect records before these positions that were seen before."""
        self.until.update(until)
        self._read.difference_update(until)

    def read(self, partitions: Iterable[Partition]) -> None:
        """Hear that every record before the position of these partitions has been fed."""
        self._read.update(self.until.keys() & set(partitions))

    def sort(self, items: Sequence[Item]) -> Sequence[Item]:
        """Line up items of partitions that are rebuilt; return the others."""
        others: list[Item] = []
        for item in items:
            record = item.record
            until = self.until.get((record.stream, record.partition))
            if until is None:
                others.append(item)
            elif record.offset < until:
                self._seen[self._kinds[record.stream]].append(item)
            else:
                self._held.append(item)
                self._read.add((record.stream, record.partition))
        return others

    def take(self, size: int) -> tuple[Kind, list[Item]] | None:
        """Take up to ``size`` items that are due, data before feedback; None where more must be fed first."""
        for kind in (Kind.DATA, Kind.FEEDBACK):
            line = self._seen[kind]
            if line:
                return kind, [line.popleft() for _ in range(min(size, len(line)))]
            if self._unread(kind):
                return None
        return None

    def starved(self) -> frozenset[str]:
        """Streams without more of which nothing seen before can be taken, however much waits behind it."""
        for kind in (Kind.DATA, Kind.FEEDBACK):
            if self._seen[kind]:
                break
            if unread := self._unread(kind):
                return unread
        return frozenset()

    def _unread(self, kind: Kind) -> frozenset[str]:
        return frozenset([p[0] for p in self.until if self._kinds[p[0]] is kind and p not in self._read])

    def finish(self) -> list[Item] | None:
        """End where everything seen before has been taken; return what waited behind it, else None."""
        if not self.until or any(self._seen.values()) or len(self._read) < len(self.until):
            return None
        held = list(self._held)
        self.until.clear()
        self._read.clear()
        self._held.clear()
        return held

    def drop(self, partitions: Iterable[Partition]) -> list[Item]:
        """Expect nothing more of these partitions, and return what waited of them."""
        gone = set(partitions)
        dropped: list[Item] = []
        for line in (*self._seen.values(), self._held):
            for _ in range(len(line)):
                item = line.popleft()
                (dropped if (item.record.stream, item.record.partition) in gone else line).append(item)
        for partition in gone:
            self.until.pop(partition, None)
            self._read.discard(partition)
        return dropped

    @property
    def empty(self) -> bool:
        """Whether nothing is lined up."""
        return not self._held and not any(self._seen.values())
