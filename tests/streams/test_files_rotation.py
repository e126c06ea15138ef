import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import StreamError
from streams.files import FileSource
from streams.framing import MAGIC, frame_of
from tests.streams.test_files import Start, drain, read, values


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def followed(path: Path, state: Path | None = None) -> FileSource:
    source = FileSource({"data": path}, follow=True, state=state)
    source.open(Start())
    return source


def test_a_followed_file_gives_lines_as_they_are_finished(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    source = followed(path)
    assert not source.bounded
    assert drain(source) == []
    append(path, b"one\ntw")
    assert values(drain(source)) == [b"one"]
    append(path, b"o\n")
    assert values(drain(source)) == [b"two"]
    assert source.ended() == frozenset()
    source.close()


def test_a_followed_frame_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    source = followed(path)
    whole = MAGIC + frame_of(b"one") + frame_of(b"two")
    for at in range(len(whole)):
        append(path, whole[at : at + 1])
        records = drain(source)
        assert values(records) == {18: [b"one"], 29: [b"two"]}.get(at, [])
    assert source.torn == 0
    source.close()


def test_a_renamed_file_is_read_to_its_end_before_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, b"one\n")
    source = followed(path)
    assert values(drain(source)) == [b"one"]
    append(path, b"two\n")
    path.rename(tmp_path / "a.jsonl.1")
    assert values(drain(source)) == [b"two"]
    append(tmp_path / "a.jsonl.1", b"three\n")
    append(path, b"")
    assert values(drain(source)) == [b"three"]
    append(tmp_path / "a.jsonl.1", b"four\nunfinished")
    append(path, b"five\n")
    records = drain(source)
    assert values(records) == [b"four", b"unfinished", b"five"]
    assert [record.offset for record in records] == [14, 19, 29]
    source.close()


def test_a_torn_frame_in_a_rotated_file_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    append(path, MAGIC + frame_of(b"one") + b"torn")
    source = followed(path)
    assert values(drain(source)) == [b"one"]
    path.rename(tmp_path / "a.rec.1")
    append(path, MAGIC + frame_of(b"two"))
    [record] = drain(source)
    assert (record.value, record.offset) == (b"two", 23 + 8)
    assert source.torn == 4
    source.close()


def test_a_copied_and_truncated_file_goes_on_with_increasing_offsets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, b"one\ntwo\n")
    source = followed(path)
    drain(source)
    shutil.copy(path, tmp_path / "a.jsonl.1")
    path.write_bytes(b"")
    assert drain(source) == []
    append(path, b"three\n")
    [record] = drain(source)
    assert (record.value, record.offset, record.end) == (b"three", 8, 14)
    assert source.lag() == {("data", 0): 0}
    source.close()


def test_a_truncated_file_that_grew_past_the_old_end_is_noticed_by_what_it_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, b"one\n")
    source = followed(path)
    drain(source)
    path.write_bytes(b"longer than before\nand more\n")
    assert values(drain(source)) == [b"longer than before", b"and more"]
    source.close()


def test_several_files_rotated_between_two_looks_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append(path, b"one\n")
    source = followed(path)
    drain(source)
    for number, line in ((2, b"two\n"), (1, b"three\n")):
        path.rename(tmp_path / f"a.jsonl.{number + 1}")
        append(path, line)
    assert values(drain(source)) == [b"two", b"three"]
    source.close()


@pytest.mark.parametrize("way", ["rename", "copy"])
def test_a_restart_after_rotation_finds_any_older_position(tmp_path: Path, way: str) -> None:
    path, state = tmp_path / "a.jsonl", tmp_path / "state"
    append(path, b"one\ntwo\n")
    source = followed(path, state)
    records = drain(source)
    rotate(path, tmp_path / "a.jsonl.1", way)
    append(path, b"three\nfour\n")
    records += drain(source)
    source.commit({("data", 0): records[2].end})
    source.close()
    rotate(path, tmp_path / "a.jsonl.2", way)
    append(path, b"five\n")
    records += drain(source := followed(path, state))[1:]
    source.close()
    assert values(records) == [b"one", b"two", b"three", b"four", b"five"]
    for index, record in enumerate(records):
        again = FileSource({"data": path}, follow=True, state=state)
        assert read(again, {("data", 0): record.end}) == records[index + 1 :]


def rotate(path: Path, old: Path, way: str) -> None:
    if way == "rename":
        path.rename(old)
    else:
        shutil.copy(path, old)
        path.write_bytes(b"")


def test_a_rotated_file_that_is_gone_after_a_restart_is_an_error(tmp_path: Path) -> None:
    path, state = tmp_path / "a.jsonl", tmp_path / "state"
    append(path, b"one\ntwo\n")
    source = followed(path, state)
    source.commit({("data", 0): 4})
    source.close()
    path.unlink()
    append(path, b"other\n")
    with pytest.raises(StreamError, match=r"held offset 0 and up is gone, or was replaced"):
        followed(path, state)


def test_a_file_that_shrank_before_a_restart_is_an_error(tmp_path: Path) -> None:
    path, state = tmp_path / "a.jsonl", tmp_path / "state"
    append(path, b"one\ntwo\n")
    source = followed(path, state)
    source.commit({("data", 0): 8})
    source.close()
    path.write_bytes(b"one\n")
    with pytest.raises(StreamError, match="is gone, or was replaced"):
        followed(path, state)


STEPS = st.lists(st.sampled_from(["write", "half", "rename", "poll", "restart"]), max_size=25)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_order_of_writing_rotating_and_restarting_loses_and_repeats_nothing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    source = followed(path, path.parent / "state")
    written: list[bytes] = []
    seen = []
    rest = b""
    for index, step in enumerate([*steps, "write", "poll"]):
        if step in ("write", "half") and not rest:
            written.append(b"line %d" % index)
            append(path, written[-1][:3])
            rest = written[-1][3:] + b"\n"
        if step == "write":
            append(path, rest)
            rest = b""
        elif step == "rename" and path.exists() and not rest:
            seen += drain(source)  # modification times order files only when they differ
            path.rename(path.with_name(f"a.jsonl.{index}"))
        elif step == "poll":
            seen += drain(source)
        elif step == "restart":
            source.commit({("data", 0): seen[-1].end} if seen else {})
            source.close()
            source = followed(path, path.parent / "state")
    source.close()
    assert values(seen) == written
    ends = [record.end for record in seen]
    assert all(before <= record.offset for before, record in zip(ends, seen[1:], strict=False))
