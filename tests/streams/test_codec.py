import json
import math
import struct

import numpy as np
import pytest

from streams.base import Record
from streams.codec import (
    Form,
    InputSpec,
    Prediction,
    Reason,
    dead_letter,
    decode_events,
    decode_feedback,
    decode_prediction,
    encode_event,
    encode_events,
    encode_feedback,
    encode_prediction,
    encode_predictions,
)

PIXELS = InputSpec((2, 3), np.dtype("uint8"))
FLOATS = InputSpec((2,), np.dtype("float32"))
FORMS: tuple[Form, ...] = ("json", "binary")
GOOD_EVENT = {"id": "a", "inputs": [[1, 2, 3], [4, 5, 255]], "time": 5}


def record(value: bytes, timestamp: float = math.nan) -> Record:
    return Record("events", 2, 7, 8, timestamp, b"k", value, (("trace", b"1"),))


def text(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def event_with(**fields: object) -> bytes:
    return text(**(GOOD_EVENT | fields))


def reason_for_event(value: bytes, spec: InputSpec = PIXELS) -> Reason:
    events, [(refused, fault)] = decode_events([record(value)], spec)
    assert not events
    assert refused.value == value
    assert fault.message
    return fault.reason


def reason_for_feedback(value: bytes) -> Reason:
    feedback, [(_, fault)] = decode_feedback([record(value)], PIXELS)
    assert not feedback
    return fault.reason


def tensor(**fields: object) -> dict[str, object]:
    return {"dtype": "uint8", "shape": [2, 3], "data": "AQIDBAX/"} | fields


def test_the_documented_binary_layout_is_what_is_written() -> None:
    value = encode_event("ab", np.array([[1, 2, 3], [4, 5, 6]], np.uint8), 2.5, "g")
    assert value == (
        b"\xadADT\x01\x01\x01\x02" + b"\x09\x00" + b"\x02\x00\x01\x00\x00\x00" + struct.pack("<d", 2.5) + bytes(8)
        + struct.pack("<II", 2, 3) + b"ab" + b"g" + bytes([1, 2, 3, 4, 5, 6])
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_inputs_come_out_in_c_order_and_little_endian(form: Form) -> None:
    inputs = np.arange(6, dtype=">f4").reshape(3, 2).T
    [event], _ = decode_events([record(encode_event("é", inputs, 1, form=form))], InputSpec((2, 3), np.dtype("f4")))
    assert event.inputs == np.array([[0, 2, 4], [1, 3, 5]], "<f4").tobytes()
    assert (event.id, event.time, event.group) == ("é", 1.0, None)


@pytest.mark.parametrize("inputs", [[[1, 2, 3], [4, 5, 255]], tensor()])
def test_json_inputs_are_nested_lists_or_a_tensor(inputs: object) -> None:
    value = event_with(inputs=inputs, group="g", more={"a": [1]}, version=1)
    [event], refused = decode_events([record(value)], PIXELS)
    assert not refused
    assert (event.id, event.inputs, event.time, event.group) == ("a", bytes([1, 2, 3, 4, 5, 255]), 5.0, "g")
    assert event.record.value == value


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_equals_its_events_one_by_one(form: Form) -> None:
    inputs = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    batch = encode_events(["a", "b"], inputs, [1.0, 2.0], ["g", None])
    single = [encode_event("a", inputs[0], 1.0, "g", form=form), encode_event("b", inputs[1], 2.0, form=form)]
    first, _ = decode_events([record(value) for value in batch], PIXELS)
    second, _ = decode_events([record(value) for value in single], PIXELS)
    assert [event[:4] for event in first] == [event[:4] for event in second]


@pytest.mark.parametrize("form", FORMS)
def test_one_stream_may_mix_forms_and_bad_records(form: Form) -> None:
    good = encode_event("a", np.zeros((2, 3), np.uint8), 1, form=form)
    events, refused = decode_events([record(good), record(b"no"), record(event_with(id="b"))], PIXELS)
    assert [event.id for event in events] == ["a", "b"]
    assert [bad.value for bad, _ in refused] == [b"no"]


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_time_is_the_timestamp_of_the_stream(form: Form) -> None:
    value = encode_event("a", np.zeros((2, 3), np.uint8), form=form)
    assert decode_events([record(value, 12.5)], PIXELS)[0][0].time == 12.5
    assert reason_for_event(value) == Reason.TIME


@pytest.mark.parametrize("form", FORMS)
def test_feedback_carries_a_label_or_a_reward_and_maybe_inputs(form: Form) -> None:
    inputs = np.arange(6, dtype=np.uint8).reshape(2, 3)
    values = [
        encode_feedback("a", label=2**63 - 1, time=1, form=form),
        encode_feedback("b", reward=-0.5, inputs=inputs, form=form),
    ]
    (label, reward), refused = decode_feedback([record(value, 9.0) for value in values], PIXELS)
    assert not refused
    assert label[:5] == ("a", 2**63 - 1, None, 1.0, None)
    assert reward[:5] == ("b", None, -0.5, 9.0, inputs.tobytes())


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ([1, 2, 3, 4, 5], "not lists of shape [5]"),
        ([[[1, 2, 3]], [[4, 5, 6]]], "not lists of shape [2, 1, 3]"),
        ([[1, 2, 3], [4, 5]], "not lists that differ among themselves"),
        ([], "not lists of shape [0]"),
        ("abc", "not str"),
    ],
)
def test_of_inputs_of_another_shape_it_is_told_what_came(inputs: object, found: str) -> None:
    _, [(_, fault)] = decode_events([record(event_with(inputs=inputs))], PIXELS)
    assert fault.message == f"inputs must be lists of shape [2, 3], or a tensor object, {found}"


