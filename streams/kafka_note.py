"""What is committed beside an offset: who answered up to it, and from where waiting joins can be rebuilt."""

from __future__ import annotations

import json
from typing import NamedTuple

from streams.base import Found


class Note(NamedTuple):
    """The metadata of one committed offset."""

    owner: str = ""
    """Member that committed it; empty where it is not known."""
    floor: int | None = None
    """See `streams.base.Found.floor`."""

    def pack(self) -> str:
        """Return the text to commit."""
        if self.floor is None:
            return self.owner
        return json.dumps({"member": self.owner, "floor": self.floor}, separators=(",", ":"))


def read_note(text: str | None) -> Note:
    """Return what a committed text says. One that is not ours names an owner at most."""
    text = (text or "").rstrip("\0")  # librdkafka ends with a zero byte what it commits in a transaction
    if not text.startswith("{"):
        return Note(text)
    try:
        found = json.loads(text)
        owner, floor = found["member"], found["floor"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Note(text)
    if not isinstance(owner, str) or type(floor) is not int or floor < 0:
        return Note(text)
    return Note(owner, floor)


def found_beside(text: str | None, earliest: int, committed: int, member: str | None) -> Found:
    """Return what is known of a partition by the text that was committed beside its offset.

    Args:
        text: The text.
        earliest: The first offset that is still there.
        committed: The offset.
        member: Our name in the group.
    """
    note = read_note(text)
    return Found(earliest, committed, bool(note.owner) and note.owner != member, note.floor)
