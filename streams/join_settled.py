"""Memory of ids whose story is over, so that a duplicate or a late feedback is told from an unknown one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from itertools import islice

from streams.join_size import text_bytes

__all__ = ["How", "Settled"]

_ENTRY_BYTES = (
    152  # str header and rounding (64), slot of a hash table at its emptiest (88); see benchmarks/join_memory
)


class How(IntEnum):
    """How the story of an id ended."""

    GONE = 0
    """Its event expired or was evicted."""
    JOINED = 1
    """Its event met its feedback."""
    INLINE = 2
    """Its feedback brought the inputs along, and the event itself has not come yet."""


class Settled:
    """Ids in the order in which they were settled, forgotten in that order after a time or above a size.

    Ids are kept as they are: a digest of eight bytes costs as much as a short string does in Python, takes longer to
    make than everything else that an event costs here, and could take one id for another.
    """

    def __init__(self) -> None:
        self.how: dict[str, How] = {}
        self.bytes = 0
        self._added = 0
        self._dropped = 0
        # (watermark, how many had been added by then): ids need no time of their own.
        self._marks: deque[tuple[float, int]] = deque()

    def add(self, id: str, how: How) -> None:  # noqa: A002 - the field's own word
        """Remember an id that is not remembered yet."""
        self.how[id] = how
        self.bytes += _ENTRY_BYTES + text_bytes(id)
        self._added += 1

    def sweep(self, watermark: float, age: float) -> None:
        """Forget what had been settled before a watermark that is older than ``age`` seconds."""
        while self._marks and self._marks[0][0] < watermark - age:
            self._drop(self._marks.popleft()[1] - self._dropped)
        if self._added > (self._marks[-1][1] if self._marks else self._dropped):
            self._marks.append((watermark, self._added))

    def shrink(self, limit: int) -> None:
        """Forget the oldest ids until at most ``limit`` bytes are taken."""
        if self.bytes > limit:
            # A bit more than needed: finding the front of a dict that shrank there takes time.
            target, size, count = limit - limit // 16, self.bytes, 0
            for name in self.how:
                if size <= target:
                    break
                size -= _ENTRY_BYTES + text_bytes(name)
                count += 1
            self._drop(count)

    def _drop(self, count: int) -> None:
        for name in list(islice(self.how, max(count, 0))):
            del self.how[name]
            self.bytes -= _ENTRY_BYTES + text_bytes(name)
            self._dropped += 1

    def items(self) -> Iterator[tuple[str, How]]:
        """Yield ids and how they ended, oldest first."""
        return iter(self.how.items())

    def marks(self) -> list[tuple[float, int]]:
        """Return watermarks with how many of the ids kept had been settled by then."""
        return [(watermark, added - self._dropped) for watermark, added in self._marks]

    def set_marks(self, marks: list[tuple[float, int]]) -> None:
        """Take over what `marks` returned, once the ids themselves were added again in order."""
        self._marks = deque(marks)
