"""Committed offsets of a consumer group through kafka-python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kafka import OffsetAndMetadata, TopicPartition, errors

from streams.group_commits import GroupCommits, Noted
from streams.kafka_client import explain


class Commits(GroupCommits):
    """Commits of a `KafkaConsumer`."""

    def failed(self, error: Exception) -> None:
        """Count a failure and wait a moment before the next attempt."""
        self._count(explain(error), fenced=isinstance(error, errors.FencedInstanceIdError))

    def _start(self, consumer: Any, due: Noted) -> None:
        consumer.commit_async(offsets_of(due), callback=self._done)

    def _commit(self, consumer: Any, due: Noted, timeout: float) -> None:
        try:
            consumer.commit(offsets_of(due), timeout_ms=round(timeout * 1000))
        except errors.KafkaError as error:
            self.failed(error)
        else:
            self._confirm(due)

    def _done(self, offsets: Mapping[TopicPartition, Any], outcome: object) -> None:
        # kafka-python keeps callbacks for the thread that polls, so nothing here needs a lock.
        self._quiet_until = 0.0
        if isinstance(outcome, Exception):
            self.failed(outcome)
        else:
            self._confirm({(tp.topic, tp.partition): (at.offset, at.metadata) for tp, at in offsets.items()})


def offsets_of(noted: Noted) -> dict[TopicPartition, Any]:
    """Return offsets and notes as kafka-python takes them."""
    return {TopicPartition(*partition): OffsetAndMetadata(end, note, -1) for partition, (end, note) in noted.items()}
