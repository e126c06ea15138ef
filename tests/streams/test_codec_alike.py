"""Decoding many records at once, and with the faster parser, gives what decoding each by itself gives."""

import json
import math
import struct
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams import codec, codec_alike, codec_json
from streams.base import Record
from streams.codec import Event, Events, InputSpec, Reason, decode_events, encode_event, encode_events

SPEC = InputSpec((3,), np.dtype("f4"))
DEEP = InputSpec((1,) * 9 + (2,), np.dtype("f4"))


def records(values: list[bytes], timestamp: float = 7.5) -> list[Record]:
    return [Record("events", 1, at, at + 1, timestamp, None, value) for at, value in enumerate(values)]


def one_by_one(given_records: list[Record], spec: InputSpec = SPEC) -> tuple[list[Event], list[tuple[Record, Reason]]]:
    events: list[Event] = []
    refused = []
    with patch.object(codec_alike, "decode_together", return_value=None), patch.object(codec_json, "orjson", None):
        for record in given_records:
            good, bad = decode_events([record], spec)
            events += good
            refused += [(record, fault.reason) for record, fault in bad]
    return events, refused


def at_once(given_records: list[Record], spec: InputSpec = SPEC) -> tuple[list[Event], list[tuple[Record, Reason]]]:
    events, bad = decode_events(given_records, spec)
    return list(events), [(record, fault.reason) for record, fault in bad]


def batch(count: int, width: int = 3) -> list[bytes]:
    rows = np.arange(count * 3, dtype="f4").reshape(count, 3)
    return encode_events([f"id-{at:0{width}}" for at in range(count)], rows, [at / 4 for at in range(count)])


def test_records_that_are_alike_are_decoded_at_once() -> None:
    with patch("streams.codec_binary.decode_event", side_effect=AssertionError):
        events, refused = decode_events(records(batch(20)), SPEC)
    assert (events, refused) == (one_by_one(records(batch(20)))[0], [])


def test_ids_of_several_lengths_keep_their_order() -> None:
    given_records = records(batch(120, width=1))
    assert at_once(given_records) == one_by_one(given_records)


def test_times_of_the_stream_count_where_records_have_none() -> None:
    values = [encode_event(f"id-{at}", np.zeros(3, "f4")) for at in range(9)]
    assert {event.time for event in at_once(records(values))[0]} == {7.5}
    assert at_once(records(values, math.nan)) == one_by_one(records(values, math.nan))


def test_dimensions_are_compared_to_the_last() -> None:
    values = [encode_event(f"id-{at}", np.zeros(DEEP.shape, "f4")) for at in range(9)]
    values[5] = values[5][:68] + struct.pack("<I", 3) + values[5][72:]
    assert at_once(records(values), DEEP) == one_by_one(records(values), DEEP)
    assert at_once(records(values), DEEP)[1][0][1] is Reason.SHAPE


@pytest.mark.parametrize("time", [-5.0, -1e-305])
def test_times_before_1970_are_found_among_good_ones(time: float) -> None:
    values = [bytearray(value) for value in batch(20)]
    values[7][16:24] = struct.pack("<d", time)
    found = records([bytes(value) for value in values])
    assert at_once(found) == one_by_one(found)
    assert at_once(found)[1][0][1] is Reason.TIME


@given(
    st.lists(
        st.tuples(st.integers(0, 19), st.integers(0, 60), st.integers(0, 255)),
        max_size=3,
    ),
    st.lists(
        st.tuples(st.integers(0, 19), st.sampled_from([1e300, math.nan, -1e11, -1e-305, 4.2e9, -0.0])), max_size=2
    ),
    st.booleans(),
)
def test_damaged_batches_decode_as_their_records_do(
    damage: list[tuple[int, int, int]], times: list[tuple[int, float]], everywhere: bool
) -> None:
    values = [bytearray(value) for value in batch(20)]
    for at, place, byte in damage:
        for value in values if everywhere else [values[at]]:
            if place < len(value):
                value[place] = byte
    for at, time in times:
        values[at][16:24] = struct.pack("<d", time)
    given_records = records([bytes(value) for value in values])
    expected = one_by_one(given_records)
    assert repr(at_once(given_records)) == repr(expected)  # inputs may be NaN


