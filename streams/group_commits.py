"""Committed offsets of a consumer group: one commit under way at a time, none of its errors lost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from streams.base import Found, Partition, Positions
from streams.kafka_note import Note
from streams.seams import CLOCK

_RETRY = 1.0
"""Seconds before offsets are committed again that could not be."""

Noted = Mapping[Partition, tuple[int, str]]
"""What is committed, by partition: an offset, and the note beside it."""


class GroupCommits(ABC):
    """What shall be committed, what is, and what went wrong. Used by the polling thread alone.

    Commits that come while one is under way go out together after it. One that fails is counted and tried again with
    whatever has come since, so offsets go forward and an outage leaves no backlog.
    """

    def __init__(self, timeout: float, owner: str = "") -> None:
        """Prepare.

        Args:
            timeout: Seconds to wait for the cluster.
            owner: Name that is committed with every offset.
        """
        self.failures = 0
        """Commits that failed."""
        self.last_error: str | None = None
        """Why the last one that failed did."""
        self.trouble = ""
        """What keeps offsets from being committed; empty once one has been again."""
        self.fenced = False
        """Whether another process has taken this member's name."""
        self.stored: Positions = {}
        """What the cluster has confirmed, for the partitions now assigned."""
        self._timeout = timeout
        self._owner = owner
        self._wanted: dict[Partition, tuple[int, str]] = {}
        self._notes: dict[Partition, str] = {}
        self._owned: set[Partition] = set()
        self._quiet_until = 0.0

    def own(self, partitions: set[Partition], stored: Mapping[Partition, int]) -> None:
        """Take offsets of these partitions from now on; the cluster has ``stored`` of them."""
        self._owned |= partitions
        self.stored.update(stored)

    def disown(self) -> None:
        """Forget all partitions and what was to be committed of them."""
        for kept in (self._owned, self._wanted, self._notes, self.stored):
            kept.clear()
        self._quiet_until = 0.0

    def want(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        """Have positions committed by the next `send`; none of partitions that are not ours, and none backwards.

        Args:
            positions: What is answered, by partition.
            floors: What to note beside them; see `streams.base.Found.floor`.
        """
        floors = floors or {}
        for partition, end in positions.items():
            if partition in self._owned and end >= self.stored.get(partition, 0):
                self._wanted[partition] = end, Note(self._owner, floors.get(partition)).pack()

    def are_ours(self, partition: Partition, found: Found) -> bool:
        """Whether what the group has of a partition was committed by us."""
        if self._owner:
            return not found.theirs
        wanted = self._wanted.get(partition, (None, ""))[0]
        return not found.theirs and found.committed in (self.stored.get(partition), wanted)

    def send(self, consumer: Any) -> None:
        """Start a commit where one is due and none is under way.

        Raises:
            Exception: As the client raises it where it refuses, as for a member that was fenced off.
        """
        if not self._wanted or CLOCK.monotonic() < self._quiet_until:
            return
        self._wanted = due = self._due()
        if not due:
            return
        # The client tells with a later poll how it went. Should it ever not, committing goes on after this deadline.
        self._quiet_until = CLOCK.monotonic() + 2 * self._timeout
        self._start(consumer, due)

    def finish(self, consumer: Any, timeout: float) -> None:
        """Commit what is due and wait for it at most ``timeout`` seconds; a failure is counted."""
        if due := self._due():
            self._commit(consumer, due, timeout)

    @abstractmethod
    def failed(self, error: Any) -> None:
        """Count a failure, as the client tells it, and wait a moment before the next attempt."""

    @abstractmethod
    def _start(self, consumer: Any, due: Noted) -> None:
        """Begin to commit; `_confirm` or `failed` is called out of a later poll."""

    @abstractmethod
    def _commit(self, consumer: Any, due: Noted, timeout: float) -> None:
        """Commit, wait, and call `_confirm`, or count why not."""

    def _count(self, told: str, *, fenced: bool = False) -> None:
        self.failures += 1
        self.last_error = told
        self.trouble = f"offsets cannot be committed ({told})"
        self.fenced = self.fenced or fenced
        self._quiet_until = CLOCK.monotonic() + _RETRY

    def _confirm(self, committed: Noted) -> None:
        self.trouble = ""
        for partition, (end, note) in committed.items():
            if partition in self._owned:
                self.stored[partition] = end
                self._notes[partition] = note

    def _due(self) -> dict[Partition, tuple[int, str]]:
        return {p: at for p, at in self._wanted.items() if at[0] != self.stored.get(p) or self._is_news(p, at[1])}

    def _is_news(self, partition: Partition, note: str) -> bool:
        """Whether a note changes one of ours. One of somebody else stands until we have answered something."""
        return self._notes.get(partition, note) != note
