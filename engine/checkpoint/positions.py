"""Positions, and what belongs to partitions, as ``meta.json`` holds it."""

from __future__ import annotations

import math
from typing import Any

from engine.checkpoint.errors import BadCheckpointError

_END = 1 << 63


def positions_of(meta: dict[str, Any]) -> dict[tuple[str, int], int]:
    """Return the positions that a checkpoint covers.

    Raises:
        BadCheckpointError: They are missing, or not what is ever written.
    """
    return _read(meta.get("positions"), "positions")


def check(meta: dict[str, Any]) -> None:
    """Refuse positions, memberships, identities of streams and a form of inputs that are not what is ever written.

    Raises:
        BadCheckpointError: One of them is not.
    """
    for key in ("membership", "identities", "form"):
        if not isinstance(meta.get(key, {}), dict):
            raise BadCheckpointError(f"meta.json: {key} is not an object")
    positions_of(meta)
    membership = meta.get("membership", {})
    _read(membership.get("taken", []), "membership.taken")
    rows = membership.get("marks", [])
    if not isinstance(rows, list):
        raise BadCheckpointError("meta.json: membership.marks is not a list")
    for at, row in enumerate(rows):
        if not _marks(row):
            raise BadCheckpointError(
                f"meta.json: membership.marks[{at}] is not a stream, a partition, offsets, and a time for each"
            )


def _marks(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 4 or not isinstance(row[0], str) or not _fits(row[1]):
        return False
    firsts, times = row[2:]
    if not isinstance(firsts, list) or not isinstance(times, list) or len(firsts) != len(times):
        return False
    return all(map(_fits, firsts)) and all(map(_is_time, times))


def _is_time(text: Any) -> bool:
    try:
        return not math.isnan(float.fromhex(text))
    except (TypeError, ValueError, OverflowError):
        return False


def _read(rows: Any, name: str) -> dict[tuple[str, int], int]:
    if not isinstance(rows, list):
        raise BadCheckpointError(f"meta.json: {name} is missing or is not a list")
    found: dict[tuple[str, int], int] = {}
    for at, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], str) or not all(map(_fits, row[1:])):
            raise BadCheckpointError(f"meta.json: {name}[{at}] is not a stream, a partition and an offset")
        partition = row[0], row[1]
        if partition in found:
            raise BadCheckpointError(f"meta.json: {name} names partition {row[1]} of {row[0]!r} twice")
        found[partition] = row[2]
    return found


def _fits(number: Any) -> bool:
    return type(number) is int and 0 <= number < _END
