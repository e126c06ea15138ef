"""Positions as ``meta.json`` holds them."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.errors import BadCheckpointError

_END = 1 << 63


def positions_of(meta: dict[str, Any]) -> dict[tuple[str, int], int]:
    """Return the positions that a checkpoint covers.

    Raises:
        BadCheckpointError: They are missing, or not what is ever written.
    """
    return _read(meta.get("positions"), "positions")


def taken_of(meta: dict[str, Any]) -> dict[tuple[str, int], int]:
    """Return up to where others had worked on partitions that came from them.

    Raises:
        BadCheckpointError: It is not what is ever written.
    """
    membership = meta.get("membership", {})
    if not isinstance(membership, dict):
        raise BadCheckpointError("meta.json: membership is not an object")
    return _read(membership.get("taken", []), "membership.taken")


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
