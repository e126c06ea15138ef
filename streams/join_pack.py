"""Waiting events packed: a table of their numbers, and ids, groups and inputs one after another as bytes.

That is how they lie in memory and, after their count, in checkpoints, so that writing a checkpoint copies bytes and
looks at no event; and it is a handful of objects for hundreds of events, none of which holds a reference that the
garbage collector would follow.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streams.columns import Column, Columns
from streams.join_format import Fields, JoinError, Waiting, decode_id, encode_id
from streams.join_size import event_bytes, packed_bytes

__all__ = ["Packed", "WaitingRows", "payload_of"]

_COUNT = struct.Struct("<I")
_HEADS = np.dtype(
    [
        ("time", "<f8"),
        ("predicted", "<i8"),
        ("step", "<i8"),
        ("group", "<i4"),
        ("id", "<u4"),
        ("inputs", "<u4"),
        ("partition", "<i4"),
    ]
)
"""What an entry of `streams.join_format` begins with, for many at once."""

Mask = NDArray[np.bool_]
_Bytes = bytes  # packed events have a property of that name


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


class Packed:
    """Waiting events, never changed.

    Args:
        heads: Numbers of each, with how many bytes its id, group (-1 for none) and inputs take.
        names: The ids, in UTF-8.
        groups: The groups of those that have one, in UTF-8.
        inputs: The inputs.
    """

    def __init__(self, heads: NDArray[Any], names: _Bytes, groups: _Bytes, inputs: _Bytes) -> None:
        self.heads = heads
        self.names = names
        self.groups = groups
        self.inputs = inputs

    @classmethod
    def of(cls, events: WaitingRows) -> Packed:
        """Pack events."""
        ids, inputs, times, groups, predicted, steps, partitions = events.columns
        heads = np.empty(len(ids), _HEADS)
        heads["time"], heads["predicted"], heads["step"], heads["partition"] = times, predicted, steps, partitions
        names, heads["id"] = _texts(ids)
        heads["inputs"], heads["group"] = np.fromiter(map(len, inputs), np.uint32, len(inputs)), -1
        labels = b""
        if groups.count(None) != len(groups):
            labels, sizes = _texts([group for group in groups if group is not None])
            heads["group"][[group is not None for group in groups]] = sizes
        return cls(heads, names, labels, b"".join(inputs))

    @classmethod
    def read(cls, payload: _Bytes) -> Packed:
        """Return what `payload_of` was given.

        Raises:
            JoinError: The payload does not end where its last event ends.
        """
        (count,) = _COUNT.unpack_from(payload)
        heads = np.frombuffer(payload, _HEADS, count, _COUNT.size)
        at = _COUNT.size + heads.nbytes
        parts = list[_Bytes]()
        for name in ("id", "group", "inputs"):
            end = at + int(np.maximum(heads[name], 0).sum(dtype=np.int64))
            parts.append(payload[at:end])
            at = end
        if at != len(payload):
            raise JoinError("the saved joins are damaged: events are not as long as the frame they are in")
        if (heads["group"] < -1).any() or np.isnan(heads["time"]).any():
            raise JoinError("the saved joins are damaged: an event has no time or no group")
        return cls(heads, *parts)

    @classmethod
    def joined(cls, parts: Sequence[Packed]) -> Packed:
        """Return the events of several one after another."""
        if len(parts) == 1:
            return parts[0]
        heads = np.frombuffer(b"".join([part.heads.tobytes() for part in parts]), _HEADS)
        texts = (b"".join([getattr(part, name) for part in parts]) for name in ("names", "groups", "inputs"))
        return cls(heads, *texts)

    def __len__(self) -> int:
        return len(self.heads)

    @cached_property
    def bytes(self) -> int:
        """What ids, groups and inputs take."""
        return len(self.names) + len(self.groups) + len(self.inputs)

    @property
    def ends(self) -> NDArray[np.int64]:
        """What ids, groups and inputs take up to each event, in bytes."""
        return (self._sizes("id") + self._sizes("group") + self._sizes("inputs")).cumsum()

    @cached_property
    def width(self) -> int | None:
        """How long the inputs of each event are, in bytes, where that is one number."""
        sizes = self.heads["inputs"]
        return int(sizes[0]) if len(sizes) and bool((sizes == sizes[0]).all()) else None

    def kept(self, mask: Mask) -> Packed:
        """Return some of the events: those where the mask is true."""
        heads = self.heads[mask]
        if not len(heads):
            return Packed(heads, b"", b"", b"")
        names, groups = (
            _kept(raw, self._sizes(name), mask) for raw, name in ((self.names, "id"), (self.groups, "group"))
        )
        if self.width:
            inputs = np.frombuffer(self.inputs, np.uint8).reshape(-1, self.width)[mask].tobytes()
        else:
            inputs = _kept(self.inputs, self._sizes("inputs"), mask)
        return Packed(heads, names, groups, inputs)

    def between(self, first: int, end: int) -> Packed:
        """Return the events of some rows that follow one another."""
        if first <= 0 and end >= len(self):
            return self
        texts = []
        for raw, name in ((self.names, "id"), (self.groups, "group"), (self.inputs, "inputs")):
            sizes = self._sizes(name)
            at = int(sizes[:first].sum())
            texts.append(raw[at : at + int(sizes[first:end].sum())])
        return Packed(self.heads[first:end].copy(), *texts)

    def _sizes(self, name: str) -> NDArray[np.int64]:
        sizes: NDArray[np.int64] = np.maximum(self.heads[name], 0).astype(np.int64)
        return sizes

    def group(self, at: int) -> str | None:
        """Return the group of one event."""
        size = int(self.heads["group"][at])
        if size <= 0:
            return None if size < 0 else ""
        first = int(self._sizes("group")[:at].sum())
        return decode_id(self.groups[first : first + size])

    def fields(self, at: int) -> Fields:
        """Return what belongs to one event beside its id."""
        time, predicted, step, _, _, size, partition = self.heads[at].item()
        first = at * size if self.width is not None else int(self.heads["inputs"][:at].sum(dtype=np.int64))
        return self.inputs[first : first + size], time, self.group(at), predicted, step, partition

    @property
    def ids(self) -> list[str]:
        """The ids."""
        return _cut(self.names, self._sizes("id"))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """What `event_bytes` gives for each."""
        if self.names.isascii() and self.groups.isascii():
            return packed_bytes(self.heads["id"], self.heads["inputs"], self.heads["group"])
        rows = self.rows
        sizes = map(event_bytes, rows.ids, map(len, rows.inputs), rows.groups)
        return np.fromiter(sizes, np.int64, len(self))

    @property
    def rows(self) -> WaitingRows:
        """The events as columns."""
        bounds = [0, *self._sizes("inputs").cumsum().tolist()]
        inputs = [self.inputs[first:end] for first, end in pairwise(bounds)]
        times, predicted, steps, partitions = (
            self.heads[name].tolist() for name in ("time", "predicted", "step", "partition")
        )
        groups: list[str | None] = [None] * len(self)
        if (self.heads["group"] >= 0).any():
            texts = _cut(self.groups, self._sizes("group"))
            groups = [text if size >= 0 else None for text, size in zip(texts, self.heads["group"], strict=True)]
        return WaitingRows(self.ids, inputs, times, groups, predicted, steps, partitions)


def payload_of(parts: Sequence[Packed]) -> bytes:
    """Return events of several parts, one after another, in binary form."""
    count = _COUNT.pack(sum(map(len, parts)))
    pieces = (part.heads.tobytes() for part in parts)
    texts = (getattr(part, name) for name in ("names", "groups", "inputs") for part in parts)
    return b"".join((count, *pieces, *texts))


def _texts(texts: Sequence[str]) -> tuple[bytes, NDArray[np.uint32]]:
    """Texts one after another, and their sizes in bytes."""
    whole = "".join(texts)
    raw: Sequence[str | bytes] = texts if whole.isascii() else [encode_id(text) for text in texts]
    return encode_id(whole), np.fromiter(map(len, raw), np.uint32, len(texts))


def _cut(raw: bytes, sizes: NDArray[np.int64]) -> list[str]:
    """The texts of which `_texts` made one."""
    bounds = [0, *sizes.cumsum().tolist()]
    if raw.isascii():
        text = raw.decode()
        return [text[first:end] for first, end in pairwise(bounds)]
    return [decode_id(raw[first:end]) for first, end in pairwise(bounds)]


def _kept(raw: bytes, sizes: NDArray[np.int64], mask: Mask) -> bytes:
    return np.frombuffer(raw, np.uint8)[np.repeat(mask, sizes)].tobytes() if raw else b""
