"""What codecs speak of: the shape of inputs, decoded records, and why a record is bad."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from streams.base import Record
from streams.columns import Column, Columns, Records

Form = Literal["json", "binary"]

VERSION: Final = 1
"""Version of the message schemas that this program writes, and the only one that it reads."""

MAX_BYTES: Final = 16 * 1024 * 1024
"""Records above this size are refused before they are looked at."""

LATEST_TIME: Final = 4_102_444_800.0
"""Start of the year 2100: a time beyond it is in milliseconds, and would expire everything that waits."""

MAX_ID_CHARS: Final = 128
"""Longest id and longest group, in characters."""

DTYPE_FORMATS: Final = {
    "uint8": (1, "B"),
    "int8": (2, "b"),
    "int16": (3, "h"),
    "int32": (4, "i"),
    "int64": (5, "q"),
    "float16": (6, "e"),
    "float32": (7, "f"),
    "float64": (8, "d"),
}
"""Element types of inputs: name to code of the binary form and format character of `struct`."""


class Reason(StrEnum):
    """Why a record is bad: the values of a metric label, so the set is small and fixed."""

    TOO_LARGE = "too_large"
    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NESTING = "nesting"
    DUPLICATE_KEY = "duplicate_key"
    NOT_FINITE = "not_finite"
    FRAMING = "framing"
    KIND = "kind"
    VERSION = "version"
    SCHEMA = "schema"
    ID = "id"
    TIME = "time"
    LABEL = "label"
    DTYPE = "dtype"
    SHAPE = "shape"
    RANGE = "range"


class BadRecord(Exception):  # noqa: N818 - the field's word; it is data for the dead letters as much as an error
    """A record cannot be decoded.

    Attributes:
        reason: Which kind of fault.
        message: What was expected and what arrived, in one sentence, without the payload.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@dataclass(frozen=True)
class InputSpec:
    """Inputs of one event as they are in records, before scale and layout.

    Attributes:
        shape: Size of every dimension; ``()`` for a single number.
        dtype: One of `DTYPE_FORMATS`.

    Raises:
        ValueError: A dimension is not positive, or the dtype is not supported.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.dtype.name not in DTYPE_FORMATS:
            raise ValueError(f"inputs cannot be {self.dtype.name}; choose one of {', '.join(DTYPE_FORMATS)}")
        if len(self.shape) > 255 or any(not 0 < size < 2**32 for size in self.shape):
            raise ValueError(f"sizes of inputs must be positive, not {list(self.shape)}")

    @cached_property
    def name(self) -> str:
        """Name of the dtype; numpy works it out anew each time."""
        return self.dtype.name

    @cached_property
    def count(self) -> int:
        """Elements of one event."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one event."""
        return self.count * self.dtype.itemsize

    @cached_property
    def packer(self) -> struct.Struct:
        """Packs the elements of one event, little-endian."""
        return struct.Struct(f"<{self.count}{DTYPE_FORMATS[self.dtype.name][1]}")

    def unlike(self, value: object) -> str:
        """Say how parsed JSON differs from the nested lists that were expected, by the first list of each level."""
        sizes: list[int] = []
        first = value
        while type(first) is list:
            sizes.append(len(first))
            first = first[0] if first else None
        found = f"lists of shape {sizes}" if sizes else type(value).__name__
        if sizes == list(self.shape):
            found = "lists that differ among themselves"
        return f"inputs must be lists of shape {list(self.shape)}, or a tensor object, not {found}"


class Event(NamedTuple):
    """A decoded data record."""

    id: str
    inputs: bytes
    """Elements in C order, little-endian, exactly `InputSpec.nbytes` of them: a batch is one join and one view."""
    time: float
    """Event time, seconds."""
    group: str | None
    record: Record


class Events(Columns[Event]):
    """Decoded data records as columns; `records` are columns too."""

    __slots__ = ("records",)
    kind = Event
    ids = Column[str](0)
    inputs = Column[bytes](1)
    times = Column[float](2)
    groups = Column[str | None](3)

    def __init__(self, *columns: Sequence[Any]) -> None:
        self.records = Records.of(columns[4])
        """What they were decoded from."""
        super().__init__(*columns[:4], self.records)


class Feedback(NamedTuple):
    """A decoded feedback record. Exactly one of label and reward is set."""

    id: str
    """Id of the event that it speaks of."""
    label: int | None
    reward: float | None
    time: float
    """When the label became known, seconds."""
    inputs: bytes | None
    """Inputs of the event, as in `Event`, where feedback carries them itself."""
    record: Record


class Prediction(NamedTuple):
    """A decoded prediction."""

    id: str
    label: int
    probabilities: tuple[float, ...]
    """One for each class, each exactly a float32; NaN where the model gave no finite answer."""
    time: float
    release: int
    step: int


def check_id(value: object, field: str = "id") -> str:
    """Return the value if it may be an id or a group.

    Args:
        value: What the record holds.
        field: Name of the field, for the message.

    Raises:
        BadRecord: Not a string of 1 to 128 characters, or not expressible in UTF-8.
    """
    if type(value) is not str:
        raise BadRecord(Reason.ID, f"{field} must be a string, not {type(value).__name__}")
    if not 0 < len(value) <= MAX_ID_CHARS:
        raise BadRecord(Reason.ID, f"{field} must have 1 to {MAX_ID_CHARS} characters, not {len(value)}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRecord(Reason.ID, f"{field} holds half of a surrogate pair")
    return value


def check_time(value: float | None, record: Record) -> float:
    """Return the time of a record, or the timestamp of its stream where it has none.

    Args:
        value: Seconds; None where the record has no time.
        record: The record that is being decoded.

    Raises:
        BadRecord: Not finite, negative or beyond `LATEST_TIME`, or neither the record nor its stream knows a time.
    """
    time = record.timestamp if value is None else value
    if math.isfinite(time):
        if 0 <= time < LATEST_TIME:
            return time
        fault = "lies before the year 1970" if time < 0 else "lies beyond the year 2100"
        raise BadRecord(Reason.TIME, f"time {time:.6g} {fault}; it must be in seconds since 1970")
    if value is None:
        raise BadRecord(Reason.TIME, "time is missing and the stream has no timestamps; add the field to the record")
    raise BadRecord(Reason.TIME, "time must be a finite number of seconds")
