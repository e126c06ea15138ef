"""Records that somebody made to harm a reader: none of them may become an event."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Iterator

import numpy as np

from streams.codec import encode_event

GOOD = {"id": "a", "time": 5, "inputs": [1.0, 2.0, 3.0, 4.0]}
TEXT = json.dumps(GOOD).encode()
BINARY = encode_event("ab", np.ones(4, np.float32), 1.0, "g")


def corpus() -> Iterator[tuple[str, bytes]]:
    """Names and values, always the same."""
    for maker in (_cut, _claims, _numbers, _nested, _headers, _words, _noise):
        for number, value in enumerate(maker()):
            yield f"{maker.__name__[1:]} {number}", value


def _with(**fields: object) -> bytes:
    return json.dumps(GOOD | fields).encode()


def _cut() -> Iterator[bytes]:
    """What is left of a good record."""
    for end in range(1, len(TEXT), 4):
        yield TEXT[:end]
    for end in range(1, len(BINARY), 5):
        yield BINARY[:end]


def _claims() -> Iterator[bytes]:
    """Promises of much more than there is: whoever allocates first and counts afterwards is lost."""
    data = base64.b64encode(b"\0" * 16).decode()
    for shape in ([2**40], [2**31, 2**31], [2**62, 4], [1] * 64, [0], [-4], [2**64], [4, 2**33]):
        yield _with(inputs={"dtype": "float32", "shape": shape, "data": data})
    for size in (2**31, 2**32 - 1, 2**24, 5, 3, 0):
        yield BINARY[:32] + struct.pack("<I", size) + BINARY[36:]
    for dimensions in (2, 3, 8, 32, 128, 255):
        yield BINARY[:7] + bytes([dimensions]) + BINARY[8:]
        yield BINARY[:7] + bytes([dimensions]) + BINARY[8:32] + struct.pack("<I", 2**32 - 1) * dimensions
    for at in (10, 12):
        for length in (0xFFFF, 0x8000, 129):
            yield BINARY[:at] + struct.pack("<H", length) + BINARY[at + 2 :]


def _numbers() -> Iterator[bytes]:
    """Numbers that are none, or too large for what they are to become."""
    for number in (
        "1e999",
        "-1e999",
        "1e39",
        "9" * 400,
        "0x10",
        "1_000",
        "+1",
        ".5",
        "01",
        "NaN",
        "Infinity",
        "1e",
        "--1",
    ):
        yield TEXT.replace(b"2.0", number.encode())
        yield TEXT.replace(b'"time": 5', b'"time": ' + number.replace("1e39", "1e400").encode())


def _nested() -> Iterator[bytes]:
    for depth in (33, 1_000, 100_000):
        yield TEXT[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
        yield TEXT[:-1] + b', "x": ' + b'{"y":' * depth + b"1" + b"}" * depth + b"}"
        yield b"[" * depth


def _headers() -> Iterator[bytes]:
    """A good binary record with one byte of its head changed to what it must not be."""
    for at, values in {
        0: (0, 0x7B, 0xFF),
        1: (0,),
        2: (0,),
        3: (0,),
        4: (0, 2, 255),
        5: (0, 7, 255),
        6: (9, 200),
    }.items():
        for value in values:
            yield BINARY[:at] + bytes([value]) + BINARY[at + 1 :]
    for time in (float("nan"), float("inf"), float("-inf")):
        yield BINARY[:16] + struct.pack("<d", time) + BINARY[24:]


def _words() -> Iterator[bytes]:
    """Text where other text belongs."""
    names: tuple[object, ...] = ("", "x" * 129, "\ud800", 7, None, [], {}, True)
    for name in names:
        yield _with(id=name)
    several: tuple[object, ...] = (
        "abc",
        None,
        {},
        [],
        [[1, 2, 3, 4]],
        [1, 2, 3],
        [1, 2, 3, "4"],
        [1, 2, 3, None],
        [1, 2, 3, {}],
    )
    for inputs in several:
        yield _with(inputs=inputs)
    for code in ("utf-16", "utf-32"):
        yield json.dumps(GOOD).encode(code)
    for key in ("id", "time", "inputs"):
        yield TEXT[:-1] + f', "{key}": 1}}'.encode()
    yield from (b"\x80\x04\x95cposix\nsystem\n", b"PK\x03\x04", b"\x1f\x8b\x08", b"!!python/object:os.system")


def _noise() -> Iterator[bytes]:
    source = random.Random(0)
    for size in (1, 7, 64, 1_000, 100_000):
        yield source.randbytes(size)
        yield BINARY[:8] + source.randbytes(size)
        yield TEXT[:10] + source.randbytes(size)
