"""Committed offsets of a consumer group through librdkafka: every wait bounded."""

from __future__ import annotations

from collections.abc import Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streams.confluent_client import explain
from streams.group_commits import GroupCommits, Noted


class Commits(GroupCommits):
    """Commits of a `Consumer` that calls `done` when it has committed."""

    def done(self, error: KafkaError | None, partitions: Sequence[TopicPartition]) -> None:
        """Hear how a commit went; librdkafka calls it out of a poll."""
        self._quiet_until = 0.0
        failed = error or next((tp.error for tp in partitions if tp.error is not None), None)
        if failed is not None:
            self.failed(failed)
            return
        self._confirm({(tp.topic, tp.partition): (tp.offset, tp.metadata or "") for tp in partitions})

    def failed(self, error: KafkaException | KafkaError) -> None:
        """Count a failure and wait a moment before the next attempt."""
        told = explain(error)
        self._count(told, fenced="FENCED_INSTANCE_ID" in told or "same group.instance.id" in told)

    def _start(self, consumer: Consumer, due: Noted) -> None:
        consumer.commit(offsets=offsets_of(due), asynchronous=True)

    def _commit(self, consumer: Consumer, due: Noted, timeout: float) -> None:
        # librdkafka bounds no wait for a commit. Asking the same coordinator, over the same connection, what is
        # committed does wait for it, with a bound; and this may be done while a rebalance waits for us.
        try:
            consumer.commit(offsets=offsets_of(due), asynchronous=True)
            found = consumer.committed([TopicPartition(*partition) for partition in due], timeout=timeout)
        except KafkaException as error:
            self.failed(error)
            return
        reached = {(tp.topic, tp.partition): tp.offset for tp in found if tp.error is None}
        if any(reached.get(partition) != end for partition, (end, _) in due.items()):
            self._count("the cluster has not taken the last offsets")
        else:
            self._confirm(due)


def offsets_of(noted: Noted) -> list[TopicPartition]:
    """Return offsets and notes as librdkafka takes them."""
    return [TopicPartition(*partition, end, note) for partition, (end, note) in noted.items()]
