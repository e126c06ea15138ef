import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.base import Found, Message, Partition, Positions, Record, StreamError
from streams.files import FileSink, FileSource
from streams.framing import MAGIC, FrameError, Origin, frame_of, split_frames


class Start:
    def __init__(self, positions: Positions | None = None) -> None:
        self.positions = positions or {}
        self.partitions: list[Partition] = []

    def assigned(self, partitions: Mapping[Partition, Found]) -> Positions:
        self.partitions = list(partitions)
        return self.positions

    def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> None:
        raise AssertionError("files are never taken away")


def read(source: FileSource, positions: Positions | None = None, at_once: int = 3) -> list[Record]:
    source.open(Start(positions))
    records = drain(source, at_once)
    source.close()
    return records


def drain(source: FileSource, at_once: int = 3) -> list[Record]:
    records: list[Record] = []
    while part := source.poll(at_once, 0):
        records += part
    return records


def values(records: list[Record]) -> list[bytes]:
    return [record.value for record in records]


def rec(*payloads: bytes) -> bytes:
    return MAGIC + b"".join(map(frame_of, payloads))


def test_lines_are_records_with_byte_offsets_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n\n \r\ntwo\nlast without its feed")
    records = read(FileSource({"data": path}))
    assert [record[:4] for record in records] == [("data", 0, 0, 4), ("data", 0, 8, 12), ("data", 0, 12, 33)]
    assert values(records) == [b"one", b"two", b"last without its feed"]
    assert all(record.timestamp != record.timestamp for record in records)


def test_frames_are_records_after_the_magic(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(rec(b"one", b"\n\n", b"x" * 3_000_000))
    records = read(FileSource({"data": path}))
    assert [(record.offset, record.end) for record in records[:2]] == [(8, 19), (19, 29)]
    assert values(records) == [b"one", b"\n\n", b"x" * 3_000_000]


@given(
    st.lists(st.binary(min_size=1, max_size=30).filter(lambda value: b"\n" not in value and not value.isspace())),
    st.sampled_from([".jsonl", ".rec"]),
)
def test_reading_from_the_end_of_any_record_gives_the_rest(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("ends") / f"a{suffix}"
    path.write_bytes(rec(*payloads) if suffix == ".rec" else b"".join(p + b"\n" for p in payloads))
    records = read(FileSource({"data": path}))
    assert values(records) == payloads
    for index, record in enumerate(records):
        assert read(FileSource({"data": path}), {("data", 0): record.end}) == records[index + 1 :]
        assert read(FileSource({"data": path}), {("data", 0): record.offset}) == records[index:]


def test_a_line_longer_than_a_block_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 2_500_000 + b"\nshort\n")
    assert [len(value) for value in values(read(FileSource({"data": path})))] == [2_500_000, 5]


def test_several_streams_are_read_in_turn_and_each_in_order(tmp_path: Path) -> None:
    for name in ("data", "feedback"):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(b"%d\n" % number for number in range(10)))
    source = FileSource({name: tmp_path / f"{name}.jsonl" for name in ("data", "feedback")})
    source.open(Start())
    first = source.poll(4, 0)
    assert sorted(record.stream for record in first) == ["data", "data", "feedback", "feedback"]
    records = [*first, *drain(source)]
    for name in ("data", "feedback"):
        assert [int(record.value) for record in records if record.stream == name] == list(range(10))
    assert source.ended() == {("data", 0), ("feedback", 0)}
    source.close()


