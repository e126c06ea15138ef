"""Waiting events in memory: which id lies where, and what belongs to it, in blocks of columns.

Events come in bulk, and most go unasked for, so that is done in C: an id costs an entry of a dictionary, and what
belongs to it an element of each column. A block without events is let go of; one of which half has gone is packed; and
where blocks have few events left each, all are put together anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from itertools import compress
from typing import Any

from streams.columns import Column, Columns
from streams.join_format import Fields, Waiting
from streams.join_size import event_bytes, events_bytes

__all__ = ["Rows", "WaitingRows"]

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

    def without(self, rows: Sequence[int]) -> WaitingRows:
        """Return all but some rows, which go up."""
        columns = list(map(list, self.columns))
        for at in reversed(rows):
            for column in columns:
                del column[at]
        return WaitingRows(*columns)


class _Block:
    """Up to `_ROWS` events in the order in which they came, with those that have gone since among them."""

    __slots__ = ("alive", "columns", "live", "numbers")

    def __init__(self) -> None:
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

    def left(self) -> Iterator[Iterator[Any]]:
        """What the columns, and then the numbers, hold of events that have not gone."""
        return (compress(column, self.alive) for column in (*self.columns, self.numbers))

    def packed(self) -> _Block:
        """The same without the rows that have gone."""
        block = _Block()
        for column, values in zip((*block.columns, block.numbers), self.left(), strict=True):
            column.extend(values)
        block.alive.extend(b"\1" * self.live)
        block.live = self.live
        return block


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
        self._next = 0

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
                self._blocks[key] = _Block()
            self._blocks[key].extend(part, first)
            self._next += len(part)
            at += len(part)
        self.bytes += events_bytes(events.ids, events.inputs, events.groups)
        return len(known)

    def get(self, name: str) -> Fields | None:
        """Return the fields of an event, or None where it does not wait here."""
        number = self.numbers.get(name)
        return None if number is None else self._blocks[number >> _BITS].fields(number & _LAST)

    def remove(self, name: str) -> None:
        """Remove an event that waits here."""
        number = self.numbers.pop(name)
        key = number >> _BITS
        block = self._blocks[key]
        self.bytes -= block.remove(number & _LAST)
        if not block.live:
            del self._blocks[key]
        elif block.live * 2 <= len(block.alive):
            self._blocks[key] = block.packed()
        if len(self._blocks) > _MANY and len(self._blocks) * _FEW > len(self.numbers):
            self._put_together()

    def _put_together(self) -> None:
        """Fill as few blocks as there can be; done once for very many removals."""
        left = self.copy()
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
        return [name for name, at in self._each(2) if at < time]

    def of(self, partitions: Collection[int]) -> list[str]:
        """Ids of the events that came from some partitions."""
        return [name for name, number in self._each(6) if number in partitions]

    def oldest(self, size: int) -> list[str]:
        """Ids of the events that came first, of at least ``size`` bytes where there are as many."""
        names: list[str] = []
        for block in self._blocks.values():
            for name, *fields in compress(zip(*block.columns, strict=True), block.alive):
                if size <= 0:
                    return names
                names.append(name)
                size -= event_bytes(name, fields[0], fields[2])
        return names

    def _each(self, column: int) -> Iterator[tuple[str, Any]]:
        for block in self._blocks.values():
            yield from compress(zip(block.columns[0], block.columns[column], strict=True), block.alive)

    def copy(self) -> WaitingRows:
        """Return everything as it is now."""
        columns = growing()
        for block in self._blocks.values():
            whole = block.live == len(block.alive)
            for column, values in zip(columns, block.columns if whole else block.left(), strict=False):
                column.extend(values)
        return WaitingRows(*columns)


def growing() -> tuple[Any, ...]:
    """Empty columns that can grow; the numbers among them take eight bytes each, or four."""
    return [], [], array("d"), [], array("q"), array("q"), array("i")
