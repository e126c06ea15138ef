"""Rows kept as columns: what is done to many records at once takes a column, and a row is made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby, pairwise
from operator import itemgetter, lt
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar, overload

from streams.base import Headers, Message, Record

__all__ = ["Column", "Columns", "Mapped", "Messages", "Records", "Stretch"]

T = TypeVar("T")
Row = TypeVar("Row", bound=tuple[Any, ...])


class Mapped(Sequence[T]):
    """What a function makes of each element of a sequence, made when it is asked for."""

    __slots__ = ("function", "values")

    def __init__(self, function: Callable[[Any], T], values: Sequence[Any]) -> None:
        self.function = function
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, at: int) -> T: ...

    @overload
    def __getitem__(self, at: slice) -> Mapped[T]: ...

    def __getitem__(self, at: int | slice) -> T | Mapped[T]:
        if isinstance(at, slice):
            return Mapped(self.function, self.values[at])
        return self.function(self.values[at])

    def __iter__(self) -> Iterator[T]:
        return map(self.function, self.values)


def _joined(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Columns one after another, of the kind that all of them are of."""
    first = parts[0]
    if isinstance(first, Columns) and all(type(part) is type(first) for part in parts):
        return first.joined(parts)
    if isinstance(first, Mapped) and all(getattr(part, "function", None) is first.function for part in parts):
        return Mapped(first.function, _joined([part.values for part in parts]))  # type: ignore[attr-defined]
    return list(chain.from_iterable(parts))


class Column(Generic[T]):
    """A column of `Columns`, by its place."""

    def __init__(self, at: int) -> None:
        self._at = at

    def __get__(self, rows: Columns[Any], owner: type) -> Sequence[T]:
        return rows.columns[self._at]


class Columns(Sequence[Row], Generic[Row]):
    """Rows of one kind of named tuple, as one sequence for each of its fields, all of one length."""

    __slots__ = ("columns",)
    kind: ClassVar[Any]
    """The named tuple."""

    def __init__(self, *columns: Sequence[Any]) -> None:
        self.columns: tuple[Sequence[Any], ...] = columns

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Self:
        """Return rows as columns."""
        if isinstance(rows, cls):
            return rows
        return cls(*(zip(*rows, strict=True) if rows else [()] * len(cls.kind._fields)))

    @classmethod
    def joined(cls, parts: Sequence[Sequence[Any]]) -> Self:
        """Return parts, of which there is at least one, one after another."""
        return cls(*map(_joined, zip(*[cls.of(part).columns for part in parts], strict=True)))

    def __len__(self) -> int:
        return len(self.columns[0])

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> Self: ...

    def __getitem__(self, at: int | slice) -> Any:
        parts = [column[at] for column in self.columns]
        return type(self)(*parts) if isinstance(at, slice) else self.kind(*parts)

    def __iter__(self) -> Iterator[Row]:
        return map(self.kind._make, zip(*self.columns, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Stretch(NamedTuple):
    """Rows ``[start, stop)``, which are consecutive records of one partition."""

    stream: str
    partition: int
    start: int
    stop: int


class Records(Columns[Record]):
    """Records as columns; a slice is one of rows that follow one another."""

    __slots__ = ("divided",)
    kind = Record
    streams = Column[str](0)
    partitions = Column[int](1)
    offsets = Column[int](2)
    ends = Column[int](3)
    timestamps = Column[float](4)
    values = Column[bytes](6)

    def __init__(self, *columns: Sequence[Any]) -> None:
        super().__init__(*columns)
        self.divided: list[Stretch] | None = None
        """What `stretches` has found, if it was asked."""

    @property
    def stretches(self) -> list[Stretch]:
        """The rows in stretches, which end where stream or partition change, or where offsets do not increase."""
        if self.divided is None:
            self.divided = self._divide()
        return self.divided

    def __getitem__(self, at: int | slice) -> Any:
        found = super().__getitem__(at)
        if self.divided is not None and isinstance(at, slice) and isinstance(found, Records) and found:
            first, end, step = at.indices(len(self))
            if step != 1:
                return found
            found.divided = [
                Stretch(*one[:2], max(one.start, first) - first, min(one.stop, end) - first)
                for one in self.divided
                if one.stop > first and one.start < end
            ]
        return found

    def _divide(self) -> list[Stretch]:
        streams, partitions, offsets = self.streams, self.partitions, self.offsets
        alone = not streams or streams.count(streams[0]) == len(streams)
        ends, at = list[int](), 0
        if not all(map(lt, offsets, offsets[1:])):
            ends += [stop for stop, (before, after) in enumerate(pairwise(offsets), 1) if after <= before]
        for _, run in groupby(partitions if alone else zip(streams, partitions, strict=True)):
            at += len(list(run))
            ends.append(at)
        bounds = [0, *sorted({*ends})] if ends else []
        return [Stretch(streams[start], partitions[start], start, stop) for start, stop in pairwise(bounds)]

    def by_stream(self) -> list[tuple[str, Records]]:
        """The rows in runs of one stream each."""
        found = []
        for stream, stretches in groupby(self.stretches, key=itemgetter(0)):
            parts = list(stretches)
            whole = len(parts) == len(self.stretches)
            found.append((stream, self if whole else self[parts[0].start : parts[-1].stop]))
        return found


class Messages(Columns[Message]):
    """Messages as columns."""

    __slots__ = ()
    kind = Message
    keys = Column[bytes | None](0)
    values = Column[bytes](1)
    headers = Column[Headers](2)