def test_a_poll_is_filled_by_the_other_stream_when_one_runs_dry(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n" * 9)
    (tmp_path / "b.jsonl").write_bytes(b"2\n")
    source = FileSource({"a": tmp_path / "a.jsonl", "b": tmp_path / "b.jsonl"})
    source.open(Start())
    assert len(source.poll(10, 0)) == 10
    assert {stream for stream, _ in source.ended()} == {"a", "b"}
    source.close()


def test_a_paused_stream_gives_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    (tmp_path / "b.jsonl").write_bytes(b"2\n")
    source = FileSource({"a": tmp_path / "a.jsonl", "b": tmp_path / "b.jsonl"})
    source.open(Start())
    source.pause(["a"])
    assert values(drain(source)) == [b"2"]
    assert {stream for stream, _ in source.ended()} == {"b"}
    source.resume(["a"])
    assert values(drain(source)) == [b"1"]
    source.close()


def test_files_of_a_folder_are_partitions_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.rec").write_bytes(rec(b"second"))
    (folder / "a.jsonl").write_bytes(b"first\n")
    (folder / "notes.txt").write_bytes(b"no\n")
    start = Start()
    source = FileSource({"data": folder})
    source.open(start)
    assert start.partitions == [("data", 0), ("data", 1)]
    assert {record.partition: record.value for record in drain(source)} == {0: b"first", 1: b"second"}
    source.close()


def test_a_file_keeps_its_number_when_another_is_added(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "m.jsonl").write_bytes(b"old\n")
    source = FileSource({"data": folder}, state=tmp_path / "state")
    source.open(Start())
    source.commit({("data", 0): 4})
    source.close()
    (folder / "a.jsonl").write_bytes(b"new\n")
    records = read(FileSource({"data": folder}, state=tmp_path / "state"))
    assert [(record.partition, record.value) for record in records] == [(1, b"new")]


def test_committed_positions_survive_and_a_given_position_outranks_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    source = FileSource({"data": path}, state=tmp_path / "state")
    source.open(Start())
    assert source.committed() == {}
    source.commit({("data", 0): 4, ("gone", 0): 9})
    source.close()
    again = FileSource({"data": path}, state=tmp_path / "state")
    assert values(read(again)) == [b"two"]
    assert values(read(again, {("data", 0): 0})) == [b"one", b"two"]
    again.open(Start())
    assert again.committed() == {("data", 0): 4}
    again.close()


def test_lag_is_in_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    source = FileSource({"data": path})
    source.open(Start())
    assert source.lag() == {("data", 0): 8}
    source.poll(1, 0)
    assert source.lag() == {("data", 0): 4}
    source.close()
    source.close()


def test_a_torn_frame_at_the_end_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(rec(b"one", b"two")[:-1])
    source = FileSource({"data": path})
    source.open(Start())
    assert values(drain(source)) == [b"one"]
    assert source.torn == 10
    assert {stream for stream, _ in source.ended()} == {"data"}
    source.close()


def test_a_damaged_frame_is_named_with_its_byte_after_what_comes_before(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    whole = bytearray(rec(b"one", b"two", b"three"))
    whole[19 + 8] ^= 1
    path.write_bytes(whole)
    source = FileSource({"data": path})
    source.open(Start())
    assert values(list(source.poll(9, 0))) == [b"one"]
    with pytest.raises(StreamError, match=r"a\.rec is damaged at byte 19"):
        source.poll(9, 0)
    source.close()


def test_zeros_and_absurd_sizes_are_no_frames() -> None:
    for header in (bytes(8), struct.pack("<II", 2**31, 0)):
        with pytest.raises(FrameError, match="announces"):
            split_frames(header, Origin("s", 0, 0, 8), [])
    assert zlib.crc32(b"") == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.rec", b"{}\n{}\n{}\n", "does not begin as a .rec file"),
        ("a.csv", b"1,2\n", "a stream is a .jsonl, .rec or .npz file"),
        ("missing.jsonl", None, "does not exist"),
        ("missing", None, "a stream is a .jsonl, .rec or .npz file"),
    ],
)
def test_what_is_no_stream_is_refused_with_a_sentence(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StreamError, match=message):
        read(FileSource({"data": tmp_path / name}))


def test_a_folder_without_streams_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="holds no file"):
        read(FileSource({"data": tmp_path}))


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(StreamError, match="not an ordinary file"):
        read(FileSource({"data": tmp_path / "a.jsonl"}))


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"version": 2, "partitions": []}', b"\xff"])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    (tmp_path / "offsets.json").write_bytes(content)
    with pytest.raises(StreamError, match=r"offsets\.json is not a file of offsets"):
        read(FileSource({"data": tmp_path / "a.jsonl"}, state=tmp_path))


def test_a_position_inside_a_line_or_past_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    with pytest.raises(StreamError, match="inside a line"):
        read(FileSource({"data": path}), {("data", 0): 2})
    with pytest.raises(StreamError, match="ends at offset 8, before offset 9"):
        read(FileSource({"data": path}), {("data", 0): 9})


def test_reading_goes_on_after_a_last_line_that_got_its_feed_later(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo")
    end = read(FileSource({"data": path}))[-1].end
    path.write_bytes(b"one\ntwo\nthree\n")
    assert values(read(FileSource({"data": path}), {("data", 0): end})) == [b"three"]


def test_a_bounded_file_that_was_replaced_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\ntwo\n")
    source = FileSource({"data": path}, state=tmp_path / "state")
    source.open(Start())
    source.commit({("data", 0): 4})
    source.close()
    path.write_bytes(b"ene\nmene\nmu\n")
    with pytest.raises(StreamError, match="is gone, or was replaced"):
        read(FileSource({"data": path}, state=tmp_path / "state"))


def test_what_a_sink_writes_a_source_reads(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.rec"):
        sink = FileSink(tmp_path / name)
        sink.open()
        sink.send([Message(b"k", b"one"), Message(None, b"two")])
        sink.flush(1)
        assert values(read(FileSource({"data": tmp_path / name}))) == [b"one", b"two"]
        sink.close()
