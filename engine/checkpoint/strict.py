"""JSON without surprises: one spelling when written, no ambiguity when read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A JSON value. Floats are finite."""


def dumps(value: Json) -> bytes:
    """Write ``value`` in one line of ASCII with a line feed; floats keep every bit.

    Raises:
        ValueError: A float is not finite, or the nesting is too deep or refers to itself.
        TypeError: Something is not JSON.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"
    except RecursionError:
        raise ValueError("nested too deeply") from None


def loads(raw: bytes) -> Any:
    """Read one JSON value from UTF-8.

    Raises:
        ValueError: Not JSON, a key occurs twice, a number is not finite, or the nesting is too deep.
    """
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return found


def _refuse_constant(literal: str) -> float:
    raise ValueError(f"{literal} is not a number")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal} is too large")
    return value
