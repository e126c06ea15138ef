"""Waiting events in memory: which id lies where, and what belongs to it, in packed blocks.

Events come in bulk, and most go unasked for, so that is done in C: an id costs an entry of a table, and what belongs to
it some bytes of its block. A block without events is let go of; one of which an eighth has gone is packed anew; and
where blocks have few events left each, all are put together anew. What waits at one instant is given away as the blocks
themselves: whoever changes one that was given away copies it before, but not what is packed, which never changes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, compress

import numpy as np

from streams.join_format import Fields
from streams.join_ids import Ids
from streams.join_pack import Mask, Packed, WaitingRows
from streams.join_size import event_bytes

__all__ = ["Rows", "SharedRows"]

_BITS = 9
_ROWS = 1 << _BITS  # of a block: few, so that a full one is packed anew without being noticed
_LAST = _ROWS - 1
_BYTES = 1 << 20  # of ids, groups and inputs in a block, where it has more than one event; for the same reason
_OPEN_BYTES = 1 << 16
"""A block is added to while it has less, as that copies it."""
_GONE = 8
"""A block is packed anew when one in so many of its events has gone, or of its bytes, and at least so many of them:"""
_HOLES = 16
_HOLE_BYTES = 1 << 14
_FEW_BYTES = 1 << 14
_MANY = 16
"""More blocks than these, with less in each on average, are put together anew: a block itself takes memory."""
_TINY = 16  # batches that arrays are not worth it for


class _Block:
    """Up to `_ROWS` events in the order in which they came, with those that have gone since among them.

    Args:
        packed: The events.
        numbers: The number of each in its block, going up; a range means that each is its row. Rows move when the
            block is packed anew, numbers do not change.
        alive: Which of them have not gone.
        shares: How often `Rows` had given its blocks away before this one was made.
    """

    __slots__ = ("alive", "dead", "live", "next", "numbers", "oldest", "packed", "shares")

    def __init__(self, packed: Packed, numbers: Sequence[int], alive: Mask, shares: int) -> None:
        self.packed = packed
        self.numbers = numbers
        self.alive = alive
        self.live = int(np.count_nonzero(alive))
        self.dead = 0  # bytes of ids, groups and inputs that have gone, at least
        self.next = numbers[-1] + 1
        self.oldest = float(np.fmin.reduce(packed.heads["time"]))
        self.shares = shares

    @classmethod
    def of(cls, packed: Packed, first: int, shares: int) -> _Block:
        """Return a block of new events, the first of which has number ``first``."""
        return cls(packed, range(first, first + len(packed)), np.ones(len(packed), np.bool_), shares)

    @property
    def open(self) -> bool:
        """Whether events are to be added."""
        return self.next < _ROWS // 4 and self.packed.bytes < _OPEN_BYTES

    def with_(self, other: _Block) -> _Block:
        """Return both as one, the other's events last."""
        whole = isinstance(self.numbers, range)
        block = _Block(
            Packed.joined([self.packed, other.packed]),
            range(other.next) if whole else array("H", [*self.numbers, *other.numbers]),
            np.concatenate([self.alive, other.alive]),
            other.shares,
        )
        block.dead = self.dead
        return block

    def row(self, number: int) -> int:
        """The row that a number has now."""
        return number if isinstance(self.numbers, range) else bisect_left(self.numbers, number)

    def remove(self, number: int, size: int) -> None:
        """Remove an event, the id, group and inputs of which have so many bytes."""
        self.alive[self.row(number)] = False
        self.live -= 1
        self.dead += size

    @property
    def holey(self) -> bool:
        """Whether to pack the block anew: enough has gone for it to be worth it."""
        count = len(self.alive)
        gone = count - self.live
        return (gone >= _HOLES and gone * _GONE >= count) or (
            self.dead >= _HOLE_BYTES and self.dead * _GONE >= self.packed.bytes
        )

    @property
    def left(self) -> Packed:
        """The events that have not gone."""
        return self.packed if self.live == len(self.alive) else self.packed.kept(self.alive)

    def without(self, gone: Mask, shares: int) -> _Block:
        """The same without some rows and those that have gone; one at least is left."""
        mask = self.alive & ~gone
        numbers = array("H", compress(self.numbers, mask.tolist()))
        return _Block(self.packed.kept(mask), numbers, np.ones(len(numbers), np.bool_), shares)

    def copy(self, shares: int) -> _Block:
        """The same, to be changed."""
        block = _Block(self.packed, self.numbers, self.alive.copy(), shares)
        block.dead = self.dead
        return block


class SharedRows:
    """What waited at one instant, oldest first; may be read on another thread while `Rows` goes on."""

    def __init__(self, blocks: Sequence[_Block]) -> None:
        self._blocks = blocks

    def parts(self) -> Iterator[Packed]:
        """Yield the events in parts of few hundreds."""
        return (block.left for block in self._blocks)

    def longest(self) -> Iterator[int]:
        """Yield how long the inputs of an event are at most, in bytes, for each part."""
        return (int(block.packed.heads["inputs"].max(where=block.alive, initial=0)) for block in self._blocks)

    def whole(self) -> WaitingRows:
        """Return all events."""
        return Packed.joined(list(self.parts())).rows


