"""What the join store speaks of, and the framed binary form in which its state is written down.

The form (little endian): the magic, then frames. A frame is a header, kind (1 byte), payload length (u32),
crc32 of the payload (u32) and crc32 of these nine bytes (u32), followed by its payload. Kinds, in order:

====  ===================================================================================================
kind  payload
====  ===================================================================================================
S     the scalars: one JSON object (floats as hexadecimal text, so they come back bit for bit)
R     settled ids, oldest first: per item how it ended (u8), id
D     events that wait on disk, oldest first: entries
B     events that wait in memory, oldest first: how many (u32), what their entries begin with, then ids, then groups,
      then inputs
F     early feedback, oldest first: per item label (i64), reward (f64), time (f64), partition (i32), bits (u8: a
      label is there, a reward is there, seen before), id
E     the end: how many frames came before (u64)
====  ===================================================================================================

An entry is time (f64), predicted class (i64), step (i64), group length (i32, -1 for none), id length (u32),
inputs length (u32), partition (i32), then id, group and inputs. Text is UTF-8 with a u32 length in front where none is
given above. What older versions wrote is read too: ``adaptd-join-2`` has entries in frames W instead of B, and so has
``adaptd-join-1``, which names no partitions; they are -1 then.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

from streams.base import Record

__all__ = ["FeedbackLike", "JoinError", "Joined", "Waiting"]


class JoinError(Exception):
    """Waiting joins cannot be kept or read back; the message says which and what to do."""


class Waiting(NamedTuple):
    """An answered event that waits for its feedback."""

    id: str
    inputs: bytes
    time: float
    """Event time, seconds."""
    group: str | None
    predicted: int
    """The class that was answered."""
    step: int
    """The model step that answered; -1 where somebody else did."""
    partition: int = 0
    """Number of the partition that it came from."""


class Joined(NamedTuple):
    """An event together with its feedback."""

    id: str
    inputs: bytes
    time: float
    """Event time, seconds; that of the feedback where the event itself was never seen (inline feedback)."""
    group: str | None
    predicted: int
    """The class that was answered, -1 where that is not known (inline feedback)."""
    step: int
    """The model step that answered, -1 where that is not known."""
    label: int | None
    reward: float | None
    feedback_time: float
    """Time of the feedback, seconds."""


class FeedbackLike(Protocol):
    """What the join store reads of a feedback record."""

    @property
    def id(self) -> str:
        """The event that it speaks of."""
        ...

    @property
    def label(self) -> int | None:
        """The class that would have been right."""
        ...

    @property
    def reward(self) -> float | None:
        """How good the answer was."""
        ...

    @property
    def time(self) -> float:
        """Feedback time, seconds."""
        ...

    @property
    def inputs(self) -> bytes | None:
        """The inputs of the event, where the feedback carries them itself."""
        ...

    @property
    def record(self) -> Record:
        """What it was decoded from."""
        ...


Fields = tuple[bytes, float, str | None, int, int, int]
"""A waiting event without its id: inputs, time, group, predicted, step, partition."""

Early = tuple[int | None, float | None, float, int, bool]
"""Feedback without its id: label, reward, time, partition, and whether somebody else had it before and counted it."""

MAGIC = b"adaptd-join-3\n"
_MAGIC_2 = b"adaptd-join-2\n"
_MAGIC_1 = b"adaptd-join-1\n"
FRAME_BYTES = 1 << 20  # payloads are cut here: few system calls, and little memory on top of the state itself
_HEADER = struct.Struct("<cIII")
_ENTRY = struct.Struct("<dqqiIIi")
_ENTRY_1 = struct.Struct("<dqqiII")
_EARLY = struct.Struct("<qddiBI")
_EARLY_1 = struct.Struct("<qddBI")
_ALL_BITS = 7
_SETTLED = struct.Struct("<BI")
_END = struct.Struct("<Q")


def encode_id(text: str) -> bytes:
    """Return an id as bytes; lone surrogates, which JSON escapes can bring in, are kept as they are."""
    return text.encode("utf-8", "surrogatepass")


def decode_id(raw: bytes) -> str:
    """Return what `encode_id` was given."""
    return raw.decode("utf-8", "surrogatepass")


def upgrade(kind: bytes, payload: bytes) -> bytes:
    """Return a payload that version 1 wrote as this one does; its partitions are -1."""
    parts: list[bytes] = []
    at = 0
    if kind in (b"D", b"W"):
        while at < len(payload):
            fields = _ENTRY_1.unpack_from(payload, at)
            rest = at + _ENTRY_1.size
            at = rest + max(fields[3], 0) + fields[4] + fields[5]
            parts += (_ENTRY.pack(*fields, -1), payload[rest:at])
    elif kind == b"F":
        while at < len(payload):
            label, reward, time, bits, size = _EARLY_1.unpack_from(payload, at)
            rest = at + _EARLY_1.size
            at = rest + size
            parts += (_EARLY.pack(label, reward, time, -1, bits, size), payload[rest:at])
    return b"".join(parts) if parts else payload


def unpack_entries(payload: bytes) -> Iterator[tuple[str, Fields]]:
    """Yield id and fields of every waiting event in a payload.

    Raises:
        JoinError: The payload does not end where its last event ends.
    """
    at, size = 0, len(payload)
    while at < size:
        time, predicted, step, group_size, id_size, input_size, partition = _ENTRY.unpack_from(payload, at)
        middle = at + _ENTRY.size + id_size
        name = payload[at + _ENTRY.size : middle].decode("utf-8", "surrogatepass")
        group = None
        if group_size >= 0:
            group = payload[middle : middle + group_size].decode("utf-8", "surrogatepass")
            middle += group_size
        at = middle + input_size
        if at > size or group_size < -1 or math.isnan(time):
            raise JoinError("the saved joins are damaged: an event is longer than its frame, or has no time or group")
        yield name, (payload[middle:at], time, group, predicted, step, partition)


def pack_entries(names: Sequence[bytes], *columns: Sequence[Any]) -> list[bytes]:
    """Return waiting events, given by ids as bytes and by the other columns, each as an entry."""
    inputs, times, groups, predicted, steps, partitions = columns
    labels = [b"" if group is None else encode_id(group) for group in groups]
    sizes = [-1 if group is None else len(label) for group, label in zip(groups, labels, strict=True)]
    heads = map(_ENTRY.pack, times, predicted, steps, sizes, map(len, names), map(len, inputs), partitions)
    return list(map(b"".join, zip(heads, names, labels, inputs, strict=True)))


def pack_early(id: str, feedback: Early) -> bytes:  # noqa: A002
    """Return one early feedback in binary form."""
    label, reward, time, partition, seen = feedback
    name = encode_id(id)
    bits = (label is not None) | (reward is not None) << 1 | seen << 2
    return _EARLY.pack(label or 0, 0.0 if reward is None else reward, time, partition, bits, len(name)) + name


def unpack_early(payload: bytes) -> Iterator[tuple[str, Early]]:
    """Yield id and feedback of every early feedback in a payload.

    Raises:
        JoinError: The payload does not end where the last one ends.
    """
    at = 0
    while at < len(payload):
        label, reward, time, partition, bits, size = _EARLY.unpack_from(payload, at)
        at += _EARLY.size + size
        if at > len(payload) or bits > _ALL_BITS or math.isnan(time) or not math.isfinite(reward):
            raise JoinError("the saved joins are damaged: feedback is longer than its frame, or not what is written")
        name = payload[at - size : at].decode("utf-8", "surrogatepass")
        yield name, (label if bits & 1 else None, reward if bits & 2 else None, time, partition, bool(bits & 4))


def pack_settled(id: str, how: int) -> bytes:  # noqa: A002
    """Return one settled id in binary form."""
    name = encode_id(id)
    return _SETTLED.pack(how, len(name)) + name


def unpack_settled(payload: bytes) -> Iterator[tuple[str, int]]:
    """Yield id and how it ended of every settled id in a payload.

    Raises:
        JoinError: The payload does not end where the last one ends.
    """
    at = 0
    while at < len(payload):
        how, size = _SETTLED.unpack_from(payload, at)
        at += _SETTLED.size + size
        if at > len(payload):
            raise JoinError("the saved joins are damaged: an id is longer than the frame it is in")
        yield payload[at - size : at].decode("utf-8", "surrogatepass"), how


def payloads(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the parts joined into payloads of about `FRAME_BYTES`; a part is never cut."""
    held: list[bytes] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= FRAME_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def write_frames(file: BinaryIO, frames: Iterable[tuple[bytes, bytes]]) -> None:
    """Write magic, frames of ``(kind, payload)`` and the end frame."""
    file.write(MAGIC)
    count = 0
    for kind, payload in frames:
        _write_frame(file, kind, payload)
        count += 1
    _write_frame(file, b"E", _END.pack(count))


