"""Decoding many data records of the binary form at once, where they are alike, which is nearly always so.

Whatever one record of a group was found to be holds for those that agree with it in every byte that was looked at;
only ids, times and inputs are their own. What is not alike, and whatever may be bad, is left to `streams.codec_binary`,
which decodes record by record and alone says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Final

import numpy as np

from streams.base import Record
from streams.codec_binary import MAGIC, Layout, decode_event
from streams.codec_types import LATEST_TIME, BadRecord, Events
from streams.columns import Records

_LEAST: Final = 8
"""Records of one length, on average, from which decoding them at once pays."""
_DIMS_AT: Final = 32
_SIZES: Final = slice(10, 14)
_GROUP_BYTES: Final = slice(12, 14)
_TIME: Final = slice(16, 24)
_FLAGS_AT: Final = 8
_HAS_TIME: Final = 8


def decode_together(records: Sequence[Record], layout: Layout, max_bytes: int) -> Events | None:
    """Decode records in groups of one length.

    Args:
        records: Of any forms.
        layout: Of their inputs.
        max_bytes: Largest record that is looked at.

    Returns:
        The events in order; None where any record is unlike those of its length, or may be bad.
    """
    values = records.values if isinstance(records, Records) else [record.value for record in records]
    sizes = list(map(len, values))
    kinds = set(sizes)
    if not kinds or max(kinds) > max_bytes or len(records) < _LEAST * len(kinds):
        return None
    if len(kinds) == 1:
        found = _decode(records, values, layout)
        return None if found is None else Events(*found, [None] * len(records), records)
    columns: tuple[list[Any], ...] = tuple([None] * len(records) for _ in range(3))
    for size in kinds:
        places = [at for at, own in enumerate(sizes) if own == size]
        found = _decode([records[at] for at in places], [values[at] for at in places], layout)
        if found is None:
            return None
        for column, part in zip(columns, found, strict=True):
            for at, value in zip(places, part, strict=True):
                column[at] = value
    return Events(*columns, [None] * len(records), records)


def _decode(records: Sequence[Record], values: Sequence[bytes], layout: Layout) -> tuple[list[Any], ...] | None:
    """Ids, inputs and times of records of one length, or None."""
    if not values[0].startswith(MAGIC):
        return None
    try:
        decode_event(records[0], layout)
    except BadRecord:
        return None
    names_at, tensor_at = layout.head.size, len(values[0]) - layout.tensor
    head, tensor = itemgetter(slice(tensor_at)), itemgetter(slice(tensor_at, None))  # called without bytecode
    heads = np.frombuffer(b"".join(map(head, values)), np.uint8).reshape(-1, tensor_at)
    if heads[0, _GROUP_BYTES].any() or not _agree(heads, names_at):
        return None
    if heads[0, _FLAGS_AT] & _HAS_TIME:
        times = np.ascontiguousarray(heads[:, _TIME]).view("<f8").ravel()
    else:
        times = np.array([record.timestamp for record in records])
    names = np.ascontiguousarray(heads[:, names_at:])
    if not names.tobytes().isascii() or not ((times >= 0) & (times < LATEST_TIME)).all():  # nor is a NaN
        return None
    ids = list(map(bytes.decode, names.view(f"V{tensor_at - names_at}").ravel().tolist()))  # raw elements become bytes
    return ids, list(map(tensor, values)), times.tolist()


def _agree(heads: np.ndarray[Any, Any], names_at: int) -> bool:
    """Whether all heads are the same in what is read of them except the time: first bytes, flags, sizes, dims."""
    parts = heads[:, : _FLAGS_AT + 1], heads[:, _SIZES], heads[:, _DIMS_AT:names_at]
    return all(bool((part == part[0]).all()) for part in parts)