HARD = [
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "id": "b"}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "note": {"a": 1, "a": 2}}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "note": {"a": {"b": ":"}}}',
    '{"id": "a:b", "inputs": [1, 2, 3], "time": 5}',
    '{"id": "a", "inputs": [-0, -0.0, 1e-400], "time": 5}',
    '{"id": "a", "inputs": [18446744073709551616, 123456789012345678901234567890, -9223372036854775809], "time": 5}',
    '{"id": "a", "inputs": [1e999, 2, 3], "time": 5}',
    '{"id": "a", "inputs": [1e39, 2, 3], "time": 5}',
    '{"id": "a", "inputs": [NaN, 2, 3], "time": 5}',
    '{"id": "a", "inputs": [true, 2, 3], "time": 5}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 123456789012345678901234567890}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "version": 1.0}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "version": 2}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "version": null}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "version": true}',
    '{"id": "\\ud800", "inputs": [1, 2, 3], "time": 5}',
    '{"id": "\\ud83d\\ude00", "inputs": [1, 2, 3], "time": 5}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "note": ' + "[" * 40 + "]" * 40 + "}",
    '{"id": "a", "inputs": {"dtype": "float32", "shape": [3], "data": "AACAPwAAAEAAAEBA", "x": '
    + "[" * 40
    + "]" * 40
    + '}, "time": 5}',
    '{"id": "a", "inputs": ' + "[" * 40 + "]" * 40 + ', "time": 5}',
    '{"id": "a", "inputs": [1, 2, 3], "time": 5, "group": ' + "[" * 2000 + "]" * 2000 + "}",
    '\ufeff{"id": "a", "inputs": [1, 2, 3], "time": 5}',
    '[{"id": "a", "inputs": [1, 2, 3], "time": 5}]',
    '{"id": "a", "inputs": {"dtype": "float32", "shape": [3], "data": "AACAPwAAAEAAAEBA"}, "time": 5}',
    '{"id": "a", "inputs": {"dtype": "float32", "shape": [3], "data": "AACAPwAAAEAAAEBA", "data": ""}, "time": 5}',
]


@pytest.mark.parametrize("text", HARD)
def test_the_faster_parser_takes_and_refuses_what_the_strict_one_does(text: str) -> None:
    pytest.importorskip("orjson")
    assert repr(at_once(records([text.encode()]))) == repr(one_by_one(records([text.encode()])))


@given(st.data())
def test_the_faster_parser_agrees_on_damaged_records(data: st.DataObject) -> None:
    pytest.importorskip("orjson")
    value = bytearray(json.dumps({"id": "é", "inputs": [0.5, -2, 3e-7], "time": 1.25, "group": "g"}).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(value) - 1))
        value[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b",", b'"', b":", b"9", b"e", b"-", b"[", b"}", b"\\"])
        )
    assert repr(at_once(records([bytes(value)]))) == repr(one_by_one(records([bytes(value)])))


def test_the_faster_parser_takes_plain_records() -> None:
    pytest.importorskip("orjson")
    value = encode_event("a", np.array([1, 2, 3], "f4"), 5, form="json", tensor=False)
    with patch.object(codec_json, "parse", side_effect=AssertionError):
        assert at_once(records([value]))[0][0].id == "a"


PLAIN = '{"id": "p%d", "inputs": [1, 2.5, -3e-7], "time": %d.25}'


@pytest.mark.parametrize("text", [*HARD, '{"id": "a", "inputs": [1, true, 2]}', '{"id": "a", "inputs": [1e40, 1, 2]}'])
def test_one_hard_record_among_plain_ones_changes_nothing_for_them(text: str) -> None:
    values = [(PLAIN % (at, at)).encode() for at in range(4)]
    values.insert(2, text.encode())
    assert repr(at_once(records(values))) == repr(one_by_one(records(values)))


