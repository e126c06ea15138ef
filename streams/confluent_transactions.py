"""Transactions of a `ConfluentClient`.

librdkafka 2.16 takes a deadline with each call, but while a broker comes back its ``send_offsets_to_transaction`` may
last without end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, TopicPartition

from streams.base import Partition, Positions, StreamUnavailableError
from streams.confluent_client import as_stream_error, make
from streams.confluent_commits import offsets_of
from streams.confluent_config import consumer_config
from streams.group_commits import Noted
from streams.group_transactions import GroupTransactions
from streams.kafka_members import members_named


class Membership(NamedTuple):
    """A member of a group at one moment."""

    metadata: Any
    """What librdkafka sends with offsets, so that the cluster refuses those of a member that its group has missed."""
    member_id: str
    placed: bool
    """Whether everything that we held before, and hold no more, has been let go of: nothing is sent until then."""


class ConfluentTransactions(GroupTransactions):
    """Commits what the sinks of one `ConfluentClient` sent together with offsets, as a `Membership`."""

    _failures = KafkaException
    _grace = 0.5

    @property
    def _joined(self) -> bool:
        return super()._joined and self._member.placed

    def _offsets(self, noted: Noted) -> tuple[Any, Any]:
        return offsets_of(noted), self._member.metadata

    def _within(self, timeout: float, call: Callable[..., object], *arguments: Any) -> None:
        super()._within(timeout, call, *arguments, timeout)

    def _refuse_if_replaced(self) -> None:
        current = self._metadata()
        known = {member.member_id for member in (current, self._member) if member is not None}
        if not known or not members_named(self._client.settings, self._group, self._owner) - known:
            return
        if current is None:
            raise StreamUnavailableError(f"this process has not joined group {self._group} again")
        raise self._replaced()

    def _committed(self, partitions: Collection[Partition] | None) -> Positions:
        settings = self._client.settings
        config = consumer_config(settings, group=self._group, member=None) | {"isolation.level": "read_committed"}
        consumer = make(Consumer, config)
        try:
            if partitions is None:
                known = {t: consumer.list_topics(t, settings.timeout).topics[t].partitions for t in self._topics}
                partitions = [(topic, n) for topic, numbers in known.items() for n in sorted(numbers)]
            found = consumer.committed([TopicPartition(*p) for p in partitions], timeout=settings.timeout)
            for tp in found:
                if tp.error is not None:
                    raise KafkaException(tp.error)
        except KafkaException as error:
            raise as_stream_error(error, f"asking for the offsets of group {self._group}") from error
        finally:
            consumer.close()
        return {(tp.topic, tp.partition): tp.offset for tp in found if tp.offset >= 0}