HOSTILE_EVENTS = [
    (b"", Reason.NOT_JSON),
    (b"\x00" * 64, Reason.NOT_JSON),
    (b"\xff\xfe{}", Reason.NOT_UTF8),
    (b"\xef\xbb\xbf{}", Reason.NOT_JSON),
    (b'{"id": "a"', Reason.NOT_JSON),
    (b'{"id": "a"} {}', Reason.NOT_JSON),
    (b'{"id": "\x01"}', Reason.NOT_JSON),
    (b'{"n": ' + b"9" * 5000 + b"}", Reason.NOT_JSON),
    (b"null", Reason.SCHEMA),
    (b"[1, 2]", Reason.SCHEMA),
    (b'{"a": NaN}', Reason.NOT_FINITE),
    (b'{"a": -Infinity}', Reason.NOT_FINITE),
    (b'{"id": "a", "id": "b"}', Reason.DUPLICATE_KEY),
    (b'{"x": {"y": 1, "y": 1}}', Reason.DUPLICATE_KEY),
    (b"[" * 200_000, Reason.NESTING),
    (b'{"a":' * 50_000, Reason.NESTING),
    (b"[" * 100 + b"]" * 100, Reason.NESTING),
    (b'{"a":["' + b"[" * 99 + b'"]' + b',["\\""]' + b',"b":' + b"[" * 33 + b"]" * 33 + b"}", Reason.NESTING),
    (b"[[],{}," * 40 + b"]" * 40, Reason.NESTING),
    (event_with(version=2), Reason.VERSION),
    (event_with(version="1"), Reason.VERSION),
    (event_with(version=True), Reason.VERSION),
    (text(inputs=[[1, 2, 3]] * 2, time=1), Reason.SCHEMA),
    (text(id="a", time=1), Reason.SCHEMA),
    (event_with(id=7), Reason.ID),
    (event_with(id=""), Reason.ID),
    (event_with(id="x" * 129), Reason.ID),
    (event_with(id="\ud800"), Reason.ID),
    (event_with(group=3), Reason.ID),
    (event_with(time="now"), Reason.TIME),
    (event_with(time=True), Reason.TIME),
    (event_with().replace(b'"time": 5', b'"time": 1e999'), Reason.TIME),
    (event_with(time=10**400), Reason.TIME),
    (event_with(inputs=[1, 2, 3, 4, 5, 6]), Reason.SHAPE),
    (event_with(inputs=[[1, 2], [3, 4, 5]]), Reason.SHAPE),
    (event_with(inputs=[[1, 2, 3], "abc"]), Reason.SHAPE),
    (event_with(inputs=[[[1], [2], [3]]] * 2), Reason.DTYPE),
    (event_with(inputs=[[1, 2, 300]] * 2), Reason.RANGE),
    (event_with(inputs=[[1, 2, -1]] * 2), Reason.RANGE),
    (event_with(inputs=[[1, 2, True]] * 2), Reason.DTYPE),
    (event_with(inputs=[[1, 2, 3.0]] * 2), Reason.DTYPE),
    (event_with(inputs=[[1, 2, None]] * 2), Reason.DTYPE),
    (event_with(inputs=tensor(dtype="int8")), Reason.DTYPE),
    (event_with(inputs=tensor(shape=[3, 2])), Reason.SHAPE),
    (event_with(inputs=tensor(shape=[2, 3.0])), Reason.SHAPE),
    (event_with(inputs=tensor(data="AQIDBAU=")), Reason.FRAMING),
    (event_with(inputs=tensor(data="AQIDBAX/AQID")), Reason.FRAMING),
    (event_with(inputs=tensor(data="AQID AX/")), Reason.FRAMING),
    (event_with(inputs=tensor(data="éQIDBAX/")), Reason.FRAMING),
    (event_with(inputs=tensor(data=5)), Reason.SCHEMA),
]


