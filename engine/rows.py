"""Joined rows as a state: one tensor of bytes and a JSON list."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from policies.interfaces import State
from streams.join import Joined

_NAMES = tuple(name for name in Joined._fields if name != "inputs")


def pack(rows: Iterable[Joined]) -> State:
    """Rows as ``inputs``, their bytes one after another, and ``rows``, each the number of its bytes and its fields."""
    rows = list(rows)
    raw = bytearray().join([row.inputs for row in rows])
    return {
        "inputs": torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8),
        "rows": [[len(row.inputs), *(getattr(row, name) for name in _NAMES)] for row in rows],
    }


def unpack(state: State) -> list[Joined]:
    """What `pack` was given."""
    raw = state["inputs"].numpy().tobytes()
    rows, at = [], 0
    for length, *values in state["rows"]:
        rows.append(Joined(**dict(zip(_NAMES, values, strict=True)), inputs=raw[at : at + length]))
        at += length
    return rows