def _write_frame(file: BinaryIO, kind: bytes, payload: bytes) -> None:
    header = _HEADER.pack(kind, len(payload), zlib.crc32(payload), 0)[:-4]
    file.write(header + zlib.crc32(header).to_bytes(4, "little"))
    file.write(payload)


def read_frames(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield ``(kind, payload)`` of every frame before the end frame.

    Raises:
        JoinError: The file is cut short, damaged, of another format, does not begin with its scalars, or goes on after
            its end.
    """
    magic = file.read(len(MAGIC))
    if magic not in (MAGIC, _MAGIC_2, _MAGIC_1):
        raise JoinError("the saved joins do not begin as this version writes them; load an older checkpoint")
    count, at = 0, len(MAGIC)
    while True:
        kind, payload = _read_frame(file, at)
        if (kind == b"S") is not (count == 0):
            raise JoinError("the saved joins are damaged: their scalars do not come first, and once")
        if kind == b"E":
            break
        yield kind, upgrade(kind, payload) if magic == _MAGIC_1 else payload
        at += _HEADER.size + len(payload)
        count += 1
    if payload != _END.pack(count) or file.read(1):
        raise JoinError(f"the saved joins do not end at byte {at} as they should; load an older checkpoint")


def _read_frame(file: BinaryIO, at: int) -> tuple[bytes, bytes]:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise JoinError(f"the saved joins are cut short at byte {at + len(header)}; load an older checkpoint")
    kind, size, crc, own = _HEADER.unpack(header)
    if zlib.crc32(header[:-4]) != own:
        raise JoinError(f"the saved joins are damaged at byte {at}; load an older checkpoint")
    payload = _read(file, size)
    if len(payload) < size:
        raise JoinError(f"the saved joins are cut short at byte {at + _HEADER.size + len(payload)}; load an older one")
    if zlib.crc32(payload) != crc:
        raise JoinError(f"the saved joins are damaged in the frame at byte {at}; load an older checkpoint")
    return kind, payload


def _read(file: BinaryIO, size: int) -> bytes:
    """What a file has of so many bytes. A size that a file claims is not believed: no more is taken than there is."""
    parts = [file.read(min(size, FRAME_BYTES))]
    left = size - len(parts[0])
    while left > 0 and parts[-1]:
        parts.append(file.read(min(left, FRAME_BYTES)))
        left -= len(parts[-1])
    return parts[0] if len(parts) == 1 else b"".join(parts)
