"""What waiting events take in memory, in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["event_bytes", "packed_bytes", "text_bytes"]

_EVENT_BYTES = 320  # its numbers, its id twice (a header too), its own number, slot of a hash table at its emptiest
_GROUP_BYTES = 8
_GONE = 7
"""A seventh more for inputs: as much of a block may have gone, before it is packed anew."""


def text_bytes(text: str) -> int:
    """Return what the characters of a string take in memory at most, in bytes."""
    return len(text) if text.isascii() else 8 * len(text) + 24


def event_bytes(id: str, inputs: int, group: str | None) -> int:  # noqa: A002 - the field's own word
    """Return what one waiting event takes, the inputs of which have so many bytes."""
    size = _EVENT_BYTES + text_bytes(id) + inputs + inputs // _GONE
    return size if group is None else size + _GROUP_BYTES + text_bytes(group)


def packed_bytes(ids: NDArray[Any], inputs: NDArray[Any], groups: NDArray[Any]) -> NDArray[np.int64]:
    """Return what `event_bytes` gives for many, by the lengths of texts in ASCII; -1 where there is no group."""
    sizes = ids.astype(np.int64)
    sizes += inputs
    sizes += inputs // _GONE + _EVENT_BYTES
    sizes += np.where(groups < 0, 0, groups + _GROUP_BYTES)
    return sizes
