"""Transactions of a `KafkaClient`.

What kafka-python 3.0 does and this module builds on:

* Once transactions are initialised, its calls wait for the cluster without end.
* It tells a transaction that the cluster gave up (this process stood still for too long) and one that another process
  has ended in the same words. The consumer group tells them apart: whoever runs on a copy of the state directory has
  joined it under the same name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors

from streams.base import Partition, Positions, StreamUnavailableError
from streams.group_commits import Noted
from streams.group_transactions import GroupTransactions
from streams.kafka_client import as_stream_error, connect
from streams.kafka_commits import offsets_of
from streams.kafka_members import members_named


class KafkaTransactions(GroupTransactions):
    """Commits what the sinks of one `KafkaClient` sent together with offsets."""

    def _offsets(self, noted: Noted) -> tuple[Any, Any]:
        return offsets_of(noted), self._member

    def _refuse_if_replaced(self) -> None:
        member = self._metadata()
        if member is None or not member.member_id:
            return  # about to join again; the group tells the consumer if it may not
        holders = members_named(self._client.settings, self._group, self._owner)
        again = self._metadata()
        if again is None or again.member_id != member.member_id:
            raise StreamUnavailableError(f"this process is joining group {self._group} again")
        if holders - {member.member_id}:
            raise self._replaced()

    def _committed(self, partitions: Collection[Partition] | None) -> Positions:
        settings = self._client.settings
        milliseconds = round(settings.timeout * 1000)
        config = settings.consumer_config(group=self._group) | {"isolation_level": "read_committed"}
        consumer = connect(KafkaConsumer, config)
        try:
            if partitions is None:
                partitions = [
                    (topic, n) for topic in self._topics for n in sorted(consumer.partitions_for_topic(topic) or ())
                ]
            found = {p: consumer.committed(TopicPartition(*p), timeout_ms=milliseconds) for p in partitions}
        except errors.KafkaError as error:
            raise as_stream_error(error, f"asking for the offsets of group {self._group}") from error
        finally:
            consumer.close(autocommit=False, timeout_ms=milliseconds)
        return {p: at for p, at in found.items() if at is not None}
