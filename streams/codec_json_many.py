"""The JSON form for many records at once: what `streams.codec_json` gives, but in columns, by orjson if it is there."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import compress, repeat, starmap
from typing import Any, Final

import numpy as np

from streams import codec_json
from streams.base import Record
from streams.codec_json import inputs_of, parse_quickly, quote
from streams.codec_types import LATEST_TIME, MAX_ID_CHARS, VERSION, BadRecord, Events, InputSpec
from streams.columns import Messages, Records

__all__ = ["decode_together", "encode_predictions"]

_MOST_BYTES: Final = 1 << 22
"""Of all values: parsed, they take some times as much memory; larger records are parsed one by one as fast."""


def decode_together(records: Sequence[Record], spec: InputSpec, max_bytes: int) -> Events | None:
    """Decode data records.

    Args:
        records: Of any forms.
        spec: What inputs are in these records.
        max_bytes: Largest record that is looked at.

    Returns:
        The events in order; None without orjson, and where any record is not of this form, or may be bad.
    """
    rows = Records.of(records)
    if codec_json.orjson is None or not rows:
        return None
    sizes = list(map(len, rows.values))
    parsed = parse_quickly(rows.values) if max(sizes) <= max_bytes and sum(sizes) <= _MOST_BYTES else None
    if parsed is None:
        return None
    ids, groups = _column(parsed, "id"), _column(parsed, "group")
    times = _times(_column(parsed, "time"), rows.timestamps)
    if times is None or not _are_ids(ids) or not _are_ids([group for group in groups if group is not None]):
        return None
    inputs = _inputs(_column(parsed, "inputs"), rows.values, spec)
    return None if inputs is None else Events(ids, inputs, times, groups, rows)


def _column(parsed: Iterable[dict[str, Any]], field: str) -> list[Any]:
    return [one.get(field) for one in parsed]


def _are_ids(values: Sequence[Any]) -> bool:
    """Whether `check_id` takes all of them."""
    if not values:
        return True
    if set(map(type, values)) != {str} or not min(map(len, values)) or max(map(len, values)) > MAX_ID_CHARS:
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _times(found: Sequence[Any], timestamps: Sequence[float]) -> list[float] | None:
    """What `check_time` gives for all of them, if it takes them."""
    chosen = [stamp if time is None else time for time, stamp in zip(found, timestamps, strict=True)]
    if not set(map(type, chosen)) <= {int, float}:
        return None
    times = np.array(chosen, np.float64)
    return times.tolist() if ((times >= 0) & (times < LATEST_TIME)).all() else None  # nor is a NaN


def _inputs(found: Sequence[Any], values: Sequence[bytes], spec: InputSpec) -> list[bytes] | None:
    """The inputs of all, if they are good."""
    if len(spec.shape) != 1 or set(map(type, found)) != {list} or set(map(len, found)) != {spec.count}:
        try:
            return [inputs_of(one, spec) for one in found]
        except BadRecord:
            return None
    try:
        packed = list(starmap(spec.packer.pack, found))
    except (struct.error, OverflowError):
        return None
    rows = np.frombuffer(b"".join(packed), spec.dtype).reshape(len(packed), -1)
    # A literal such as 1e999 reads as infinite, and `struct` lets it through.
    if spec.dtype.kind == "f" and not np.isfinite(rows).all():
        return None
    # For `struct` true and false are integers.
    maybe = compress(values, ((rows == 0) | (rows == 1)).any(1).tolist())
    return None if any(b"true" in value or b"false" in value for value in maybe) else packed


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
    tail = f'"model":{{"release":{release},"step":{step}}}}}'
    template = f'{{"version":{VERSION},"id":%s,"label":%d,"probabilities":[%s],"time":%r,{tail}'
    rows = zip(map(quote, ids), labels, _texts(np.ascontiguousarray(probabilities, np.float32)), times, strict=True)
    values = list(map(str.encode, map(template.__mod__, rows)))
    return Messages(list(map(str.encode, ids)), values, list(zip(zip(repeat("adaptd-id"), record_ids))))


def _texts(rows: np.ndarray[Any, Any]) -> Sequence[str]:
    """The numbers of each row, from which every float32 can be had back; null for what JSON has no number for."""
    if not len(rows):
        return []
    if (orjson := codec_json.orjson) is not None:
        text: str = orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY).decode()  # the fewest digits that do
        return text[2:-2].split("],[")
    slots = ",".join(["%.9g"] * rows.shape[1])  # and as many as are always enough
    texts = map(slots.__mod__, map(tuple, rows.tolist()))
    if np.isfinite(rows).all():
        return list(texts)
    return [
        text if finite else ",".join("null" if one in _NO_NUMBERS else one for one in text.split(","))
        for text, finite in zip(texts, np.isfinite(rows).all(1), strict=True)
    ]


_NO_NUMBERS: Final = frozenset({"nan", "-nan", "inf", "-inf"})
