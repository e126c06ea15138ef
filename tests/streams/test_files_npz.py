import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streams.base import StreamError
from streams.codec import InputSpec, decode_events
from streams.files import FileSource, recorded
from tests.streams.test_files import Start, drain, read

PIXELS = InputSpec((2, 3), np.dtype("uint8"))
X = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_rows_are_events_and_offsets_are_row_numbers(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=X, t=np.array([3.0, 4.0, 5.0, 6.0]), group=np.array(["g", "h", "g", "h"]))
    source = FileSource({"data": path}, follow=True)
    assert source.bounded
    source.open(Start({("data", 0): 1}))
    records = drain(source, 2)
    assert [(record.offset, record.end) for record in records] == [(1, 2), (2, 3), (3, 4)]
    assert source.ended() == {("data", 0)}
    assert source.lag() == {("data", 0): 0}
    source.close()
    events, refused = decode_events(records, PIXELS)
    assert not refused
    assert [event[:4] for event in events] == [
        (str(row), X[row].tobytes(), 3.0 + row, "gh"[row % 2]) for row in (1, 2, 3)
    ]


def test_a_row_past_the_end_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=X)
    with pytest.raises(StreamError, match="has 4 rows"):
        read(FileSource({"data": path}), {("data", 0): 5})


@pytest.mark.parametrize("compressed", [False, True])
def test_large_arrays_are_mapped_where_they_are_stored_as_they_are(tmp_path: Path, compressed: bool) -> None:
    x = np.asfortranarray(np.arange(300_000, dtype=np.int32).reshape(1000, 300))
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", y=np.zeros(1000, np.uint8), x=x)
    found = recorded(tmp_path / "a.npz")
    assert isinstance(found.x, np.memmap) is not compressed
    assert (found.x == x).all()
    assert found.spec == InputSpec((300,), np.dtype("int32"))


def test_times_default_to_row_numbers_and_labels_may_be_absent(tmp_path: Path) -> None:
    found = recorded(save(tmp_path / "a.npz", x=X), PIXELS)
    assert found.t.tolist() == [0, 1, 2, 3]
    assert (found.y, found.group, found.domain) == (None, None, None)
    assert list(found.ids) == ["0", "1", "2", "3"]
    assert len(found) == 4


def test_domains_are_named_by_a_list_or_by_themselves(tmp_path: Path) -> None:
    listed = recorded(save(tmp_path / "a.npz", x=X, domain=np.array([1, 0, 0, 1]), domains=np.array(["fog", "snow"])))
    named = recorded(save(tmp_path / "b.npz", x=X, domain=np.array(["snow", "fog", "fog", "snow"])))
    for found in (listed, named):
        assert found.domain is not None
        assert [found.domains[index] for index in found.domain] == ["snow", "fog", "fog", "snow"]
    assert listed.domains == ("fog", "snow")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros(4, int)}, "has no array x of inputs; it has y"),
        ({"x": X, "y": np.zeros(3, int)}, r"y has shape \(3,\), 4 rows of x need \(4,\)"),
        ({"x": X, "y": np.zeros((4, 1), int)}, "y has shape"),
        ({"x": X, "y": np.zeros(4)}, "y must be integers"),
        ({"x": X, "y": np.full(4, -2)}, "y must be class indices"),
        ({"x": X, "t": np.full(4, np.nan)}, "t must be finite"),
        ({"x": X, "t": np.array([1.0, 2.0, 3.0, 1.7e12])}, r"time 1\.7e\+12 in row 3 of t must be in seconds"),
        ({"x": X, "t": np.array([1, -2, 3, 4])}, "time -2 in row 1 of t must be in seconds"),
        ({"x": X, "group": np.zeros(4)}, "group must be text or integers"),
        ({"x": X, "group": np.array(["", "a", "b", "c"])}, "group must have 1 to 128"),
        ({"x": X, "domain": np.array([0, 1, 2, 3]), "domains": np.array(["a"])}, "indices of the 1 names"),
        ({"x": X[:0]}, "x has no rows"),
        ({"x": np.array(5)}, "x has no rows"),
        ({"x": X.astype(np.complex64)}, "complex64"),
        ({"x": X.astype(np.float32)}, r"float32 \[2, 3\], the inputs were declared uint8 \[2, 3\]"),
        ({"x": np.array([{}, {}], dtype=object)}, r"not an \.npz file of plain arrays"),
    ],
)
def test_what_is_no_recorded_stream_is_refused_with_a_sentence(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(StreamError, match=message):
        recorded(save(tmp_path / "a.npz", **arrays), PIXELS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04rubbish", b"\x93NUMPY"])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(StreamError, match=r"not an \.npz file"):
        recorded(tmp_path / "a.npz")


def test_a_large_object_array_is_never_unpickled(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", x=np.array(["y" * 100 + str(number) for number in range(20_000)], dtype=object))
    with pytest.raises(StreamError, match=r"not an \.npz file of plain arrays"):
        recorded(tmp_path / "a.npz")


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", x=np.zeros((1000, 300), np.int64))
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(StreamError, match=r"not an \.npz file"):
        recorded(path)


def line(**fields: object) -> str:
    return json.dumps({"id": "a", "inputs": [[1, 2, 3], [4, 5, 6]], "time": 1} | fields) + "\n"


def test_lines_with_labels_are_a_recorded_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line(label=2, domain="fog") + "\n" + line(id="b", time=2.5, group="g", domain="snow").rstrip())
    found = recorded(path, PIXELS)
    assert found.y is not None
    assert found.domain is not None
    assert (found.ids, found.t.tolist(), found.y.tolist()) == (["a", "b"], [1.0, 2.5], [2, -1])
    assert (found.group, found.domain.tolist(), found.domains) == ([None, "g"], [0, 1], ("fog", "snow"))
    assert found.x.tolist() == [[[1, 2, 3], [4, 5, 6]]] * 2
    assert found.spec == PIXELS


def test_lines_without_labels_have_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line())
    found = recorded(tmp_path / "a.jsonl", PIXELS)
    assert (found.y, found.group, found.domain) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line() + "\n" + line(inputs=[1]), r"a\.jsonl:3: inputs must be lists of shape"),
        (line(label=1.5), r"a\.jsonl:1: label must be an integer"),
        ("\n", "has no lines"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(StreamError, match=message):
        recorded(tmp_path / "a.jsonl", PIXELS)


def test_what_cannot_be_a_recorded_stream_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line())
    with pytest.raises(StreamError, match="shape and dtype of inputs must be given"):
        recorded(tmp_path / "a.jsonl")
    with pytest.raises(StreamError, match=r"must be \.npz or \.jsonl"):
        recorded(tmp_path / "a.csv")
    with pytest.raises(StreamError, match="cannot read"):
        recorded(tmp_path / "missing.npz")
