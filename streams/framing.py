"""How a file is cut into records: lines of JSONL, and frames of ``.rec``.

A ``.rec`` file begins with the eight bytes of `MAGIC`. A frame follows another without padding::

    offset  size  field
    0       4     length of the payload in bytes, u32 little-endian, at least 1
    4       4     CRC-32 of the payload (zlib), u32 little-endian
    8             payload

An empty payload is not allowed, so a run of zeros left by a crash is never taken for frames.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from streams.base import Record, StreamError

MAGIC: Final = b"ADREC\x00\x00\x01"

MAX_PAYLOAD: Final = 64 * 1024 * 1024
"""Longest line or payload that is read, in bytes. What is longer means a damaged file, and memory must stay bounded."""

_FRAME: Final = struct.Struct("<II")


class FrameError(Exception):
    """A file is damaged.

    Attributes:
        at: Byte in the buffer where the damage was found.
        message: What is wrong.
    """

    def __init__(self, at: int, message: str) -> None:
        super().__init__(at, message)
        self.at = at
        self.message = message


class Origin(NamedTuple):
    """Where a buffer of a file lies."""

    stream: str
    partition: int
    base: int
    """Offset of the first byte of the file."""
    byte: int
    """Byte of the file where the buffer begins."""


Split = Callable[[bytes, Origin, list[Record]], int]
"""Append the whole records of a buffer to a list and return how many bytes of it they take."""


def split_lines(buffer: bytes, origin: Origin, records: list[Record]) -> int:
    """Cut lines; the line feed is not part of the value, and blank lines are skipped.

    Raises:
        FrameError: A line is longer than `MAX_PAYLOAD`.
    """
    stream, partition, base, byte = origin
    whole = buffer.rfind(b"\n") + 1
    if len(buffer) - whole > MAX_PAYLOAD:
        raise FrameError(whole, f"a line is longer than {MAX_PAYLOAD} bytes")
    start = base + byte
    for line in buffer[:whole].split(b"\n")[:-1]:
        end = start + len(line) + 1
        if line and not line.isspace():
            records.append(Record(stream, partition, start, end, math.nan, None, line))
        start = end
    return whole


def split_frames(buffer: bytes, origin: Origin, records: list[Record]) -> int:
    """Cut frames, after the magic where the buffer begins the file.

    Raises:
        FrameError: The file is not a ``.rec`` file, or a frame is damaged.
    """
    stream, partition, base, byte = origin
    size = len(buffer)
    shift = base + byte
    at = 0
    if byte == 0:
        if not buffer.startswith(MAGIC[:size]):
            raise FrameError(0, "it does not begin as a .rec file does")
        if size < len(MAGIC):
            return 0
        at = len(MAGIC)
    unpack, crc_of, make, nan = _FRAME.unpack_from, zlib.crc32, Record, math.nan  # looked up once, not per frame
    while at + 8 <= size:
        length, crc = unpack(buffer, at)
        if not 0 < length <= MAX_PAYLOAD:
            raise FrameError(at, f"a frame announces {length} bytes, 1 to {MAX_PAYLOAD} are possible")
        end = at + 8 + length
        if end > size:
            break
        payload = buffer[at + 8 : end]
        if crc_of(payload) != crc:
            raise FrameError(at, "a frame does not match its checksum")
        records.append(make(stream, partition, shift + at, shift + end, nan, None, payload))
        at = end
    return at


_SPLITS: Final[dict[str, Split]] = {".jsonl": split_lines, ".rec": split_frames}
SUFFIXES: Final = tuple(_SPLITS)


def split_of(path: Path) -> Split:
    """Return how files of this name are cut.

    Raises:
        StreamError: The name ends in nothing known.
    """
    split = _SPLITS.get(path.suffix)
    if split is None:
        raise StreamError(f"{path}: the name of a stream must end in .jsonl or .rec, not {path.suffix or 'nothing'}")
    return split


def line_of(value: bytes) -> bytes:
    """Return the line that holds the value.

    Raises:
        ValueError: The value is blank or has a line feed in it, so it cannot be one line.
    """
    if b"\n" in value:
        raise ValueError("a value with a line feed cannot be a line of .jsonl; write it to a .rec file")
    if not value or value.isspace():
        raise ValueError("an empty value cannot be a line of .jsonl")
    return value + b"\n"


def frame_of(value: bytes) -> bytes:
    """Return the frame that holds the value.

    Raises:
        ValueError: The value is empty or longer than `MAX_PAYLOAD`.
    """
    return frames_of([value])


def frames_of(values: Sequence[bytes]) -> bytes:
    """Return the frames that hold the values, one after another.

    Raises:
        ValueError: A value is empty or longer than `MAX_PAYLOAD`.
    """
    sizes = list(map(len, values))
    for size in sizes:
        if not 0 < size <= MAX_PAYLOAD:
            raise ValueError(f"a frame holds 1 to {MAX_PAYLOAD} bytes, not {size}")
    heads = map(_FRAME.pack, sizes, map(zlib.crc32, values))
    return b"".join(chain.from_iterable(zip(heads, values, strict=True)))
