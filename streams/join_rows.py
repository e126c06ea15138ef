"""Waiting events in memory: which id lies where, and what belongs to it, in blocks of columns.

Events come in bulk, and most go unasked for, so that is done in C: an id costs an entry of a dictionary, and what
belongs to it an element of each column. A block without events is let go of; one of which half has gone is packed; and
where blocks have few events left each, all are put together anew. What waits at one instant is given away as the blocks
themselves: whoever changes one that was given away copies it before.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate, compress, islice
from typing import Any

from streams.columns import Column, Columns
from streams.join_format import Fields, Waiting
from streams.join_size import event_bytes, events_bytes, sizes_of

__all__ = ["Rows", "SharedRows", "WaitingRows"]

_BITS = 8
_ROWS = 1 << _BITS  # of a block: small, so that a full one is packed at once without being noticed
_LAST = _ROWS - 1
_FEW = _ROWS // 4
_MANY = 16
"""More blocks than these, with fewer events each on average, are put together anew: a block itself takes memory."""


class WaitingRows(Columns[Waiting]):
    """Waiting events as columns."""

    __slots__ = ()
    kind = Waiting
    ids = Column[str](0)
    inputs = Column[bytes](1)
    times = Column[float](2)
    groups = Column[str | None](3)
    partitions = Column[int](6)

    def without(self, rows: Sequence[int]) -> WaitingRows:
        """Return all but some rows, which go up."""
        columns = list(map(list, self.columns))
        for at in reversed(rows):
            for column in columns:
                del column[at]
        return WaitingRows(*columns)


class _Block:
    """Up to `_ROWS` events in the order in which they came, with those that have gone since among them.

    Args:
        shares: How often `Rows` had given its blocks away before this one was made.
    """

    __slots__ = ("alive", "columns", "live", "numbers", "shares")

    def __init__(self, shares: int) -> None:
        self.shares = shares
        self.columns = growing()
        self.numbers = bytearray()
        """The number of each row in its block; rows move when the block is packed, numbers do not change."""
        self.alive = bytearray()
        self.live = 0

    def extend(self, events: WaitingRows, first: int) -> None:
        """Append events, the first of which has number ``first``."""
        count = len(events)
        for column, values in zip(self.columns, events.columns, strict=True):
            column.extend(values)
        self.numbers.extend(range(first, first + count))
        self.alive.extend(b"\1" * count)
        self.live += count

    def fields(self, number: int) -> Fields:
        at = self.numbers.index(number)
        _, inputs, times, groups, predicted, steps, partitions = self.columns
        return inputs[at], times[at], groups[at], predicted[at], steps[at], partitions[at]

    def remove(self, number: int) -> int:
        """Remove an event, and return what it took."""
        at = self.numbers.index(number)
        names, inputs, _, groups, *_ = self.columns
        size = event_bytes(names[at], inputs[at], groups[at])
        names[at], inputs[at], groups[at], self.alive[at] = "", b"", None, 0
        self.live -= 1
        return size

    def each(self, column: int) -> Iterator[tuple[str, Any]]:
        """Ids, and what a column holds, of the events that have not gone."""
        return compress(zip(self.columns[0], self.columns[column], strict=True), self.alive)

    @property
    def left(self) -> WaitingRows:
        """The events that have not gone."""
        if self.live == len(self.alive):
            return WaitingRows(*self.columns)
        columns = growing()
        for column, values in zip(columns, self.columns, strict=True):
            column.extend(compress(values, self.alive))
        return WaitingRows(*columns)

    def packed(self, shares: int, without: int = 0) -> _Block:
        """The same without the rows that have gone, and without so many of the others, from the first."""
        block = _Block(shares)
        for column, values in zip((*block.columns, block.numbers), (*self.columns, self.numbers), strict=True):
            column.extend(islice(compress(values, self.alive), without, None))
        block.live = self.live - without
        block.alive.extend(b"\1" * block.live)
        return block

    def copy(self, shares: int) -> _Block:
        """The same, to be changed."""
        block = _Block(shares)
        block.columns = tuple(column[:] for column in self.columns)
        block.numbers, block.alive, block.live = self.numbers[:], self.alive[:], self.live
        return block


class SharedRows:
    """What waited at one instant, oldest first; may be read on another thread while `Rows` goes on."""

    def __init__(self, blocks: Sequence[_Block]) -> None:
        self._blocks = blocks

    def parts(self) -> Iterator[WaitingRows]:
        """Yield the events in parts of few hundreds."""
        return (block.left for block in self._blocks)

    def sizes(self) -> Iterator[int]:
        """Yield how long the inputs of events are at most, for each part."""
        return (max(map(len, block.columns[1])) for block in self._blocks)

    def whole(self) -> WaitingRows:
        """Return all events."""
        return joined(list(self.parts()))


def joined(parts: Sequence[WaitingRows]) -> WaitingRows:
    """Return events of several parts one after another."""
    columns = growing()
    for part in parts:
        for column, values in zip(columns, part.columns, strict=True):
            column.extend(values)
    return WaitingRows(*columns)


class Rows:
    """The events that wait in memory, oldest first.

    Attributes:
        numbers: A number for each id that waits here; a later event has a higher one.
        bytes: What everything takes, as `event_bytes` counts it.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.bytes = 0
        self._blocks: dict[int, _Block] = {}
        self._next = self._shares = 0

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, name: str) -> bool:
        return name in self.numbers

    def extend(self, events: WaitingRows) -> int:
        """Append events but those whose ids wait here, and return how many that are."""
        new = range(self._next, self._next + len(events))
        found = list(map(self.numbers.setdefault, events.ids, new))
        known = [at for at, number in enumerate(found) if number != new[at]] if found != list(new) else []
        if known:
            for name in events.without(known).ids:
                del self.numbers[name]
            events = events.without(known)
            self.numbers.update(zip(events.ids, new, strict=False))
        at, count = 0, len(events)
        while at < count:
            key, first = self._next >> _BITS, self._next & _LAST
            part = events[at : at + _ROWS - first]
            if key not in self._blocks:
                self._blocks[key] = _Block(self._shares)
            self._own(key).extend(part, first)
            self._next += len(part)
            at += len(part)
        self.bytes += events_bytes(events.ids, events.inputs, events.groups)
        return len(known)

    def _own(self, key: int) -> _Block:
        """A block that is to be changed, and that nobody else sees."""
        block = self._blocks[key]
        if block.shares != self._shares:
            block = self._blocks[key] = block.copy(self._shares)
        return block

    def get(self, name: str) -> Fields | None:
        """Return the fields of an event, or None where it does not wait here."""
        number = self.numbers.get(name)
        return None if number is None else self._blocks[number >> _BITS].fields(number & _LAST)

    def remove(self, name: str) -> None:
        """Remove an event that waits here."""
        number = self.numbers.pop(name)
        key = number >> _BITS
        block = self._own(key)
        self.bytes -= block.remove(number & _LAST)
        if not block.live:
            del self._blocks[key]
        elif block.live * 2 <= len(block.alive):
            self._blocks[key] = block.packed(self._shares)
        if len(self._blocks) > _MANY and len(self._blocks) * _FEW > len(self.numbers):
            self._put_together()

    def _put_together(self) -> None:
        """Fill as few blocks as there can be; done once for very many removals."""
        left = self.share().whole()
        self.numbers.clear()
        self._blocks.clear()
        self.bytes = self._next = 0
        self.extend(left)

    def pop(self, name: str) -> Fields:
        """Remove an event that waits here, and return its fields."""
        number = self.numbers[name]
        fields = self._blocks[number >> _BITS].fields(number & _LAST)
        self.remove(name)
        return fields

    def older(self, time: float) -> list[str]:
        """Ids of the events before a time, in seconds."""
        old = [block for block in self._blocks.values() if min(block.columns[2]) < time]
        return [name for block in old for name, at in block.each(2) if at < time]

    def of(self, partitions: Collection[int]) -> list[str]:
        """Ids of the events that came from some partitions."""
        return [name for block in self._blocks.values() for name, number in block.each(6) if number in partitions]

    def take_oldest(self, size: int) -> WaitingRows:
        """Remove the events that came first, of at least ``size`` bytes where there are as many, and return them."""
        taken: list[WaitingRows] = []
        while size > 0 and self._blocks:
            key = next(iter(self._blocks))
            block = self._blocks[key]
            events = block.left
            ends = list(accumulate(sizes_of(events.ids, events.inputs, events.groups)))
            count = min(bisect_left(ends, size) + 1, len(ends))
            if count == len(ends):
                del self._blocks[key]
            else:
                self._blocks[key] = block.packed(self._shares, without=count)
            taken.append(events[:count])
            size -= ends[count - 1]
            self.bytes -= ends[count - 1]
            deque(map(self.numbers.__delitem__, taken[-1].ids), 0)
        return joined(taken)

    def share(self) -> SharedRows:
        """Return everything as it is now."""
        self._shares += 1
        return SharedRows(list(self._blocks.values()))


def growing() -> tuple[Any, ...]:
    """Empty columns that can grow; the numbers among them take eight bytes each, or four."""
    return [], [], array("d"), [], array("q"), array("q"), array("i")
