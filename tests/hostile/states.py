"""What somebody may put into the state of a checkpoint, with every hash and checksum right: only parsers stand there.

Waiting joins, positions and the journal; none may be taken over, and none may cost memory for what it claims.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.keeper import Keeper
from streams.join import JoinStore, Waiting
from streams.join_format import MAGIC, pack_early, pack_settled, read_frames
from streams.journal import Entry, Kind, Run
from streams.journal_format import pack_entry
from tests.engine.cores import make_core
from tests.streams.join_helpers import Feedback

Frames = list[tuple[bytes, bytes]]
HUGE = (2**31 - 1, 2**31, 2**32 - 1)
POSITIONS = {("data", 0): 64, ("feedback", 0): 63}


def keep_joins(directory: Path) -> JoinStore:
    """A store of which some waits on disk."""
    return JoinStore(window=1e6, max_bytes=12_000, max_disk_bytes=1 << 20, directory=directory)


def write(keeper: Keeper, spill: Path) -> None:
    """Make a checkpoint with something of every kind of frame, and a journal behind it."""
    core = make_core()
    core.joins = keep_joins(spill)
    keeper.restore(core)
    core.joins.answered([Waiting(f"e{n}", bytes(16), float(n), "eu", 1, n, 0) for n in range(60)], 60.0)
    core.joins.feedback([Feedback(f"e{n}", 1, time=60.0) for n in (58, 59)], 60.0)
    core.joins.feedback([Feedback(f"f{n}", 1, 0.5, 60.0) for n in range(3)], 60.0)
    keeper.write(keeper.snapshot(core, POSITIONS))
    keeper.append(Entry(1, Kind.DATA, 1.0, (Run("data", 0, 64, 80, 16),)))
    core.joins.close()


def corpus(joins: bytes, meta: bytes, journal: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Names, which file, and what it is to hold, made of good ones; always the same."""
    frames = list(read_frames(io.BytesIO(joins)))
    makers: tuple[tuple[str, Callable[[Frames], Iterator[bytes]]], ...] = (
        ("heads", lambda _: _heads(joins)),
        ("claims of frames", _claimed_frames),
        ("claims of entries", _claimed_entries),
        ("bent payloads", _bent),
        ("wrong kinds", _kinds),
        ("frames twice", _twice),
        ("scalars", _scalars),
    )
    for name, maker in makers:
        yield from ((f"{name} {number}", "join.bin", content) for number, content in enumerate(maker(frames)))
    yield from ((f"positions {n}", "meta.json", content) for n, content in enumerate(_positions(json.loads(meta))))
    yield from ((f"journal {n}", "journal", content) for n, content in enumerate(_journals(journal)))


def _frame(kind: bytes, payload: bytes, size: int | None = None) -> bytes:
    head = struct.pack("<cII", kind, len(payload) if size is None else size, zlib.crc32(payload))
    return head + struct.pack("<I", zlib.crc32(head)) + payload


def _file(frames: Frames, count: int | None = None) -> bytes:
    end = _frame(b"E", struct.pack("<Q", len(frames) if count is None else count))
    return MAGIC + b"".join(_frame(*one) for one in frames) + end