class Rows:
    """The events that wait in memory, oldest first.

    Attributes:
        bytes: What everything takes, as `event_bytes` counts it.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ids = Ids()
        """A number for each id that waits here: of its block, and of itself in there."""
        self._blocks: dict[int, _Block] = {}
        self._last = -1  # the number of the block that was made last
        self._shares = 0
        self._put = (0, 0)
        """How many blocks there were when they had last been put together, and what they took."""

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def extend(self, events: WaitingRows) -> int:
        """Append events but those whose ids wait here, and return how many that are."""
        packed = Packed.of(events)
        places = self._places(packed)
        known = self._ids.add(events.ids, list(chain.from_iterable(places)))
        if known:
            self.extend(events.without(known))
            return len(known)
        at = 0
        for place in places:
            key, first = place.start >> _BITS, place.start & _LAST
            block = _Block.of(packed.between(at, at + len(place)), first, self._shares)
            self._blocks[key] = self._blocks[key].with_(block) if first else block
            self._last = key
            at += len(place)
        self.bytes += (
            sum(map(event_bytes, events.ids, map(len, events.inputs), events.groups))
            if len(events) < _TINY
            else int(packed.sizes.sum())
        )
        return 0

    def _places(self, packed: Packed) -> list[range]:
        """The numbers that events get, in one range for each block."""
        last, key, first = self._blocks.get(self._last), self._last + 1, 0
        if last is not None and last.open:
            key, first = self._last, last.next
        places, at, count = list[range](), 0, len(packed)
        ends = packed.ends if packed.bytes > _BYTES else None
        while at < count:
            rows = min(count - at, _ROWS - first)
            if ends is not None:
                full = (int(ends[at - 1]) if at else 0) + _BYTES
                rows = max(1, min(rows, int(ends.searchsorted(full, "right")) - at))
            places.append(range(key << _BITS | first, (key << _BITS | first) + rows))
            key, first, at = key + 1, 0, at + rows
        return places

    def _own(self, key: int) -> _Block:
        """A block that is to be changed, and that nobody else sees."""
        block = self._blocks[key]
        if block.shares != self._shares:
            block = self._blocks[key] = block.copy(self._shares)
        return block

    def get(self, name: str) -> Fields | None:
        """Return the fields of an event, or None where it does not wait here."""
        number = self._ids.get(name)
        if number is None:
            return None
        block = self._blocks[number >> _BITS]
        return block.packed.fields(block.row(number & _LAST))

    def remove(self, name: str, fields: Fields) -> None:
        """Remove an event that waits here, given what `get` returned for it."""
        number = self._ids.pop(name)
        key = number >> _BITS
        block = self._own(key)
        inputs, _, group, *_ = fields
        block.remove(number & _LAST, len(name) + len(group or "") + len(inputs))
        self.bytes -= event_bytes(name, len(inputs), group)
        if not block.live:
            del self._blocks[key]
        elif block.holey:
            self._blocks[key] = block.without(~block.alive, self._shares)
        self._put_together()

    def _put_together(self) -> None:
        """Fill as few blocks as there can be, where many have few events; done once for very many removals."""
        blocks, size = self._put
        changed = len(self._blocks) >= 2 * blocks or self.bytes * 2 <= size
        if changed and len(self._blocks) > _MANY and len(self._blocks) * _FEW_BYTES > self.bytes:
            left = list(self._blocks.values())[::-1]
            self._ids = Ids()
            self._blocks.clear()
            self.bytes, self._last = 0, -1
            while left:
                self.extend(Packed.joined([left.pop().left for _ in range(min(len(left), _MANY))]).rows)
            self._put = len(self._blocks), self.bytes

    def take_before(self, time: float) -> list[str]:
        """Remove the events before a time, in seconds, and return their ids."""
        return self._take(lambda block: block.packed.heads["time"] < time if block.oldest < time else None)

    def take_of(self, partitions: Collection[int]) -> list[str]:
        """Remove the events that came from some partitions, and return their ids."""
        wanted = list(partitions)
        return self._take(lambda block: np.isin(block.packed.heads["partition"], wanted))

    def _take(self, rows_of: Callable[[_Block], Mask | None]) -> list[str]:
        """Remove some rows of each block, if any, and return the ids that were there."""
        ids = list[str]()
        for key, block in list(self._blocks.items()):
            gone = rows_of(block)
            if gone is not None and (block.alive & gone).any():
                ids += self._without(key, block, gone).ids
        if not self._blocks:
            self._ids = Ids()  # tables do not shrink
        self._put_together()
        return ids

    def _without(self, key: int, block: _Block, gone: Mask) -> Packed:
        """Remove some rows of a block, and return the events that were there."""
        taken = block.packed.kept(block.alive & gone)
        if len(taken) == block.live:
            del self._blocks[key]
        else:
            self._blocks[key] = block.without(gone, self._shares)
        self.bytes -= int(taken.sizes.sum())
        self._ids.remove(taken.ids)
        return taken

    def take_oldest(self, size: int) -> WaitingRows:
        """Remove the events that came first, of at least ``size`` bytes where there are as many, and return them."""
        taken: list[Packed] = []
        while size > 0 and self._blocks:
            key = next(iter(self._blocks))
            block = self._blocks[key]
            ends = np.where(block.alive, block.packed.sizes, 0).cumsum()
            gone = np.arange(len(ends)) <= ends.searchsorted(size)
            before = self.bytes
            taken.append(self._without(key, block, gone))
            size -= before - self.bytes
        return Packed.joined(taken).rows

    def share(self) -> SharedRows:
        """Return everything as it is now."""
        self._shares += 1
        return SharedRows(list(self._blocks.values()))
