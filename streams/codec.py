"""Codecs: records to events and feedback, predictions to messages, bad records to dead letters.

A record is in the binary tensor form if it begins with that form's magic, and in JSON otherwise; one stream may hold
both. `streams.codec_json` and `streams.codec_binary` give the two forms byte for byte. Bytes of inputs are
little-endian on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from streams import codec_alike, codec_binary, codec_json, codec_json_many
from streams.base import Message, Record
from streams.codec_binary import MAGIC, encode_events
from streams.codec_types import (
    MAX_BYTES,
    VERSION,
    BadRecord,
    Event,
    Events,
    Feedback,
    Form,
    InputSpec,
    Prediction,
    Reason,
)
from streams.columns import Records

__all__ = [
    "MAX_BYTES",
    "VERSION",
    "BadRecord",
    "Event",
    "Events",
    "Feedback",
    "Form",
    "InputSpec",
    "Prediction",
    "Reason",
    "dead_letter",
    "decode_events",
    "decode_feedback",
    "decode_prediction",
    "encode_event",
    "encode_events",
    "encode_feedback",
    "encode_prediction",
    "encode_predictions",
]

Refused = list[tuple[Record, BadRecord]]

_ERROR_HEADER: Final = "__adaptd.errors."


def _check_size(value: bytes, max_bytes: int) -> None:
    if len(value) > max_bytes:
        raise BadRecord(Reason.TOO_LARGE, f"record has {len(value)} bytes, the limit is {max_bytes}")


def decode_events(
    records: Sequence[Record], spec: InputSpec, *, max_bytes: int = MAX_BYTES
) -> tuple[Sequence[Event], Refused]:
    """Decode data records, each in its own form.

    Args:
        records: In any number and of any forms.
        spec: What inputs are in these records.
        max_bytes: Larger records are refused unseen.

    Returns:
        The events in order, and the records that are none, each with what is wrong.
    """
    layout = codec_binary.layout_of(spec)
    together = codec_alike.decode_together(records, layout, max_bytes)
    if together is None:
        together = codec_json_many.decode_together(records, spec, max_bytes)
    if together is not None:
        return together, []
    events: list[Event] = []
    refused: Refused = []
    for record in records:
        value = record.value
        try:
            _check_size(value, max_bytes)
            if value.startswith(MAGIC):
                events.append(codec_binary.decode_event(record, layout))
            else:
                events.append(codec_json.decode_event(record, spec))
        except BadRecord as fault:
            refused.append((record, fault))
    return events, refused


def decode_feedback(
    records: Iterable[Record], spec: InputSpec, *, max_bytes: int = MAX_BYTES
) -> tuple[list[Feedback], Refused]:
    """Decode feedback records, each in its own form; otherwise as `decode_events`."""
    layout = codec_binary.layout_of(spec)
    feedback: list[Feedback] = []
    refused: Refused = []
    for record in records:
        value = record.value
        try:
            _check_size(value, max_bytes)
            if value.startswith(MAGIC):
                feedback.append(codec_binary.decode_feedback(record, layout))
            else:
                feedback.append(codec_json.decode_feedback(record, spec))
        except BadRecord as fault:
            refused.append((record, fault))
    return feedback, refused


def decode_prediction(value: bytes) -> Prediction:
    """Decode one prediction of either form.

    Raises:
        BadRecord: The bytes are not a prediction.
    """
    _check_size(value, MAX_BYTES)
    if value.startswith(MAGIC):
        return codec_binary.decode_prediction(value)
    return codec_json.decode_prediction(value)


def encode_event(
    event_id: str,
    inputs: np.ndarray[Any, Any],
    time: float | None = None,
    group: str | None = None,
    *,
    form: Form = "binary",
    tensor: bool = True,
) -> bytes:
    """Encode one data record.

    Args:
        event_id: 1 to 128 characters.
        inputs: Of the shape and dtype that records hold.
        time: Event time in seconds; None leaves it to the stream.
        group: Tenant or domain.
        form: Of the record.
        tensor: In JSON, write inputs in base64 rather than as nested lists.

    Raises:
        ValueError: Something cannot be encoded.
    """
    if form == "binary":
        return codec_binary.encode_event(event_id, inputs, time, group)
    return codec_json.encode_event(event_id, inputs, time, group, tensor=tensor)


def encode_feedback(
    event_id: str,
    *,
    label: int | None = None,
    reward: float | None = None,
    time: float | None = None,
    inputs: np.ndarray[Any, Any] | None = None,
    form: Form = "binary",
) -> bytes:
    """Encode one feedback record.

    Args:
        event_id: Id of the event that it speaks of.
        label: Class index, at least 0; give either this or ``reward``.
        reward: Any finite number.
        time: When the label became known, seconds; None leaves it to the stream.
        inputs: Inputs of the event, where feedback is to carry them.
        form: Of the record.

    Raises:
        ValueError: Something cannot be encoded.
    """
    if (label is None) == (reward is None):
        raise ValueError("feedback must have either a label or a reward")
    if label is not None and not 0 <= label < 2**63:
        raise ValueError(f"label must be between 0 and 2^63 - 1, not {label}")
    if reward is not None and not np.isfinite(reward):
        raise ValueError(f"reward must be finite, not {reward}")
    encode = codec_binary.encode_feedback if form == "binary" else codec_json.encode_feedback
    return encode(event_id, label=label, reward=reward, time=time, inputs=inputs)


def encode_predictions(
    ids: Sequence[str],
    labels: np.ndarray[Any, Any],
    probabilities: np.ndarray[Any, Any],
    times: Sequence[float],
    *,
    records: Sequence[Record],
    release: int,
    step: int,
    form: Form = "json",
) -> Sequence[Message]:
    """Encode the predictions of one batch.

    Args:
        ids: Event ids, as decoded.
        labels: ``(N,)`` class indices.
        probabilities: ``(N, K)`` float32. What is not finite is null in JSON and as it is in the binary form.
        times: Seconds, finite.
        records: The records that the events came from; they give every answer its deterministic id.
        release: Number of the release.
        step: Number of the update that the live weights were at.
        form: Of the messages.

    Returns:
        One message for each event in order: key is the event id, header ``adaptd-id`` is ``stream-partition-offset``.
    """
    record_ids = _record_ids(Records.of(records))
    encode = codec_binary.encode_predictions if form == "binary" else codec_json_many.encode_predictions
    return encode(ids, labels.tolist(), probabilities, times, record_ids=record_ids, release=release, step=step)


def _record_ids(records: Records) -> list[bytes]:
    """What `Record.id` gives for each, in UTF-8."""
    found: list[bytes] = []
    for at in records.stretches:
        form = f"{at.stream}-{at.partition}-".encode().replace(b"%", b"%%") + b"%d"
        found += map(form.__mod__, records.offsets[at.start : at.stop])
    return found


def encode_prediction(prediction: Prediction, record: Record, *, form: Form = "json") -> Message:
    """Encode one prediction; a batch goes faster through `encode_predictions`."""
    return encode_predictions(
        [prediction.id],
        np.array([prediction.label]),
        np.array([prediction.probabilities], dtype=np.float32),
        [prediction.time],
        records=[record],
        release=prediction.release,
        step=prediction.step,
        form=form,
    )[0]


def dead_letter(record: Record, reason: str, message: str, stage: str) -> Message:
    """Make the message that tells where a refused record came from and why.

    Args:
        record: As it was read.
        reason: A `Reason` or another short fixed word.
        message: One sentence for a person.
        stage: Where it was refused, for example ``decode``.

    Returns:
        Key, value and headers as they were, with headers ``__adaptd.errors.*`` after them, in UTF-8 text; without
        ``timestamp`` where the stream has none.
    """
    errors: dict[str, object] = {
        "topic": record.stream,
        "partition": record.partition,
        "offset": record.offset,
        **({"timestamp": record.timestamp} if math.isfinite(record.timestamp) else {}),
        "stage": stage,
        "reason": reason,
        "message": message,
    }
    added = tuple(
        (_ERROR_HEADER + name, str(value).encode(errors="backslashreplace")) for name, value in errors.items()
    )
    return Message(record.key, record.value, record.headers + added)
