"""Numbers by id, in many small tables: a table that grows is rebuilt as a whole, which stops everything meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["Ids"]

_TABLES = 64
"""So many that rebuilding one of them takes a millisecond where a million ids are known."""
_MASK = _TABLES - 1


class Ids:
    """A mapping of ids to numbers, in no order."""

    def __init__(self) -> None:
        self._tables: list[dict[str, int]] = [{} for _ in range(_TABLES)]
        self._add = [table.setdefault for table in self._tables]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, name: str) -> bool:
        return name in self._tables[hash(name) & _MASK]

    def get(self, name: str) -> int | None:
        """Return the number of an id, or None where it is not known."""
        return self._tables[hash(name) & _MASK].get(name)

    def add(self, ids: Sequence[str], numbers: Sequence[int]) -> list[int]:
        """Add ids with their numbers, all of them or none.

        Returns:
            The rows of ids that were known, or came twice; nothing was added if there are any.
        """
        add = self._add
        rows = zip(map(hash, ids), ids, numbers, strict=True)
        found = [add[key & _MASK](name, number) for key, name, number in rows]
        self._count += len(ids)
        if found == numbers:
            return []
        known = [at for at, number in enumerate(numbers) if found[at] != number]
        self._count -= len(known)
        self.remove([name for name, number, was in zip(ids, numbers, found, strict=True) if number == was])
        return known

    def pop(self, name: str) -> int:
        """Remove an id that is known, and return its number."""
        number = self._tables[hash(name) & _MASK].pop(name)
        self._count -= 1
        return number

    def remove(self, ids: Collection[str]) -> None:
        """Remove ids that are known."""
        tables = self._tables
        for name in ids:
            del tables[hash(name) & _MASK][name]
        self._count -= len(ids)
