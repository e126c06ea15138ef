from __future__ import annotations

import io
import json
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.join import JoinError, JoinStore
from streams.join_format import write_frames
from tests.streams.join_helpers import Feedback, counted, event, names, saved


def opened(directory: Path) -> JoinStore:
    return JoinStore(window=10.0, max_bytes=20_000, max_disk_bytes=1 << 20, directory=directory)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JoinStore]:
    store = opened(tmp_path / "first")
    yield store
    store.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[JoinStore]:
    store = opened(tmp_path / "other")
    yield store
    store.close()


def fill(store: JoinStore) -> None:
    store.feedback([Feedback("early", 2, 0.5, 1.0), Feedback("gone", inputs=b"i")], 1.0)
    store.answered([event(f"e{i}", 1.0, inputs=bytes([i]) * 500, group="eu") for i in range(60)], 1.0)


def test_restored_store_holds_all_that_was_saved(store: JoinStore, other: JoinStore) -> None:
    fill(store)
    other.answered([event("replaced")], 0.0)
    other.restore(io.BytesIO(saved(store)))
    assert (other.pending, other.early, other.counts) == (60, 1, store.counts)
    assert (other.bytes, other.disk_bytes) == (store.bytes, store.disk_bytes)
    assert other.disk_bytes > 0
    assert names(other.feedback([Feedback(f"e{i}", time=1.0) for i in (59, 0)], 1.0)) == ["e59", "e0"]
    assert other.feedback([Feedback("gone")], 1.0) == []
    assert [item.reward for item in other.answered([event("early", 1.0)], 1.0)] == [0.5]
    assert counted(other)["duplicate"] == 1


def test_snapshot_keeps_its_instant_while_the_store_goes_on(store: JoinStore) -> None:
    fill(store)
    state = saved(store)
    snapshot = store.snapshot()
    store.feedback([Feedback(f"e{i}", time=1.0) for i in range(60)], 1.0)
    store.answered([event(f"n{i}", 1.0, inputs=bytes(700)) for i in range(60)], 1.0)
    store.answered([], 50.0)
    file = io.BytesIO()
    writer = threading.Thread(target=snapshot.write, args=(file,))
    writer.start()
    writer.join()
    assert file.getvalue() == state


def test_snapshot_that_is_not_written_can_be_closed(store: JoinStore) -> None:
    fill(store)
    snapshot = store.snapshot()
    snapshot.close()
    snapshot.close()
    assert store.pending == 60


def test_state_of_a_store_with_a_disk_fits_one_without_as_far_as_its_memory_goes(store: JoinStore) -> None:
    fill(store)
    small = JoinStore(window=10.0, max_bytes=20_000)
    small.restore(io.BytesIO(saved(store)))
    assert small.bytes <= 20_000
    assert 0 < small.pending < 60
    assert small.pending + small.counts["evicted"] == 60
    assert names(small.feedback([Feedback("e59", time=1.0), Feedback("e0", time=1.0)], 1.0)) == ["e59"]


def test_smaller_disk_bound_evicts_the_oldest_at_once(store: JoinStore, tmp_path: Path) -> None:
    fill(store)
    small = JoinStore(window=10.0, max_bytes=20_000, max_disk_bytes=8_000, directory=tmp_path / "small")
    small.restore(io.BytesIO(saved(store)))
    assert 0 < small.disk_bytes <= 8_000
    assert small.pending + small.counts["evicted"] == 60
    small.close()


def test_truncation_anywhere_is_refused_and_leaves_the_store_empty(store: JoinStore, other: JoinStore) -> None:
    store.feedback([Feedback("early", 2, 0.5, 1.0)], 1.0)
    store.answered([event(f"e{i}", 1.0, inputs=bytes(500)) for i in range(40)], 1.0)
    state = saved(store)
    assert store.disk_bytes > 0
    for size in [*range(700), *range(700, len(state), 211), len(state) - 1]:
        with pytest.raises(JoinError, match="saved joins"):
            other.restore(io.BytesIO(state[:size]))
        assert (other.pending, other.early, other.bytes, other.disk_bytes) == (0, 0, 0, 0)
        assert counted(other) == {}


