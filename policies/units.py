"""Durations and sizes as people write them: ``20ms``, ``24h``, ``256MB``, ``64MiB``.

`Duration` and `Size` are field types for every parameter model: they take a plain number (seconds, bytes) or a number
with a unit, and give plain numbers to the code behind them.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, WithJsonSchema

N = TypeVar("N", int, float)

SECONDS: dict[str, float] = {
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 604800.0,
}
"""Seconds in each unit of a duration."""

BYTES: dict[str, int] = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
"""Bytes in each unit of a size."""

LONGEST = 1e10
"""Seconds that a duration may have: three hundred years."""

LARGEST = 2**62
"""Bytes that a size may have."""

_QUANTITY = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]+)\s*")


def _quantity(value: str) -> tuple[str, str]:
    """The number and the unit of a quantity; two empty strings where it is none."""
    found = _QUANTITY.fullmatch(value)
    return (found[1], found[2]) if found else ("", "")


def _within(value: object, found: N, limit: float, unit: str) -> N:
    if found > limit:
        raise ValueError(f"{value!r} is more than anybody can mean; at most {limit:g} {unit}")
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def seconds(value: Any) -> float:
    """Seconds of a duration.

    Args:
        value: A non-negative number of seconds, or a string such as ``20ms``, ``1.5h`` or ``7d``.

    Raises:
        ValueError: If it is neither, or longer than `LONGEST`.

    Example:
        >>> seconds("20ms"), seconds("24h"), seconds(3)
        (0.02, 86400.0, 3.0)
    """
    if _number(value):
        return _within(value, float(value), LONGEST, "seconds")
    number, unit = _quantity(value) if isinstance(value, str) else ("", "")
    if unit not in SECONDS:
        raise ValueError(
            f"{value!r} is not a duration; write seconds as a number, or a number with one of the units "
            f"{', '.join(SECONDS)}, such as 20ms or 24h"
        )
    return _within(value, float(number) * SECONDS[unit], LONGEST, "seconds")


def size(value: Any) -> int:
    """Bytes of a size.

    Args:
        value: A non-negative whole number of bytes, or a string such as ``256MB`` (decimal) or ``64MiB`` (binary).

    Raises:
        ValueError: If it is neither, not a whole number of bytes, or more than `LARGEST`.

    Example:
        >>> size("256MB"), size("64MiB"), size(512)
        (256000000, 67108864, 512)
    """
    if _number(value) and value == int(value):
        return _within(value, int(value), LARGEST, "bytes")
    number, unit = _quantity(value) if isinstance(value, str) else ("", "")
    if unit not in BYTES:
        raise ValueError(
            f"{value!r} is not a size; write bytes as a whole number, or a number with one of the units "
            f"{', '.join(BYTES)}, such as 256MB or 64MiB"
        )
    return _within(value, round(float(number) * BYTES[unit]), LARGEST, "bytes")


def _schema(kind: str, units: dict[str, Any]) -> WithJsonSchema:
    """Describe both ways of writing a quantity to editors."""
    pattern = rf"^\s*\d+(\.\d+)?\s*({'|'.join(units)})\s*$"
    return WithJsonSchema({"anyOf": [{"type": kind, "minimum": 0}, {"type": "string", "pattern": pattern}]})


Duration = Annotated[float, BeforeValidator(seconds), Field(ge=0), _schema("number", SECONDS)]
"""A duration in seconds."""

PositiveDuration = Annotated[float, BeforeValidator(seconds), Field(gt=0), _schema("number", SECONDS)]
"""A duration in seconds, longer than nothing."""

Size = Annotated[int, BeforeValidator(size), Field(ge=0), _schema("integer", BYTES)]
"""A size in bytes."""