@pytest.mark.parametrize("name", ["f4", "f8", "u1", "i8"])
@given(st.data())
def test_json_records_are_decoded_at_once_as_one_by_one(name: str, data: st.DataObject) -> None:
    spec = InputSpec((3,), np.dtype(name))
    number = st.integers(0, 300) | st.floats(0, 300) | st.sampled_from([-1, 2**63, 1e39, 5e-324, True])
    tensor = {"dtype": spec.name, "shape": [3], "data": "AAAA"}
    record = st.fixed_dictionaries(
        {"id": st.text(max_size=3), "inputs": st.lists(number, min_size=3, max_size=3) | st.just(tensor)},
        optional={
            "time": st.none() | st.integers(-1, 9) | st.floats(0, 9) | st.sampled_from([1e300, True, "1"]),
            "group": st.none() | st.text(max_size=2),
            "version": st.sampled_from([1, 2, 1.0, True]),
            "more": st.just("a:b"),
        },
    )
    values = [json.dumps(one).encode() for one in data.draw(st.lists(record, max_size=6))]
    timestamp = data.draw(st.sampled_from([7.5, math.nan]))
    assert repr(at_once(records(values, timestamp), spec)) == repr(one_by_one(records(values, timestamp), spec))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 2)])
@pytest.mark.parametrize("inputs", ["1", "[1]", "[[1]]", "[[1, 2], [3, 4]]", "[1, 2, 3, 4]", "[]", "[[1, 2], [3]]"])
def test_inputs_in_json_have_the_shape_that_they_are_to_have(shape: tuple[int, ...], inputs: str) -> None:
    spec, value = InputSpec(shape, np.dtype("f4")), f'{{"id": "a", "inputs": {inputs}}}'.encode()
    assert repr(at_once(records([value] * 2), spec)) == repr(one_by_one(records([value] * 2), spec))


def test_json_records_come_in_columns() -> None:
    pytest.importorskip("orjson")
    values = [(PLAIN % (at, at)).encode() for at in range(9)]
    with patch.object(codec_json, "decode_event", side_effect=AssertionError):
        events, refused = decode_events(records(values), SPEC)
    assert isinstance(events, Events)
    assert (list(events), refused) == (one_by_one(records(values))[0], [])


_shares = st.floats(width=32, allow_subnormal=True) | st.sampled_from([0.1, 1.0, 1e-10, math.nan, math.inf])


@pytest.mark.parametrize("faster", [True, False])
@given(st.lists(st.tuples(_shares, _shares), max_size=5))
def test_answers_in_json_give_every_probability_back(faster: bool, rows: list[tuple[float, float]]) -> None:
    probabilities = np.array(rows, np.float32).reshape(-1, 2)
    ids = [f'"{at}' for at in range(len(rows))]
    with patch.object(codec_json, "orjson", codec_json.orjson if faster else None):
        sent = codec.encode_predictions(
            ids, np.arange(len(rows)), probabilities, [1.5] * len(rows),
            records=records([b""] * len(rows)), release=2, step=3,
        )  # fmt: skip
    back = [codec.decode_prediction(message.value) for message in sent]
    kept = np.where(np.isfinite(probabilities), probabilities, np.float32(math.nan))
    np.testing.assert_array_equal(np.array([one.probabilities for one in back], np.float32).reshape(-1, 2), kept)
    assert [(one.id, one.label, one.time, one.release, one.step) for one in back] == [
        (name, at, 1.5, 2, 3) for at, name in enumerate(ids)
    ]
    assert [(message.key, message.headers) for message in sent] == [
        (name.encode(), (("adaptd-id", f"events-1-{at}".encode()),)) for at, name in enumerate(ids)
    ]