def test_any_flipped_bit_is_noticed(other: JoinStore) -> None:
    store = JoinStore(window=10.0, max_bytes=20_000)
    store.feedback([Feedback("early", 2, 0.5, 1.0), Feedback("gone", inputs=b"i")], 1.0)
    store.answered([event("a", 1.0, group="eu")], 1.0)
    state = saved(store)
    for at in range(len(state)):
        damaged = bytearray(state)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(JoinError, match="saved joins"):
            other.restore(io.BytesIO(damaged))


def test_sound_frames_with_senseless_contents_are_refused(other: JoinStore) -> None:
    for kind, payload in ((b"X", b""), (b"S", b"{}"), (b"S", b"[]"), (b"W", b"\0" * 9), (b"R", b"\x09\0\0\0\0")):
        file = io.BytesIO()
        write_frames(file, [(kind, payload)])
        file.seek(0)
        with pytest.raises(JoinError, match="saved joins"):
            other.restore(file)
        assert counted(other) == {}


def test_bytes_behind_the_end_are_refused(store: JoinStore, other: JoinStore) -> None:
    with pytest.raises(JoinError, match="do not end"):
        other.restore(io.BytesIO(saved(store) + b"\0"))


def test_errors_of_the_file_pass_through(store: JoinStore) -> None:
    fill(store)
    file = io.BytesIO()
    file.close()
    with pytest.raises(ValueError, match="closed file"):
        store.snapshot().write(file)


def test_what_version_one_wrote_is_read_and_names_no_partitions() -> None:
    def frame(kind: bytes, payload: bytes) -> bytes:
        header = struct.pack("<cII", kind, len(payload), zlib.crc32(payload))
        return header + struct.pack("<I", zlib.crc32(header)) + payload

    scalars = {"watermark": (5.0).hex(), "swept": (5.0).hex(), "counts": {"early": 1}, "marks": []}
    entries = (
        struct.pack("<dqqiII", 4.0, 2, 9, -1, 2, 3) + b"e1abc" + struct.pack("<dqqiII", 4.5, 1, 9, 2, 2, 1) + b"e2eux"
    )
    early = struct.pack("<qddBI", 1, 0.0, 5.0, 1, 2) + b"e3"
    frames = [(b"S", json.dumps(scalars).encode()), (b"W", entries), (b"F", early), (b"E", struct.pack("<Q", 3))]
    store = JoinStore(window=10.0, max_bytes=1 << 20)
    store.restore(io.BytesIO(b"adaptd-join-1\n" + b"".join(frame(*one) for one in frames)))
    assert (store.pending, store.early, store.counts["early"]) == (2, 1, 1)
    assert store.drop(range(4), range(4)) == 0
    joined = store.feedback([Feedback("e1", time=5.0), Feedback("e2", time=5.0)], 5.0)
    assert [(one.id, one.inputs, one.group, one.predicted) for one in joined] == [
        ("e1", b"abc", None, 2),
        ("e2", b"x", "eu", 1),
    ]
    assert names(store.answered([event("e3", 5.0)], 5.0)) == ["e3"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_waits_of_a_partition_is_dropped_wherever_it_lies(on_disk: bool, tmp_path: Path) -> None:
    store = JoinStore(
        window=10.0, max_bytes=4000, max_disk_bytes=1 << 22 if on_disk else 0, directory=tmp_path if on_disk else None
    )
    store.answered([event(f"e{n}", 1.0)._replace(partition=n % 2) for n in range(40 if on_disk else 6)], 1.0)
    store.feedback([Feedback("early", time=1.0)], 1.0)
    before = store.pending
    assert (store.disk_bytes > 0) is on_disk
    assert store.drop({1}, {0}) == before // 2 + 1
    assert (store.pending, store.early, store.counts["moved"]) == (before - before // 2, 0, before // 2 + 1)
    assert {f"e{n}" for n in range(1, 6, 2)}.isdisjoint(names(store.feedback([Feedback("e1"), Feedback("e3")], 1.0)))
    store.close()