@pytest.mark.parametrize(("value", "reason"), HOSTILE_EVENTS, ids=lambda case: str(case)[:40])
def test_hostile_json_is_refused_for_its_reason(value: bytes, reason: Reason) -> None:
    assert reason_for_event(value) == reason


@pytest.mark.parametrize("number", [b"1e999", b"1e39", b"1" + b"0" * 400])
def test_a_number_that_a_float_cannot_hold_is_refused(number: bytes) -> None:
    assert reason_for_event(b'{"id":"a","time":1,"inputs":[1,%b]}' % number, FLOATS) == Reason.RANGE


def test_brackets_in_strings_are_no_nesting() -> None:
    value = event_with(note="[{" * 500 + '\\"' + "]" * 3)
    assert len(decode_events([record(value)], PIXELS)[0]) == 1


BINARY = encode_event("ab", np.zeros((2, 3), np.uint8), 1.0, "g")


def changed(at: int, new: bytes, value: bytes = BINARY) -> bytes:
    return value[:at] + new + value[at + len(new) :]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (BINARY[:4], Reason.FRAMING),
        (BINARY[:31], Reason.FRAMING),
        (BINARY[:36], Reason.FRAMING),
        (BINARY[:-1], Reason.FRAMING),
        (BINARY + b"\0", Reason.FRAMING),
        (changed(4, b"\x02"), Reason.VERSION),
        (changed(5, b"\x02"), Reason.KIND),
        (changed(5, b"\x09"), Reason.KIND),
        (changed(6, b"\x02"), Reason.DTYPE),
        (changed(6, b"\xff"), Reason.DTYPE),
        (changed(7, b"\x01"), Reason.SHAPE),
        (changed(7, b"\xff"), Reason.FRAMING),
        (changed(32, b"\x00\x00\x10\x00\x00\x00\x10\x00"), Reason.SHAPE),
        (changed(10, b"\xff\xff"), Reason.FRAMING),
        (changed(10, b"\x00\x00\x03\x00"), Reason.ID),
        (changed(40, b"\xff"), Reason.NOT_UTF8),
        (changed(16, struct.pack("<d", math.nan)), Reason.TIME),
        (changed(16, struct.pack("<d", math.inf)), Reason.TIME),
    ],
)
def test_hostile_binary_is_refused_for_its_reason(value: bytes, reason: Reason) -> None:
    assert reason_for_event(value) == reason


