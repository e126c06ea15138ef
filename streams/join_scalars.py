"""The scalars of a join store as they come out of a file: nothing of them is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from streams.join_format import JoinError

__all__ = ["Scalars", "read_scalars"]

_MOST = 1 << 53


class Scalars(NamedTuple):
    """What `JoinStore.snapshot` wrote of itself."""

    counts: dict[str, int]
    watermark: float
    swept: float
    marks: list[tuple[float, int]]


def read_scalars(payload: bytes, kinds: Sequence[str]) -> Scalars:
    """Return the scalars in a payload; a count that it does not name is 0.

    Args:
        payload: One JSON object.
        kinds: The counts that there are.

    Raises:
        JoinError: A scalar is missing, or is not what is ever written.
    """
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise JoinError(f"the saved joins cannot be read: their scalars are not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("counts"), dict):
        raise _wrong("counts")
    counts = {name: _count(found["counts"].get(name, 0), name) for name in kinds}
    if min(counts.values()) < 0:
        raise _wrong("counts")
    marks = found.get("marks")
    if not isinstance(marks, list) or not all(isinstance(mark, list) and len(mark) == 2 for mark in marks):
        raise _wrong("marks")
    return Scalars(
        counts,
        _time(found.get("watermark"), "watermark"),
        _time(found.get("swept"), "swept"),
        # What was forgotten since may be more than what a mark counted: it is below 0 then.
        [(_time(time, "marks"), _count(count, "marks")) for time, count in marks],
    )


def _count(value: Any, name: str) -> int:
    if type(value) is not int or abs(value) > _MOST:
        raise _wrong(name)
    return value


def _time(value: Any, name: str) -> float:
    try:
        time = float.fromhex(value)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(name) from None
    if math.isnan(time):
        raise _wrong(name)
    return time


def _wrong(name: str) -> JoinError:
    return JoinError(f"the saved joins cannot be read: {name} is missing or is not what is ever written")
