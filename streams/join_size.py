"""What waiting events take in memory, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

from streams.join_format import Fields, Waiting

__all__ = ["event_bytes", "events_bytes", "text_bytes"]

_EVENT_BYTES = 384  # tuple, numbers, headers of id and inputs, slot of a hash table at its emptiest
_GROUP_BYTES = 64


def text_bytes(text: str) -> int:
    """Return what the characters of a string take in memory at most, in bytes."""
    return len(text) if text.isascii() else 8 * len(text) + 24


def event_bytes(id: str, fields: Fields) -> int:  # noqa: A002 - the field's own word
    """Return what one waiting event takes."""
    group = fields[2]
    size = _EVENT_BYTES + text_bytes(id) + len(fields[0])
    return size if group is None else size + _GROUP_BYTES + text_bytes(group)


def events_bytes(items: Sequence[Waiting]) -> int:
    """Return what `event_bytes` gives for all of them together, in a few passes in C."""
    names = "".join([item[0] for item in items])
    size = _EVENT_BYTES * len(items) + sum([len(item[1]) for item in items])
    size += len(names) if names.isascii() else sum([text_bytes(item[0]) for item in items])
    return size + sum([_GROUP_BYTES + text_bytes(item[3]) for item in items if item[3] is not None])
