"""The binary form of the journal: pure functions between entries and bytes.

All numbers are little endian. A segment begins with a magic, its step (u64) and the crc32 (u32) of both. An entry is a
mark (4 bytes), payload length (u32), crc32 of length and payload (u32), and the payload: sequence (u64), kind (u8),
time (f64), number of runs (u32), and per run partition (i64), first (i64), end (i64), count (u32), length of the
stream's name (u16), name (UTF-8).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from streams.base import Record
from streams.columns import Records

__all__ = ["Entry", "JournalError", "JournalUnavailableError", "Kind", "Run", "runs_of"]

_MAGIC = b"adaptd-journal-1\n"
_MARK = b"\xad\x9e\xf1\x0a"  # never valid UTF-8, so no name contains it and the next entry can be found behind damage
_SEGMENT = struct.Struct("<QI")
_FRAME = struct.Struct("<4sII")
_ENTRY = struct.Struct("<QBdI")
_RUN = struct.Struct("<qqqIH")
HEADER_BYTES = len(_MAGIC) + _SEGMENT.size


class JournalError(Exception):
    """The journal cannot be written or read; the message names file and byte and says what to do."""


class JournalUnavailableError(JournalError):
    """The disk does not take what is to be written; the journal is as it was, and it may be tried again."""


class Kind(IntEnum):
    """What an entry says was done next."""

    DATA = 1
    """A batch of data records was answered."""
    FEEDBACK = 2
    """A batch of feedback records was taken in."""
    DONE = 3
    """The result of a background job was taken in."""
    RELOAD = 4
    """Another policy was put in place."""
    TICK = 5
    """Time went on without records."""
    SEEN_DATA = 6
    """Data records that somebody else has answered were taken in, so that their feedback finds them."""
    SEEN_FEEDBACK = 7
    """Feedback records that somebody else has learned from were taken in, so that nothing waits for them."""
    TAKEN = 8
    """Partitions came. Their runs have no records: what lies between first and end was seen before."""
    LEFT = 9
    """Partitions went to somebody else, and with them what waited of them. Their runs have no records."""


class Run(NamedTuple):
    """Consecutive records of one partition."""

    stream: str
    partition: int
    first: int
    """Offset of the first record."""
    end: int
    """Position after the last record."""
    count: int  # type: ignore[assignment]  # the word fits; the method of tuples is not needed
    """How many records lie in ``[first, end)``; offsets may have gaps."""


class Entry(NamedTuple):
    """One step of the order in which things happened."""

    sequence: int
    """Number of this entry, one more than that of the entry before."""
    kind: Kind
    now: float
    """The time that everything decided in this step goes by, seconds."""
    runs: tuple[Run, ...] = ()
    """The records, in the order of the rows of the batch."""


def runs_of(records: Sequence[Record]) -> tuple[Run, ...]:
    """Return the runs that records make, in their order.

    A run ends where stream or partition change, or where offsets do not increase.
    """
    came = Records.of(records)
    offsets, ends = came.offsets, came.ends
    return tuple([Run(*at[:2], offsets[at.start], ends[at.stop - 1], at.stop - at.start) for at in came.stretches])


def pack_header(step: int) -> bytes:
    """Return the first bytes of the segment of a step."""
    start = _MAGIC + step.to_bytes(8, "little")
    return start + zlib.crc32(start).to_bytes(4, "little")


def pack_entry(entry: Entry) -> bytes:
    """Return an entry in binary form."""
    sequence, kind, now, runs = entry
    parts = [_ENTRY.pack(sequence, kind, now, len(runs))]
    for stream, partition, first, end, count in runs:
        name = stream.encode()
        parts += (_RUN.pack(partition, first, end, count, len(name)), name)
    payload = b"".join(parts)
    size = len(payload)
    return _FRAME.pack(_MARK, size, _crc(size, payload)) + payload


def _crc(size: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(size.to_bytes(4, "little")))


def frame_at(data: bytes, at: int) -> bytes | None:
    """Return the payload of the entry that begins at a byte, None where no whole and sound entry does."""
    if at + _FRAME.size > len(data):
        return None
    mark, size, crc = _FRAME.unpack_from(data, at)
    payload = data[at + _FRAME.size : at + _FRAME.size + size]
    if mark != _MARK or len(payload) != size or _crc(size, payload) != crc:
        return None
    return payload


def frame_bytes(payload: bytes) -> int:
    """Return how long an entry is in the file, in bytes."""
    return _FRAME.size + len(payload)


def is_sound_after(data: bytes, at: int) -> bool:
    """Say whether any whole and sound entry begins behind a byte."""
    while (at := data.find(_MARK, at + 1)) >= 0:
        if frame_at(data, at) is not None:
            return True
    return False


def unpack_entry(payload: bytes) -> Entry:
    """Return the entry in a payload.

    Raises:
        JournalError: This version does not know what it says.
    """
    try:
        sequence, kind, now, count = _ENTRY.unpack_from(payload)
        at, runs = _ENTRY.size, []
        for _ in range(count):
            partition, first, end, records, size = _RUN.unpack_from(payload, at)
            at += _RUN.size + size
            runs.append(Run(payload[at - size : at].decode(), partition, first, end, records))
        if at != len(payload):
            raise ValueError(f"{len(payload) - at} bytes are left over")
        return Entry(sequence, Kind(kind), now, tuple(runs))
    except (ValueError, struct.error) as error:
        raise JournalError(f"this version cannot read it ({error}); use the version that wrote it") from error