def test_a_version_out_of_reach_is_named_together_with_the_one_that_is_read() -> None:
    for value in (event_with(version=7), changed(4, b"\x07")):
        _, [(_, fault)] = decode_events([record(value)], PIXELS)
        assert "version 7" in fault.message
        assert "version 1" in fault.message


def test_a_field_that_is_not_known_changes_nothing() -> None:
    (plain,), _ = decode_events([record(text(**GOOD_EVENT))], PIXELS)
    (more,), _ = decode_events([record(event_with(note="later", labels=[1]))], PIXELS)
    assert plain[:-1] == more[:-1], "all but the record itself"
    (plain_label,), _ = decode_feedback([record(text(id="a", label=1, time=5))], PIXELS)
    (more_label,), _ = decode_feedback([record(text(id="a", label=1, time=5, source={"tenant": 3}))], PIXELS)
    assert plain_label[:-1] == more_label[:-1]


SECRET = "hunter2"


@pytest.mark.parametrize(
    "value",
    [
        SECRET.encode(),
        text(id=SECRET, inputs=[1]),
        text(id="a", inputs=[SECRET] * 6),
        event_with(time=SECRET),
        event_with(group=[SECRET]),
        event_with(inputs=tensor(data=SECRET)),
        event_with(id=SECRET * 100),
        text(id="a", label=SECRET),
        text(id="a", label=1, reward=SECRET),
        text(**{SECRET: SECRET}),
        b'{"%(a)b": 1, "%(a)b": 2}' % {b"a": SECRET.encode()},
        b'{"id": "a", "inputs": [%b]}' % SECRET.encode(),
    ],
)
def test_why_a_record_is_refused_is_told_without_what_it_says(value: bytes) -> None:
    for decode in (decode_events, decode_feedback):
        _, [(_, fault)] = decode([record(value)], PIXELS)
        assert SECRET not in fault.message


LABELLED = encode_feedback("ab", label=3, time=1.0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (text(id="a", time=1), Reason.SCHEMA),
        (text(id="a", time=1, label=1, reward=1), Reason.SCHEMA),
        (text(id="a", time=1, label=1.0), Reason.LABEL),
        (text(id="a", time=1, label=True), Reason.LABEL),
        (text(id="a", time=1, label=-1), Reason.LABEL),
        (text(id="a", time=1, label=2**63), Reason.LABEL),
        (text(id="a", time=1, reward="1"), Reason.SCHEMA),
        (text(id="a", time=1, label=1, inputs=[1]), Reason.SHAPE),
        (changed(8, b"\x08", LABELLED), Reason.SCHEMA),
        (changed(8, b"\x0e", LABELLED), Reason.SCHEMA),
        (changed(24, struct.pack("<q", -1), LABELLED), Reason.LABEL),
        (changed(24, struct.pack("<d", math.nan), changed(8, b"\x0c", LABELLED)), Reason.NOT_FINITE),
        (changed(7, b"\x02", LABELLED), Reason.DTYPE),
        (LABELLED + b"\0", Reason.FRAMING),
        (LABELLED[:20], Reason.FRAMING),
        (BINARY, Reason.KIND),
    ],
)
def test_hostile_feedback_is_refused_for_its_reason(value: bytes, reason: Reason) -> None:
    assert reason_for_feedback(value) == reason


def test_a_record_above_the_limit_is_refused_unseen() -> None:
    _, [(_, fault)] = decode_events([record(b"\xff" * 100)], PIXELS, max_bytes=99)
    assert fault.reason == Reason.TOO_LARGE
    _, [(_, fault)] = decode_feedback([record(b"\xff" * 100)], PIXELS, max_bytes=99)
    assert fault.reason == Reason.TOO_LARGE


def test_inputs_that_are_not_finite_pass_in_the_binary_form() -> None:
    value = encode_event("a", np.array([np.nan, np.inf], np.float32), 1.0)
    [event], _ = decode_events([record(value)], FLOATS)
    assert np.isnan(np.frombuffer(event.inputs, "<f4")[0])


