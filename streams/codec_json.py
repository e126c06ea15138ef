"""The JSON form of the default message schemas, read strictly.

Data, feedback and prediction are objects; ``version`` may be left out and then is 1; other fields are ignored::

    {"version": 1, "id": "a", "inputs": INPUTS, "time": 1700000000.5, "group": "tenant-7"}
    {"version": 1, "id": "a", "label": 3, "time": 1700000060}
    {"version": 1, "id": "a", "reward": 0.5, "time": 1700000060, "inputs": INPUTS}
    {"version": 1, "id": "a", "label": 3, "probabilities": [0.1, ...], "time": 1700000000.5,
     "model": {"release": 4, "step": 1200}}

INPUTS are nested lists of numbers, or a tensor ``{"dtype": "uint8", "shape": [32, 32, 3], "data": BASE64}`` of
little-endian elements in C order. ``time`` is in seconds; without it the timestamp of the stream counts. Optional
fields may be null. Refused: NaN and infinities, keys given twice, nesting deeper than `MAX_DEPTH`, true and false as
numbers, fractions where integers belong, and numbers that the dtype cannot hold.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import json
import math
import struct
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from json.encoder import encode_basestring_ascii
from typing import Any, Final, NoReturn, cast

import numpy as np

from streams.base import Record
from streams.codec_types import (
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

MAX_DEPTH: Final = 32
"""Deepest nesting of lists and objects that is parsed."""

_MAX_LABEL: Final = 2**63 - 1
quote: Callable[[str], str] = encode_basestring_ascii
"""Write a text as JSON."""


def _refuse_constant(name: str) -> NoReturn:
    raise BadRecord(Reason.NOT_FINITE, f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadRecord(Reason.DUPLICATE_KEY, "a key is given twice in one object")
    return found


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS: Final = bytes(code for code in range(256) if code not in b"[]{}")


def check_depth(value: bytes) -> None:
    """Refuse nesting beyond `MAX_DEPTH` before the parser, which recurses, sees it.

    Raises:
        BadRecord: Lists and objects nest deeper.
    """
    if value.count(b"[") + value.count(b"{") <= MAX_DEPTH:
        return
    # Taking the innermost pairs away at once costs one pass for each level, all of them in C.
    if not _peel(value.translate(_BRACKETS, _NOT_BRACKETS)):
        return
    # Something is left: brackets inside strings, which do not nest, or real depth, or a text that is no JSON.
    rest = _peel(_without_strings(value).translate(_BRACKETS, _NOT_BRACKETS))
    if b"[]" in rest or rest.count(b"[") > MAX_DEPTH:
        raise BadRecord(Reason.NESTING, f"lists and objects nest deeper than {MAX_DEPTH}")


def _peel(brackets: bytes) -> bytes:
    for _ in range(MAX_DEPTH):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    return brackets


def _without_strings(value: bytes) -> bytes:
    # With escapes gone every quote left begins or ends a string, so each second piece is the inside of one.
    return b"".join(value.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


_FIELDS: Final = frozenset({"version", "id", "inputs", "time", "group"})
orjson: Final[Any] = importlib.import_module("orjson") if importlib.util.find_spec("orjson") else None
"""A much faster parser, where it is installed. What it makes of a record counts only where that is beyond doubt."""


def parse_quickly(values: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """Parse objects of the version that is read, if all are that beyond doubt; None leaves them to `parse`.

    orjson refuses all that is no JSON, NaN and infinities, also where nesting is very deep, and reads every number as
    `parse` does but for integers of more than 64 bits: these become the float that is nearest, which is what becomes of
    them in any field that takes fractions, and which no field for integers takes. It keeps the last of equal keys, so
    keys are counted: each has a colon behind it, and where there are no more colons than different keys, no key is
    there twice.
    """
    try:
        parsed: list[dict[str, Any]] = list(map(orjson.loads, values))
        if set(map(type, parsed)) != {dict}:
            return None
        inputs = [one.get("inputs") for one in parsed]
        fields = chain.from_iterable(set(map(tuple, parsed)))
        if dict in set(map(type, inputs)) or not _FIELDS.issuperset(fields):  # else whatever nests is looked at later
            for value in values:
                check_depth(value)
    except (BadRecord, ValueError):
        return None
    versions = [one.get("version", VERSION) for one in parsed]
    if set(map(type, versions)) != {int} or set(versions) != {VERSION}:
        return None
    keys = [len(one) + (len(own) if type(own) is dict else 0) for one, own in zip(parsed, inputs, strict=True)]
    return parsed if keys == list(map(bytes.count, values, repeat(b":"))) else None


def parse(value: bytes) -> dict[str, Any]:
    """Parse one object of the version that is read.

    Raises:
        BadRecord: The bytes are not that, or not strictly JSON.
    """
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(Reason.NOT_UTF8, f"record is not UTF-8 at byte {error.start}") from None
    check_depth(value)
    try:
        parsed = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise BadRecord(Reason.NOT_JSON, f"record is not JSON at character {error.pos}: {error.msg}") from None
    except ValueError:
        # The interpreter's own limit on the digits of an integer.
        raise BadRecord(Reason.NOT_JSON, "record holds an integer of thousands of digits") from None
    if type(parsed) is not dict:
        raise BadRecord(Reason.SCHEMA, f"record must be a JSON object, not {_kind(parsed)}")
    version = parsed.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        shown = repr(version)[:40]
        raise BadRecord(Reason.VERSION, f"record has version {shown}, this program reads version {VERSION}")
    return parsed


_JSON_KINDS: Final = {
    dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "an integer", float: "a number",
}  # fmt: skip


def _kind(value: object) -> str:
    return _JSON_KINDS.get(type(value), "null")


def _required(parsed: dict[str, Any], field: str) -> Any:
    value = parsed.get(field)
    if value is None:
        raise BadRecord(Reason.SCHEMA, f"field {field} is missing")
    return value


def _number(value: object, field: str, reason: Reason) -> float:
    if type(value) is not int and type(value) is not float:
        raise BadRecord(reason, f"{field} must be a number, not {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRecord(reason, f"{field} must be a finite number")
    return number


def _time(parsed: dict[str, Any], record: Record) -> float:
    time = parsed.get("time")
    return check_time(None if time is None else _number(time, "time", Reason.TIME), record)


def read_label(value: object) -> int:
    """Return the value if it may be a label.

    Raises:
        BadRecord: Not an integer, or out of range.
    """
    if type(value) is not int:
        raise BadRecord(Reason.LABEL, f"label must be an integer, not {_kind(value)}")
    if not 0 <= value <= _MAX_LABEL:
        raise BadRecord(Reason.LABEL, "label must be between 0 and 2^63 - 1")
    return value


def decode_event(record: Record, spec: InputSpec) -> Event:
    """Decode one data record.

    Raises:
        BadRecord: The record is not exactly a data record of these inputs.
    """
    if orjson is not None and (parsed := parse_quickly([record.value])) is not None:
        try:
            return _event(parsed[0], record, spec)
        except BadRecord:
            pass  # what is wrong is told by the parser that all reasons are defined by
    return _event(parse(record.value), record, spec)


def _event(parsed: dict[str, Any], record: Record, spec: InputSpec) -> Event:
    event_id = check_id(_required(parsed, "id"))
    inputs = inputs_of(_required(parsed, "inputs"), spec)
    group = parsed.get("group")
    time = _time(parsed, record)
    return Event(event_id, inputs, time, None if group is None else check_id(group, "group"), record)


def decode_feedback(record: Record, spec: InputSpec) -> Feedback:
    """Decode one feedback record, with inputs of this spec or without inputs.

    Raises:
        BadRecord: The record is not exactly that.
    """
    parsed = parse(record.value)
    event_id = check_id(_required(parsed, "id"))
    label, reward, inputs = parsed.get("label"), parsed.get("reward"), parsed.get("inputs")
    if (label is None) == (reward is None):
        raise BadRecord(Reason.SCHEMA, "feedback must have either a label or a reward")
    return Feedback(
        event_id,
        None if label is None else read_label(label),
        None if reward is None else _number(reward, "reward", Reason.SCHEMA),
        _time(parsed, record),
        None if inputs is None else inputs_of(inputs, spec),
        record,
    )


def decode_prediction(value: bytes) -> Prediction:
    """Decode one prediction; see `streams.codec.decode_prediction`."""
    parsed = parse(value)
    model = _required(parsed, "model")
    if type(model) is not dict:
        raise BadRecord(Reason.SCHEMA, f"model must be an object, not {_kind(model)}")
    probabilities = _required(parsed, "probabilities")
    if type(probabilities) is not list:
        raise BadRecord(Reason.SCHEMA, f"probabilities must be a list, not {_kind(probabilities)}")
    values = [math.nan if p is None else _number(p, "probabilities", Reason.SCHEMA) for p in probabilities]
    try:
        exact = struct.unpack(f"<{len(values)}f", struct.pack(f"<{len(values)}f", *values))
    except OverflowError:
        raise BadRecord(Reason.RANGE, "probabilities must fit float32") from None
    return Prediction(
        check_id(_required(parsed, "id")),
        read_label(_required(parsed, "label")),
        exact,
        _number(_required(parsed, "time"), "time", Reason.TIME),
        _count(model, "release"),
        _count(model, "step"),
    )


def _count(model: dict[str, Any], field: str) -> int:
    value = model.get(field)
    if type(value) is not int or value < 0:
        raise BadRecord(Reason.SCHEMA, f"model.{field} must be an integer of at least 0")
    return value


def inputs_of(value: object, spec: InputSpec) -> bytes:
    """Return the inputs of a record, checked.

    Raises:
        BadRecord: They are not what the spec says.
    """
    if type(value) is dict:
        return _tensor(value, spec)
    if type(value) is list and len(spec.shape) == 1 and len(value) == spec.count:
        return _pack(value, spec)
    level = [value]
    for size in spec.shape:
        if set(map(type, level)) != {list} or set(map(len, cast("list[list[Any]]", level))) != {size}:
            raise BadRecord(Reason.SHAPE, spec.unlike(value))
        level = list(chain.from_iterable(cast("list[list[Any]]", level)))
    return _pack(level, spec)


def _pack(elements: list[Any], spec: InputSpec) -> bytes:
    """Turn checked numbers into bytes; `struct` refuses what the dtype cannot hold."""
    name = spec.name
    fractions = spec.dtype.kind == "f"
    kinds = set(map(type, elements))
    if not kinds <= ({int, float} if fractions else {int}):
        found = _kind(next(e for e in elements if type(e) is not int and (type(e) is not float or not fractions)))
        raise BadRecord(Reason.DTYPE, f"inputs must be {'numbers' if fractions else 'integers'} ({name}), not {found}")
    try:
        packed = spec.packer.pack(*elements)
    except (struct.error, OverflowError):
        raise BadRecord(Reason.RANGE, f"inputs hold a number that {name} cannot hold") from None
    # A literal such as 1e999 reads as infinite, and `struct` lets it through.
    if float in kinds and not _all_finite(elements):
        raise BadRecord(Reason.RANGE, f"inputs hold a number that {name} cannot hold")
    return packed


def _all_finite(elements: list[float]) -> bool:
    try:
        if math.isfinite(sum(elements)):  # nothing infinite can be in it; and it is a third of the work
            return True
    except OverflowError:  # integers that a float holds one by one, but not together
        pass
    return all(map(math.isfinite, elements))


def _tensor(value: dict[str, Any], spec: InputSpec) -> bytes:
    if value.get("dtype") != spec.name:
        raise BadRecord(Reason.DTYPE, f"inputs must be {spec.name}, not {str(value.get('dtype'))[:20]}")
    shape = value.get("shape")
    if type(shape) is not list or shape != list(spec.shape) or not set(map(type, shape)) <= {int}:
        raise BadRecord(Reason.SHAPE, f"inputs must have shape {list(spec.shape)}")
    data = value.get("data")
    if type(data) is not str:
        raise BadRecord(Reason.SCHEMA, f"inputs.data must be a string in base64, not {_kind(data)}")
    expected = 4 * -(-spec.nbytes // 3)
    if len(data) != expected:
        raise BadRecord(Reason.FRAMING, f"inputs.data has {len(data)} characters of base64, its shape needs {expected}")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise BadRecord(Reason.FRAMING, "inputs.data is not base64") from None
    if len(raw) != spec.nbytes:
        raise BadRecord(Reason.FRAMING, f"inputs.data has {len(raw)} bytes, its shape needs {spec.nbytes}")
    return raw


def _finite(value: float | None, field: str) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{field} must be finite, not {value}")
    return value


def _inputs_object(inputs: np.ndarray[Any, Any]) -> dict[str, Any]:
    spec = InputSpec(inputs.shape, inputs.dtype)
    raw = np.ascontiguousarray(inputs, dtype=inputs.dtype.newbyteorder("<")).tobytes()
    return {"dtype": spec.dtype.name, "shape": list(spec.shape), "data": base64.b64encode(raw).decode()}


def _dump(fields: dict[str, Any]) -> bytes:
    present = {name: value for name, value in fields.items() if value is not None}
    try:
        present["id"] = check_id(present.get("id"))
        if "group" in present:
            check_id(present["group"], "group")
    except BadRecord as error:
        raise ValueError(error.message) from None
    return json.dumps({"version": VERSION} | present, separators=(",", ":"), allow_nan=False).encode()


def encode_event(
    event_id: str, inputs: np.ndarray[Any, Any], time: float | None, group: str | None, *, tensor: bool
) -> bytes:
    """Encode one data record; see `streams.codec.encode_event`."""
    value = _inputs_object(inputs) if tensor else inputs.tolist()
    return _dump({"id": event_id, "inputs": value, "time": _finite(time, "time"), "group": group})


def encode_feedback(
    event_id: str,
    *,
    label: int | None,
    reward: float | None,
    time: float | None,
    inputs: np.ndarray[Any, Any] | None,
) -> bytes:
    """Encode one feedback record; see `streams.codec.encode_feedback`."""
    fields = {"id": event_id, "label": label, "reward": reward, "time": _finite(time, "time")}
    return _dump(fields | {"inputs": None if inputs is None else _inputs_object(inputs)})
