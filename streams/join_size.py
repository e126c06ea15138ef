"""What waiting events take in memory, in bytes."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["event_bytes", "events_bytes", "sizes_of", "text_bytes"]

_EVENT_BYTES = 384  # two rows of columns, headers of id and inputs, number, slot of a hash table at its emptiest
_GROUP_BYTES = 64


def text_bytes(text: str) -> int:
    """Return what the characters of a string take in memory at most, in bytes."""
    return len(text) if text.isascii() else 8 * len(text) + 24


def event_bytes(id: str, inputs: bytes, group: str | None) -> int:  # noqa: A002 - the field's own word
    """Return what one waiting event takes."""
    size = _EVENT_BYTES + text_bytes(id) + len(inputs)
    return size if group is None else size + _GROUP_BYTES + text_bytes(group)


def events_bytes(ids: Sequence[str], inputs: Sequence[bytes], groups: Sequence[str | None]) -> int:
    """Return what `event_bytes` gives for all of some events together, in a few passes in C."""
    names = "".join(ids)
    size = _EVENT_BYTES * len(ids) + sum(map(len, inputs))
    size += len(names) if names.isascii() else sum(map(text_bytes, ids))
    return size + sum([_GROUP_BYTES + text_bytes(group) for group in groups if group is not None])


def sizes_of(ids: Sequence[str], inputs: Sequence[bytes], groups: Sequence[str | None]) -> list[int]:
    """Return what `event_bytes` gives for each of some events."""
    if any(groups) or not "".join(ids).isascii():
        return list(map(event_bytes, ids, inputs, groups))
    grouped = _EVENT_BYTES + _GROUP_BYTES
    rows = zip(ids, inputs, groups, strict=True)
    return [(_EVENT_BYTES if group is None else grouped) + len(name) + len(body) for name, body, group in rows]
