"""The binary tensor form of the default message schemas.

All numbers are little-endian. Nothing is padded; offsets are in bytes from the start of the record::

    offset  size  field
    0       4     magic AD 41 44 54; AD never begins UTF-8 text, so no JSON record is mistaken for this form
    4       1     version, 1
    5       1     kind: 1 data, 2 feedback, 3 prediction
    6       1     dtype of the tensor: 0 none, 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64,
                  6 float16, 7 float32, 8 float64
    7       1     ndim, number of dimensions of the tensor; 0 without a tensor
    8       1     flags: 1 has a group, 2 has a label, 4 has a reward, 8 has a time
    9       1     reserved, written as 0 and not read
    10      2     bytes of the id, u16
    12      2     bytes of the group, u16; 0 without one
    14      2     reserved, written as 0 and not read
    16      8     time, f64 seconds; 0 without one
    24      8     label, i64, or reward, f64; 0 with neither
    32            a prediction only: release, u64, and step, u64 (16 bytes)
    then    4n    dims, u32 each
    then          id, UTF-8
    then          group, UTF-8
    then          tensor in C order, up to the end of the record exactly

The tensor is the inputs of data (required) and of feedback (optional), and the probabilities of a prediction:
float32, one dimension. Every size is compared with the length that is there before anything is copied. Elements that
are NaN or infinite are let through: the engine masks such rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import repeat
from typing import Any, Final

import numpy as np

from streams.base import Record
from streams.codec_types import (
    DTYPE_FORMATS,
    MAX_ID_CHARS,
    VERSION,
    BadRecord,
    Event,
    Feedback,
    InputSpec,
    Prediction,
    Reason,
    check_id,
    check_time,
)
from streams.columns import Messages

MAGIC: Final = b"\xadADT"

_DATA: Final = 1
_FEEDBACK: Final = 2
_PREDICTION: Final = 3
_KINDS: Final = {_DATA: "data", _FEEDBACK: "feedback", _PREDICTION: "prediction"}

_HAS_GROUP: Final = 1
_HAS_LABEL: Final = 2
_HAS_REWARD: Final = 4
_HAS_TIME: Final = 8

_HEAD: Final = struct.Struct("<8sBxHH2xdq")
_HEAD_REWARD: Final = struct.Struct("<8sBxHH2xdd")
_PREDICTION_HEAD: Final = struct.Struct("<8sBxHH2xdqQQI")
_REWARD: Final = struct.Struct("<d")
_ANSWER_HEAD: Final = np.dtype(
    [
        ("first", "V8"),
        ("flags", "u1"),
        ("reserved", "u1"),
        ("id_bytes", "<u2"),
        ("group_bytes", "<u4"),
        ("time", "<f8"),
        ("label", "<i8"),
        ("release", "<u8"),
        ("step", "<u8"),
        ("classes", "<u4"),
    ]
)
"""The same as `_PREDICTION_HEAD`, for many at once; the size of the group and what is reserved behind it are 0."""
_DTYPE_NAMES: Final = {0: "none"} | {code: name for name, (code, _) in DTYPE_FORMATS.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """What never changes between records of one input spec, so that a record is checked by a few comparisons."""

    spec: InputSpec
    data: bytes
    """First eight bytes of a data record."""
    feedback: bytes
    """First eight bytes of a feedback record that carries inputs."""
    dims: bytes
    tensor: int
    """Bytes of the inputs."""
    head: struct.Struct
    """Head and dims of a record: first eight bytes, flags, sizes of id and group, time, dims."""


_NO_INPUTS: Final = MAGIC + bytes((VERSION, _FEEDBACK, 0, 0))


@lru_cache(maxsize=64)
def layout_of(spec: InputSpec) -> Layout:
    """Work out the layout of records with these inputs."""
    tail = bytes((DTYPE_FORMATS[spec.dtype.name][0], len(spec.shape)))
    dims = struct.pack(f"<{len(spec.shape)}I", *spec.shape)
    return Layout(
        spec=spec,
        data=MAGIC + bytes((VERSION, _DATA)) + tail,
        feedback=MAGIC + bytes((VERSION, _FEEDBACK)) + tail,
        dims=dims,
        tensor=spec.nbytes,
        head=struct.Struct(f"<8sBxHH2xd8x{len(dims)}s"),
    )


def decode_event(record: Record, layout: Layout) -> Event:
    """Decode one data record.

    Raises:
        BadRecord: The record is not exactly a data record of these inputs.
    """
    value = record.value
    try:
        head, flags, id_bytes, group_bytes, time, dims = layout.head.unpack_from(value)
    except struct.error:
        raise _fault(value, _DATA, layout.spec) from None
    id_at = layout.head.size
    group_at = id_at + id_bytes
    tensor_at = group_at + group_bytes
    if head != layout.data or dims != layout.dims or len(value) != tensor_at + layout.tensor:
        raise _fault(value, _DATA, layout.spec)
    group = _text(value[group_at:tensor_at], "group") if flags & _HAS_GROUP else None
    time = check_time(time if flags & _HAS_TIME else None, record)
    return Event(_text(value[id_at:group_at], "id"), value[tensor_at:], time, group, record)


def decode_feedback(record: Record, layout: Layout) -> Feedback:
    """Decode one feedback record, with inputs of this spec or without inputs.

    Raises:
        BadRecord: The record is not exactly that.
    """
    value = record.value
    bare = value.startswith(_NO_INPUTS)
    id_at = _HEAD.size if bare else layout.head.size
    if len(value) < id_at:
        raise _fault(value, _FEEDBACK, layout.spec)
    head, flags, id_bytes, group_bytes, time, label = _HEAD.unpack_from(value)
    tensor_at = id_at + id_bytes + group_bytes
    if not bare and (head != layout.feedback or value[_HEAD.size : id_at] != layout.dims):
        raise _fault(value, _FEEDBACK, layout.spec)
    tensor = 0 if bare else layout.tensor
    if len(value) != tensor_at + tensor:
        raise _length_fault(value, id_at, tensor)
    event_id = _text(value[id_at : id_at + id_bytes], "id")
    time = check_time(time if flags & _HAS_TIME else None, record)
    inputs = None if bare else value[tensor_at:]
    return Feedback(event_id, *_answer(value, flags, label), time, inputs, record)


def _answer(value: bytes, flags: int, label: int) -> tuple[int | None, float | None]:
    """Label and reward of a feedback record, of which exactly one is set."""
    kind = flags & (_HAS_LABEL | _HAS_REWARD)
    if kind == _HAS_LABEL:
        if label < 0:
            raise BadRecord(Reason.LABEL, f"label must not be negative, not {label}")
        return label, None
    if kind == _HAS_REWARD:
        reward = _REWARD.unpack_from(value, _HEAD.size - _REWARD.size)[0]
        if not math.isfinite(reward):
            raise BadRecord(Reason.NOT_FINITE, "reward must be finite")
        return None, reward
    raise BadRecord(Reason.SCHEMA, "feedback must have either a label or a reward")


def _text(raw: bytes, field: str) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise BadRecord(Reason.NOT_UTF8, f"{field} is not UTF-8") from None
    # The common case without a further call; what is wrong is told by check_id.
    return text if 0 < len(text) <= MAX_ID_CHARS else check_id(text, field)


def _fault(value: bytes, kind: int, spec: InputSpec) -> BadRecord:
    """Say what is wrong with a record that failed a comparison. Reads sizes only, copies nothing."""
    if len(value) < _HEAD.size:
        return BadRecord(Reason.FRAMING, f"record has {len(value)} bytes, its head alone has {_HEAD.size}")
    version, found, code, ndim = value[4:8]
    if version != VERSION:
        return BadRecord(Reason.VERSION, f"record has version {version}, this program reads version {VERSION}")
    if found != kind:
        name = _KINDS.get(found, f"unknown ({found})")
        return BadRecord(Reason.KIND, f"a {_KINDS[kind]} record was expected, its kind is {name}")
    if code != DTYPE_FORMATS[spec.dtype.name][0]:
        name = _DTYPE_NAMES.get(code, f"unknown ({code})")
        return BadRecord(Reason.DTYPE, f"inputs must be {spec.dtype.name}, not {name}")
    if len(value) < _HEAD.size + 4 * ndim:
        return BadRecord(Reason.FRAMING, f"record of {len(value)} bytes ends inside its {ndim} dimensions")
    dims = struct.unpack_from(f"<{ndim}I", value, _HEAD.size)
    if dims != spec.shape:
        shown = f"{ndim} dimensions" if ndim > 8 else str(list(dims))
        return BadRecord(Reason.SHAPE, f"inputs must have shape {list(spec.shape)}, not {shown}")
    return _length_fault(value, _HEAD.size + 4 * ndim, spec.nbytes)


def _length_fault(value: bytes, texts_at: int, tensor: int) -> BadRecord:
    _, _, id_bytes, group_bytes, _, _ = _HEAD.unpack_from(value)
    expected = texts_at + id_bytes + group_bytes + tensor
    return BadRecord(Reason.FRAMING, f"record has {len(value)} bytes, its head announces {expected}")


def _flags(time: float | None, group: str | None = None) -> int:
    if time is not None and not math.isfinite(time):
        raise ValueError(f"time must be a finite number of seconds or None, not {time}")
    return (_HAS_TIME if time is not None else 0) | (_HAS_GROUP if group is not None else 0)


def _encode_text(text: str, field: str) -> bytes:
    try:
        return check_id(text, field).encode()
    except BadRecord as error:
        raise ValueError(error.message) from None


def _little_endian(inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(inputs, dtype=inputs.dtype.newbyteorder("<"))


def encode_events(
    ids: Sequence[str],
    inputs: np.ndarray[Any, Any],
    times: Sequence[float],
    groups: Sequence[str | None] | None = None,
) -> list[bytes]:
    """Encode data records.

    Args:
        ids: One for each event.
        inputs: ``(N, *shape)``.
        times: Seconds, one for each event.
        groups: One for each event, or None.

    Raises:
        ValueError: An id, a time, a group or the dtype cannot be encoded, or lengths differ.
    """
    layout = layout_of(InputSpec(inputs.shape[1:], inputs.dtype))
    raw = _little_endian(inputs).tobytes()
    size = layout.tensor
    encoded = []
    for row, (event_id, time, group) in enumerate(zip(ids, times, groups or [None] * len(ids), strict=True)):
        id_raw = _encode_text(event_id, "id")
        group_raw = b"" if group is None else _encode_text(group, "group")
        head = _HEAD.pack(layout.data, _flags(time, group), len(id_raw), len(group_raw), time, 0)
        encoded.append(b"".join((head, layout.dims, id_raw, group_raw, raw[row * size : (row + 1) * size])))
    if len(encoded) != len(inputs):
        raise ValueError(f"{len(encoded)} ids do not fit {len(inputs)} rows of inputs")
    return encoded


def encode_event(event_id: str, inputs: np.ndarray[Any, Any], time: float | None, group: str | None) -> bytes:
    """Encode one data record; see `streams.codec.encode_event`."""
    layout = layout_of(InputSpec(inputs.shape, inputs.dtype))
    id_raw = _encode_text(event_id, "id")
    group_raw = b"" if group is None else _encode_text(group, "group")
    head = _HEAD.pack(layout.data, _flags(time, group), len(id_raw), len(group_raw), time or 0.0, 0)
    return b"".join((head, layout.dims, id_raw, group_raw, _little_endian(inputs).tobytes()))


def encode_feedback(
    event_id: str,
    *,
    label: int | None,
    reward: float | None,
    time: float | None,
    inputs: np.ndarray[Any, Any] | None,
) -> bytes:
    """Encode one feedback record; see `streams.codec.encode_feedback`."""
    id_raw = _encode_text(event_id, "id")
    layout = None if inputs is None else layout_of(InputSpec(inputs.shape, inputs.dtype))
    first = _NO_INPUTS if layout is None else layout.feedback
    if label is not None:
        head = _HEAD.pack(first, _flags(time) | _HAS_LABEL, len(id_raw), 0, time or 0.0, label)
    else:
        head = _HEAD_REWARD.pack(first, _flags(time) | _HAS_REWARD, len(id_raw), 0, time or 0.0, reward)
    if layout is None or inputs is None:
        return head + id_raw
    return b"".join((head, layout.dims, id_raw, _little_endian(inputs).tobytes()))


def encode_predictions(
    ids: Sequence[str],
    labels: Sequence[int],
    probabilities: np.ndarray[Any, Any],
    times: Sequence[float],
    *,
    record_ids: Sequence[bytes],
    release: int,
    step: int,
) -> Messages:
    """Encode predictions; see `streams.codec.encode_predictions`."""
    classes = probabilities.shape[1]
    tensor = np.ascontiguousarray(probabilities, dtype="<f4")
    keys = list(map(str.encode, ids))
    heads = np.zeros(len(keys), _ANSWER_HEAD)
    heads["first"] = np.void(MAGIC + bytes((VERSION, _PREDICTION, DTYPE_FORMATS["float32"][0], 1)))
    heads["flags"] = _HAS_LABEL | _HAS_TIME
    heads["id_bytes"] = list(map(len, keys))
    heads["time"], heads["label"], heads["release"], heads["step"] = times, labels, release, step
    heads["classes"] = classes
    # Raw elements become bytes, one for each row.
    fixed, tensors = heads.view(f"V{_ANSWER_HEAD.itemsize}").tolist(), tensor.view(f"V{4 * classes}").ravel().tolist()
    values = list(map(b"".join, zip(fixed, keys, tensors, strict=True)))
    return Messages(keys, values, list(zip(zip(repeat("adaptd-id"), record_ids))))


def decode_prediction(value: bytes) -> Prediction:
    """Decode one prediction; see `streams.codec.decode_prediction`."""
    start = _PREDICTION_HEAD.size
    expected = MAGIC + bytes((VERSION, _PREDICTION, DTYPE_FORMATS["float32"][0], 1))
    if len(value) < start or not value.startswith(expected):
        raise _prediction_fault(value)
    _, flags, id_bytes, group_bytes, time, label, release, step, classes = _PREDICTION_HEAD.unpack_from(value)
    tensor_at = start + id_bytes + group_bytes
    if len(value) != tensor_at + 4 * classes:
        raise _length_fault(value, start, 4 * classes)
    if not flags & _HAS_TIME or not math.isfinite(time):
        raise BadRecord(Reason.TIME, "a prediction must have a finite time")
    if label < 0:
        raise BadRecord(Reason.LABEL, f"label must not be negative, not {label}")
    event_id = _text(value[start : start + id_bytes], "id")
    return Prediction(event_id, label, struct.unpack_from(f"<{classes}f", value, tensor_at), time, release, step)


def _prediction_fault(value: bytes) -> BadRecord:
    if len(value) < _PREDICTION_HEAD.size:
        return BadRecord(
            Reason.FRAMING, f"record has {len(value)} bytes, the head of a prediction has {_PREDICTION_HEAD.size}"
        )
    version, found = value[4:6]
    if version != VERSION:
        return BadRecord(Reason.VERSION, f"record has version {version}, this program reads version {VERSION}")
    if found != _PREDICTION:
        name = _KINDS.get(found, f"unknown ({found})")
        return BadRecord(Reason.KIND, f"a prediction record was expected, its kind is {name}")
    return BadRecord(Reason.DTYPE, "probabilities must be float32 of one dimension")