@pytest.mark.parametrize("form", FORMS)
def test_predictions_carry_the_id_of_their_event_and_of_their_record(form: Form) -> None:
    probabilities = np.array([[0.1, 0.9], [1.0, 1e-30]], np.float32)
    messages = encode_predictions(
        ["a", 'b"\\é'],
        np.array([1, 0]),
        probabilities,
        [1.5, 2.0],
        records=[record(b"")] * 2,
        release=3,
        step=44,
        form=form,
    )
    assert [message.key for message in messages] == [b"a", 'b"\\é'.encode()]
    assert messages[0].headers == (("adaptd-id", b"events-2-7"),)
    decoded = [decode_prediction(message.value) for message in messages]
    assert decoded[0] == Prediction("a", 1, tuple(probabilities[0].tolist()), 1.5, 3, 44)
    assert decoded[1] == Prediction('b"\\é', 0, tuple(probabilities[1].tolist()), 2.0, 3, 44)
    assert encode_prediction(decoded[0], record(b""), form=form) == messages[0]


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_that_are_not_finite_survive_as_nan(form: Form) -> None:
    prediction = Prediction("a", 0, (math.nan, 0.5), 1.0, 0, 0)
    decoded = decode_prediction(encode_prediction(prediction, record(b""), form=form).value)
    assert math.isnan(decoded.probabilities[0])
    assert decoded.probabilities[1] == 0.5


def test_json_predictions_have_the_documented_fields() -> None:
    message = encode_prediction(Prediction("a", 1, (0.25, 0.75), 1.0, 2, 3), record(b""), form="json")
    assert json.loads(message.value) == {
        "version": 1, "id": "a", "label": 1, "probabilities": [0.25, 0.75], "time": 1.0,
        "model": {"release": 2, "step": 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        {"event_id": ""},
        {"event_id": "x" * 129},
        {"group": ""},
        {"time": math.inf},
        {"inputs": np.zeros(3, np.complex64)},
        {"inputs": np.zeros((0, 3), np.uint8)},
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_what_could_not_be_decoded_is_not_encoded(arguments: dict[str, object], form: Form) -> None:
    complete = {"event_id": "a", "inputs": np.zeros(2, np.uint8)} | arguments
    with pytest.raises(ValueError, match=r"must|cannot"):
        encode_event(**complete, form=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [{}, {"label": 1, "reward": 1.0}, {"label": -1}, {"reward": math.nan}])
def test_feedback_without_one_good_answer_is_not_encoded(answer: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        encode_feedback("a", **answer)  # type: ignore[arg-type]


def test_a_dead_letter_keeps_the_record_and_tells_its_origin() -> None:
    message = dead_letter(record(b"\xff\x00", 1.5), "not_utf8", "bad \ud800", "decode")
    assert (message.key, message.value) == (b"k", b"\xff\x00")
    assert message.headers == (
        ("trace", b"1"),
        ("__adaptd.errors.topic", b"events"),
        ("__adaptd.errors.partition", b"2"),
        ("__adaptd.errors.offset", b"7"),
        ("__adaptd.errors.timestamp", b"1.5"),
        ("__adaptd.errors.stage", b"decode"),
        ("__adaptd.errors.reason", b"not_utf8"),
        ("__adaptd.errors.message", b"bad \\ud800"),
    )


def test_a_dead_letter_of_a_stream_without_timestamps_names_none() -> None:
    names = [name for name, _ in dead_letter(record(b"{", math.nan), "not_json", "bad", "decode").headers]
    assert "__adaptd.errors.offset" in names
    assert "__adaptd.errors.timestamp" not in names


def test_the_reasons_are_a_frozen_set_of_metric_labels() -> None:
    assert {str(reason) for reason in Reason} == {
        "too_large", "not_utf8", "not_json", "nesting", "duplicate_key", "not_finite", "framing", "kind", "version",
        "schema", "id", "time", "label", "dtype", "shape", "range",
    }  # fmt: skip
