"""What is committed beside an offset: who answered up to it, and from where waiting joins can be rebuilt."""

from __future__ import annotations

import json
from typing import NamedTuple


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