def _with(frames: Frames, kind: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The file with the payload of the first frame of a kind changed."""
    at = [one for one, _ in frames].index(kind)
    return _file([*frames[:at], (kind, change(frames[at][1])), *frames[at + 1 :]])


def _put(form: str, at: int, value: object) -> Callable[[bytes], bytes]:
    packed = struct.pack(form, value)
    return lambda payload: payload[:at] + packed + payload[at + len(packed) :]


def _heads(good: bytes) -> Iterator[bytes]:
    """Files that do not begin, or end, as one does."""
    yield b""
    yield MAGIC
    for magic in (b"adaptd-join-1\n", b"adaptd-join-4\n", b"ADAPTD-JOIN-3\n", b"\x80\x04\x95adaptd-jo\n"):
        yield magic + good[len(MAGIC) :]
    for sixteenths in range(1, 16):
        yield good[: len(good) * sixteenths // 16]
    yield good + b"\0"
    yield good + good
    yield MAGIC + random.Random(0).randbytes(4096)


def _claimed_frames(frames: Frames) -> Iterator[bytes]:
    """Frames that say they are longer than the file, or end before they do; and ends that count wrongly."""
    for at, (kind, payload) in enumerate(frames):
        before = MAGIC + b"".join(_frame(*one) for one in frames[:at])
        for size in (*HUGE, len(payload) + 1, len(payload) - 1, 0):
            yield before + _frame(kind, payload, size)
    for count in (0, len(frames) - 1, len(frames) + 1, 2**64 - 1):
        yield _file(frames, count)
    yield MAGIC + b"".join(_frame(*one) for one in frames)


def _claimed_entries(frames: Frames) -> Iterator[bytes]:
    """Counts and lengths that a payload does not hold, and numbers that are none."""
    for size in HUGE:
        for kind, at in ((b"R", 1), (b"D", 28), (b"D", 32), (b"F", 29), (b"B", 0), (b"B", 4 + 28), (b"B", 4 + 32)):
            yield _with(frames, kind, _put("<I", at, size))
    for count in (0, 1, 2**24):
        yield _with(frames, b"B", _put("<I", 0, count))
    for size in (-2, -(2**31), 2**31 - 1):
        yield _with(frames, b"D", _put("<i", 24, size))
        yield _with(frames, b"B", _put("<i", 4 + 24, size))
    yield _with(frames, b"D", _put("<d", 0, math.nan))
    yield _with(frames, b"B", _put("<d", 4, math.nan))
    for at in (8, 16):
        yield _with(frames, b"F", _put("<d", at, math.nan))
    yield _with(frames, b"F", _put("<d", 8, math.inf))
    for bits in (8, 255):
        yield _with(frames, b"F", _put("<B", 28, bits))
    for how in (3, 255):
        yield _with(frames, b"R", _put("<B", 0, how))


def _bent(frames: Frames) -> Iterator[bytes]:
    """Payloads that are cut, shifted, longer, or not text where they should be."""
    for kind in (b"R", b"D", b"B", b"F"):
        for size in (1, 2, 3):
            yield _with(frames, kind, lambda payload, size=size: payload[:-size])  # type: ignore[misc]
            yield _with(frames, kind, lambda payload, size=size: payload[size:])  # type: ignore[misc]
            yield _with(frames, kind, lambda payload, size=size: payload + bytes(size))  # type: ignore[misc]
        yield _with(frames, kind, lambda payload: payload.replace(b"e5", b"\xff5").replace(b"f0", b"\xff0"))
        yield _with(frames, kind, lambda payload: random.Random(0).randbytes(len(payload)))


def _kinds(frames: Frames) -> Iterator[bytes]:
    """Frames of kinds that there are not, and what belongs to one under the name of another."""
    for kind in (b"X", b"\0", b"s", b"\xff"):
        yield _file([*frames, (kind, b"")])
    payloads = dict(frames)
    for kind in (b"R", b"D", b"W", b"B", b"F"):
        for other, payload in payloads.items():
            if kind != other and {kind, other} != {b"D", b"W"}:
                yield _file([frames[0], (kind, payload)])


def _twice(frames: Frames) -> Iterator[bytes]:
    """The same in two frames, whole or in part, and scalars that are missing, late or there twice."""
    payloads = dict(frames)
    for kind, payload in frames:
        yield _file([*frames, (kind, payload)])
    yield _file([*frames, (b"W", payloads[b"D"])])
    yield _file([frames[0], (b"B", payloads[b"B"]), (b"W", payloads[b"D"]), (b"D", payloads[b"D"])])
    yield _file([*frames, (b"F", pack_early("f1", (1, None, 60.0, 0, False)))])
    yield _file([*frames, (b"R", pack_settled("e59", 1))])
    yield _file(frames[1:])
    yield _file([*frames[1:], frames[0]])
    yield _file([])


def _scalars(frames: Frames) -> Iterator[bytes]:
    """Scalars that are missing, of another kind or of no use."""
    good = json.loads(frames[0][1])
    others: tuple[Any, ...] = (None, [], {}, "x", 5, -1, True, [[]], [[1]], [["0x0p+0", "1"]], [["nan", 1]])
    for name in good:
        for value in (*others, {"joined": None}):
            if not (name == "counts" and value == {}) and not (name == "marks" and value == []):
                yield _json(frames, good | {name: value})
        yield _json(frames, {key: value for key, value in good.items() if key != name})
    for name in ("watermark", "swept"):
        for text in ("nan", "0x1p+99999", "1" * 9_000 + "p9", "\ud800"):
            yield _json(frames, good | {name: text})
    numbers: tuple[Any, ...] = (-1, 2**70, 1.5, "1", True, math.inf, math.nan)
    for count in numbers:
        yield _json(frames, good | {"counts": good["counts"] | {"joined": count}})
    for count in (2**70, -(2**70), 1.5, None, True):
        yield _json(frames, good | {"marks": [["0x0p+0", count]]})
    for raw in (b"", b"[" * 100_000, b'{"a":' * 100_000, b"null", b"\xff", b"1" * 9_000, b"\x80\x04."):
        yield _with(frames, b"S", lambda payload, raw=raw: raw)  # type: ignore[misc]


def _json(frames: Frames, scalars: object) -> bytes:
    return _with(frames, b"S", lambda payload: json.dumps(scalars).encode())


def _positions(meta: dict[str, Any]) -> Iterator[bytes]:
    """Positions that are none, in both places where there are some."""
    rows: tuple[Any, ...] = (
        *([["data", 0, offset]] for offset in (-1, -(2**63), 2**63, 2**64, 10**400, 1.0, 1e300, "1", None, True, [1])),
        *([["data", number, 1]] for number in (-1, 2**63, 10**400, 0.0, "0", None, False, [0])),
        *([[stream, 0, 1]] for stream in (1, None, True, ["data"], {"data": 0})),
        *([["data", 0, 1], ["data", 0, other]] for other in (1, 2)),
        *(None, {}, {"data": 0}, "data", 5, [1], [None], ["data"], [[]], [{}], [["data", 0]], [["data", 0, 1, 2]]),
    )
    for value in rows:
        yield json.dumps(meta | {"positions": value}).encode()
        yield json.dumps(meta | {"membership": {"taken": value}}).encode()
    yield json.dumps({key: value for key, value in meta.items() if key != "positions"}).encode()
    for value in (None, [], "x", 5):
        for key in ("membership", "identities", "form"):
            yield json.dumps(meta | {key: value}).encode()
    good = ["data", 0, [1], ["0x1p+0"]]
    values: tuple[object, ...] = (None, 1.5, -1, "x", {}, [None], ["x"], [[]], [1, 2], ["nan"])
    bent = [_bend(good, at, value) for at in range(4) for value in values if (at, value) != (0, "x")]
    listed: list[Any] = [None, 5, {}, [1], [None], [[]], [good[:3]], [[*good, 1]], *([row] for row in bent)]
    for marks in listed:
        yield json.dumps(meta | {"membership": {"marks": marks}}).encode()


def _bend(row: list[Any], at: int, value: object) -> list[Any]:
    return [*row[:at], value, *row[at + 1 :]]


def _journals(good: bytes) -> Iterator[bytes]:
    """Entries whose checksum fits, and that hold less or other than they say."""
    whole = pack_entry(Entry(1, Kind.DATA, 1.0, (Run("data", 0, 64, 80, 16),)))
    assert good.endswith(whole)
    payload = whole[12:]
    bent = [_put("<I", 17, count)(payload) for count in (0, 2, *HUGE)]
    bent += [_put("<H", 21 + 28, size)(payload) for size in (0, 3, 5, 2**16 - 1)]
    bent += [_put("<B", 8, kind)(payload) for kind in (0, 10, 255)]
    bent += [payload[:-1], payload + b"\0", payload[:-4] + b"\xff\xfe\xfd\xfc", payload[:20], b""]
    for one in bent:
        size = len(one).to_bytes(4, "little")
        framed = whole[:4] + size + zlib.crc32(one, zlib.crc32(size)).to_bytes(4, "little") + one
        yield good.removesuffix(whole) + framed
