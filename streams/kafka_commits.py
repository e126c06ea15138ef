"""Committed offsets of a consumer group: one commit under way at a time, none of its errors lost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kafka import OffsetAndMetadata, TopicPartition, errors

from streams.base import Partition, Positions
from streams.kafka_client import explain
from streams.kafka_note import Note

_RETRY = 1.0
"""Seconds before offsets are committed again that could not be."""


class Commits:
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
        self._wanted: Positions = {}
        self._floors: Positions = {}
        self._owned: set[Partition] = set()
        self._quiet_until = 0.0

    def own(self, partitions: set[Partition], stored: Positions) -> None:
        """Take offsets of these partitions from now on; the cluster has ``stored`` of them."""
        self._owned |= partitions
        self.stored.update(stored)

    def disown(self) -> None:
        """Forget all partitions and what was to be committed of them."""
        self._owned.clear()
        self._wanted.clear()
        self._floors.clear()
        self.stored.clear()
        self._quiet_until = 0.0

    def want(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        """Have positions committed by the next `send`; none of partitions that are not ours, and none backwards.

        Args:
            positions: What is answered, by partition.
            floors: What to note beside them; see `streams.base.Found.floor`.
        """
        for partition, end in positions.items():
            if partition in self._owned and end > self.stored.get(partition, -1):
                self._wanted[partition] = end
                if floors and partition in floors:
                    self._floors[partition] = floors[partition]

    def send(self, consumer: Any) -> None:
        """Start a commit where one is due and none is under way.

        Raises:
            kafka.errors.KafkaError: The client refuses, as for a member that was fenced off.
        """
        if not self._wanted or time.monotonic() < self._quiet_until:
            return
        due = self._due()
        if not due:
            self._wanted.clear()
            return
        # The callback comes with a later poll. Should it ever not come, committing goes on after this deadline.
        self._quiet_until = time.monotonic() + 2 * self._timeout
        consumer.commit_async(self._offsets(due), callback=self._done)

    def finish(self, consumer: Any, timeout: float) -> None:
        """Commit what is due and wait for it at most ``timeout`` seconds; a failure is counted."""
        due = self._due()
        if not due:
            return
        try:
            consumer.commit(self._offsets(due), timeout_ms=round(timeout * 1000))
        except errors.KafkaError as error:
            self.failed(error)
        else:
            self.trouble = ""
            self.stored.update(due)

    def failed(self, error: Exception) -> None:
        """Count a failure and wait a moment before the next attempt."""
        self.failures += 1
        self.last_error = explain(error)
        self.trouble = f"offsets cannot be committed ({self.last_error})"
        self.fenced = self.fenced or isinstance(error, errors.FencedInstanceIdError)
        self._quiet_until = time.monotonic() + _RETRY

    def _due(self) -> Positions:
        return {partition: end for partition, end in self._wanted.items() if self.stored.get(partition) != end}

    def _done(self, offsets: Mapping[TopicPartition, Any], outcome: object) -> None:
        # kafka-python keeps callbacks for the thread that polls, so nothing here needs a lock.
        self._quiet_until = 0.0
        if isinstance(outcome, Exception):
            self.failed(outcome)
            return
        self.trouble = ""
        done = {tuple(tp): offset.offset for tp, offset in offsets.items()}
        self.stored.update((partition, end) for partition, end in done.items() if partition in self._owned)

    def _offsets(self, positions: Positions) -> dict[TopicPartition, Any]:
        notes = {p: Note(self._owner, self._floors.get(p)).pack() for p in positions}
        return {TopicPartition(*p): OffsetAndMetadata(end, notes[p], -1) for p, end in positions.items()}
