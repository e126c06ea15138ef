import json
import os
import stat
from pathlib import Path

import pytest

from streams.base import Message, Record, StreamError, StreamUnavailableError
from streams.codec import dead_letter
from streams.files import FileSink, open_envelope
from streams.framing import MAGIC, frame_of


def messages(*values: bytes) -> list[Message]:
    return [Message(None, value) for value in values]


def opened(path: Path, *, envelope: bool = False, fsync: bool = True) -> FileSink:
    sink = FileSink(path, envelope=envelope, fsync=fsync)
    sink.open()
    return sink


@pytest.mark.parametrize(
    ("name", "whole"), [("a.jsonl", b"one\ntwo\n"), ("a.rec", MAGIC + frame_of(b"one") + frame_of(b"two"))]
)
def test_a_torn_last_record_is_cut_off_and_counted_wherever_it_is_torn(tmp_path: Path, name: str, whole: bytes) -> None:
    path = tmp_path / name
    start = len(whole) - len(frame_of(b"two") if name == "a.rec" else b"two\n")
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        sink = opened(path)
        sink.send(messages(b"two"))
        sink.close()
        assert path.read_bytes() == whole
        assert sink.repaired == end - start


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_has_the_permissions_that_the_umask_leaves_and_an_old_one_keeps_its_own(
    tmp_path: Path, umask: int, mode: int
) -> None:
    (tmp_path / "old.jsonl").touch(0o640)
    (tmp_path / "old.jsonl").chmod(0o640)
    before = os.umask(umask)
    try:
        for name in ("new.jsonl", "old.jsonl"):
            opened(tmp_path / name).close()
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new.jsonl", "old.jsonl")] == [mode, 0o640]


@pytest.mark.parametrize("tail", [bytes(50), frame_of(b"two")[:-1] + b"x"])
def test_a_last_frame_that_never_reached_the_disk_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "a.rec"
    path.write_bytes(MAGIC + frame_of(b"one") + tail)
    opened(path).close()
    assert path.read_bytes() == MAGIC + frame_of(b"one")


def test_damage_before_the_end_is_an_error_and_nothing_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    damaged = MAGIC + frame_of(b"one")[:-1] + b"x" + frame_of(b"two")
    path.write_bytes(damaged)
    with pytest.raises(StreamError, match="damaged at byte 8"):
        opened(path)
    assert path.read_bytes() == damaged


def test_nothing_is_in_the_file_before_a_flush_and_everything_after(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    sink = opened(path)
    sink.send(messages(b"one"))
    assert path.read_bytes() == b""
    sink.flush(1)
    assert path.read_bytes() == b"one\n"
    sink.send(messages(b"x" * 2_000_000))
    assert path.stat().st_size == 2_000_005
    sink.close()
    sink.close()


def test_flush_waits_for_the_disk_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fsync in (True, False):
        sink = opened(tmp_path / "a.jsonl", fsync=fsync)
        synced: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", synced.append)
            sink.flush(1)
        assert len(synced) == fsync
        sink.close()


@pytest.mark.parametrize(("name", "value"), [("a.jsonl", b"a\nb"), ("a.jsonl", b""), ("a.rec", b"")])
def test_a_value_that_could_not_be_read_back_is_refused_with_all_of_its_call(
    tmp_path: Path, name: str, value: bytes
) -> None:
    sink = opened(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(StreamError, match=name):
        sink.send(messages(b"good", value))
    sink.close()
    assert (tmp_path / name).read_bytes() == before


def test_a_full_disk_leaves_no_half_record_and_what_was_accepted_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    sink = opened(path)
    sink.send(messages(b"one"))
    write = os.write

    def fill(fd: int, data: bytes) -> int:
        write(fd, data[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        with pytest.raises(StreamUnavailableError, match="No space left"):
            sink.flush(1)
        with pytest.raises(StreamUnavailableError, match="No space left"):
            sink.send(messages(b"x" * 2_000_000))
    assert path.read_bytes() == b""
    sink.send(messages(b"two"))
    sink.flush(1)
    assert path.read_bytes() == b"one\ntwo\n"
    sink.close()


def test_a_failed_sync_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = opened(tmp_path / "a.jsonl")
    sink.send(messages(b"one"))

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StreamError, match="the disk lost"):
        sink.flush(1)
    sink.send(messages(b"two"))
    with pytest.raises(StreamError, match="not open"):
        sink.flush(1)
    sink.close()


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    first = opened(tmp_path / "a.jsonl")
    with pytest.raises(StreamError, match="written by somebody else"):
        opened(tmp_path / "a.jsonl")
    first.close()
    opened(tmp_path / "a.jsonl").close()


def test_an_envelope_keeps_the_whole_dead_letter_and_tells_its_reason_in_plain_text(tmp_path: Path) -> None:
    record = Record("events", 1, 5, 6, 2.0, b"\xff", b"a\n\x00", (("h", b"\xfe"), ("h", b"2")))
    message = dead_letter(record, "not_json", "record is not JSON", "decode")
    sink = opened(tmp_path / "dead.jsonl", envelope=True)
    sink.send([message, Message(None, b"")])
    sink.close()
    first, second = (tmp_path / "dead.jsonl").read_bytes().splitlines()
    assert open_envelope(first) == message
    assert open_envelope(second) == Message(None, b"")
    assert json.loads(first)["errors"]["reason"] == "not_json"


@pytest.mark.parametrize("line", [b"", b"[]", b'{"key": null, "value": "?", "headers": []}', b'{"key": null}'])
def test_a_line_that_is_no_envelope_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match="not an envelope"):
        open_envelope(line)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="No such file or directory"):
        opened(tmp_path / "missing" / "a.jsonl")
    with pytest.raises(StreamError, match=r"must end in \.jsonl or \.rec"):
        FileSink(tmp_path / "a.txt")
    with pytest.raises(StreamError, match="envelopes are lines of JSON"):
        FileSink(tmp_path / "a.rec", envelope=True)


def test_a_sink_is_named_after_its_file_unless_it_has_a_name(tmp_path: Path) -> None:
    assert FileSink(tmp_path / "a.jsonl").name == "a.jsonl"
    assert FileSink(tmp_path / "a.jsonl", name="predictions").name == "predictions"
