import contextlib
import json
import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streams.base import Record
from streams.codec import (
    BadRecord,
    Form,
    InputSpec,
    Prediction,
    decode_events,
    decode_feedback,
    decode_prediction,
    encode_event,
    encode_feedback,
    encode_prediction,
)
from streams.codec_binary import MAGIC
from streams.codec_types import DTYPE_FORMATS, LATEST_TIME

SPEC = InputSpec((2,), np.dtype("float32"))
FORMS = st.sampled_from(["json", "binary"])
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128)
TIMES = st.floats(min_value=0, max_value=LATEST_TIME, exclude_max=True)
INPUTS = st.sampled_from(list(DTYPE_FORMATS)).flatmap(
    lambda name: hnp.arrays(
        name,
        hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if name.startswith("f") else None,
    )
)
HEAD = encode_event("a", np.zeros(2, np.float32), 1.0)


def record(value: bytes) -> Record:
    return Record("events", 0, 0, 1, math.nan, None, value)


@given(IDS, INPUTS, TIMES, st.none() | IDS, FORMS, st.booleans())
def test_events_come_back_as_they_were(
    event_id: str, inputs: np.ndarray[Any, Any], time: float, group: str | None, form: Form, tensor: bool
) -> None:
    value = encode_event(event_id, inputs, time, group, form=form, tensor=tensor)
    spec = InputSpec(inputs.shape, inputs.dtype)
    [event], refused = decode_events([record(value)], spec)
    assert not refused
    assert event[:4] == (event_id, np.ascontiguousarray(inputs).tobytes(), time, group)
    assert len(event.inputs) == spec.nbytes


@given(IDS, st.integers(0, 2**63 - 1) | TIMES, TIMES, FORMS)
def test_feedback_comes_back_as_it_was(event_id: str, answer: float, time: float, form: Form) -> None:
    label, reward = (answer, None) if isinstance(answer, int) else (None, answer)
    value = encode_feedback(event_id, label=label, reward=reward, time=time, form=form)
    [feedback], _ = decode_feedback([record(value)], SPEC)
    assert feedback[:5] == (event_id, label, reward, time, None)


@given(
    IDS,
    st.integers(0, 2**63 - 1),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1).map(tuple),
    TIMES,
    FORMS,
)
def test_predictions_come_back_exact_to_the_last_bit(
    event_id: str, label: int, probabilities: tuple[float, ...], time: float, form: Form
) -> None:
    prediction = Prediction(event_id, label, probabilities, time, 1, 2)
    assert decode_prediction(encode_prediction(prediction, record(b""), form=form).value) == prediction


def decode_every_way(value: bytes) -> None:
    events, refused_events = decode_events([record(value)], SPEC)
    feedback, refused_feedback = decode_feedback([record(value)], SPEC)
    assert len(events) + len(refused_events) == 1
    assert len(feedback) + len(refused_feedback) == 1
    with contextlib.suppress(BadRecord):
        assert decode_prediction(value).id


@given(st.binary() | st.binary().map(lambda tail: MAGIC + tail) | st.text().map(str.encode))
def test_arbitrary_bytes_are_bad_records_at_worst(value: bytes) -> None:
    decode_every_way(value)


@given(st.integers(0, len(HEAD) - 1), st.integers(0, 255), st.integers(0, len(HEAD)))
def test_a_changed_byte_or_a_cut_is_a_bad_record_at_worst(at: int, byte: int, end: int) -> None:
    decode_every_way((HEAD[:at] + bytes([byte]) + HEAD[at + 1 :])[:end])
    decode_every_way(HEAD[:at] + bytes([byte]) + HEAD[at + 1 :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("version", "id", "inputs", "time", "group", "label", "reward", "probabilities", "model"), JSON
        ),
    )
)
def test_any_json_is_a_bad_record_at_worst(fields: dict[str, object]) -> None:
    decode_every_way(json.dumps(fields).encode())
    decode_every_way(json.dumps({"id": "a", "inputs": [1, 2], "label": 1, "time": 1} | fields).encode())
