"""Answers and offsets in one step: transactions of a `KafkaClient`, each call under a deadline.

What kafka-python 3.0 does and this module builds on:

* Once transactions are initialised, its calls wait for the cluster without end. Each runs in a thread of its own here;
  past its deadline the producer is given up, and what the thread still waits for is of no account.
* Making a producer with the same transactional id ends whatever the one before left open: a transaction whose commit
  had begun is completed, any other is aborted, and the cluster takes nothing more from the old producer. So there is
  one answer to every failure and to every start: a new producer, then the committed offsets as they are now.
* It tells a transaction that the cluster gave up (this process stood still for too long) and one that another process
  has ended in the same words. The consumer group tells them apart: whoever runs on a copy of the state directory has
  joined it under the same name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, OffsetAndMetadata, TopicPartition, errors

from streams.base import Partition, Positions, StreamError, StreamUnavailableError
from streams.kafka_client import as_stream_error, connect
from streams.kafka_note import Note
from streams.kafka_sink import KafkaClient


class KafkaTransactions:
    """Commits what the sinks of one client sent together with offsets; implements `streams.base.Transactions`."""

    def __init__(
        self, client: KafkaClient, group: str, owner: str, metadata: Callable[[], Any], topics: Collection[str] = ()
    ) -> None:
        """Prepare; nothing is connected before `open`.

        Args:
            client: The producer of all sinks, made with a transactional id.
            group: Whose offsets are committed.
            owner: Our name in the group, the same in every life.
            metadata: Gives the group's metadata of our consumer, None while it has none. With them the cluster refuses
                offsets of a member that its group has missed.
            topics: Whose committed offsets `open` returns.
        """
        self._client = client
        self._group = group
        self._owner = owner
        self._metadata = metadata
        self._topics = topics
        self._open = False
        self._member: Any = None
        self._attempted: tuple[Partition, ...] = ()

    def open(self) -> Positions:
        """End what an earlier life left open, shut it out, and return the committed offsets of the topics.

        Raises:
            StreamUnavailableError: No broker answers, or another member's offsets are about to change; call it again.
            StreamError: The cluster refuses us.
        """
        producer = self._client.renew() if self._open else self._client.acquire()
        self._open = True
        self._initialise(producer)
        return self._committed(None)

    def begin(self) -> None:
        """Start a transaction, as the member of the group that we are now. Raises as `commit` does."""
        # Before anything is sent: should partitions go to others meanwhile, these metadata are too old to commit.
        self._member = self._metadata()
        if self._member is None or not self._member.member_id:
            raise StreamUnavailableError(f"this process has not joined group {self._group}")
        try:
            self._producer.begin_transaction()  # asks nobody
        except errors.KafkaError as error:
            raise self._client.failure(error, "beginning a transaction") from error

    def commit(
        self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None, timeout: float
    ) -> None:
        """Commit what was sent since `begin`, and the offsets; each of two calls may take ``timeout`` seconds.

        Raises:
            StreamUnavailableError: It is not known to have happened; `recover` is next.
            StreamError: The cluster does not permit it.
        """
        floors = floors or {}
        offsets = {
            TopicPartition(*p): OffsetAndMetadata(end, Note(self._owner, floors.get(p)).pack(), -1)
            for p, end in positions.items()
        }
        producer = self._producer
        if offsets:
            self._within(timeout, producer.send_offsets_to_transaction, offsets, self._member)
        self._attempted = tuple(positions)
        self._within(timeout, producer.commit_transaction)
        self._attempted = ()

    def recover(self) -> Positions:
        """Start over with a new producer; return the committed offsets of what the last `commit` was about.

        Raises:
            StreamUnavailableError: No broker answers; call it again.
            StreamError: Another process has taken our place, or the cluster refuses us.
        """
        self._refuse_if_replaced()
        self._initialise(self._client.renew())
        positions = self._committed(self._attempted) if self._attempted else {}
        self._attempted = ()
        return positions

    def close(self) -> None:
        """Give the producer back. What is not committed is left to be aborted. Safe to call twice."""
        if self._open:
            self._open = False
            self._client.release(0)

    @property
    def _producer(self) -> Any:
        producer = self._client.producer
        if producer is None:
            raise StreamUnavailableError("the producer was given up")
        return producer

    def _initialise(self, producer: Any) -> None:
        self._within(self._client.settings.timeout, producer.init_transactions)

    def _refuse_if_replaced(self) -> None:
        """Ask the group who goes by our name.

        Raises:
            StreamError: Another process does. Were we to start over, it would do the same, and so on.
        """
        member = self._metadata()
        if member is None or not member.member_id:
            return  # about to join again; the group tells the consumer if it may not
        admin = connect(KafkaAdminClient, self._client.settings.admin_config())
        try:
            found = admin.describe_groups([self._group])[self._group]
        except errors.KafkaError as error:
            raise as_stream_error(error, f"asking for the members of group {self._group}") from error
        finally:
            admin.close()
        again = self._metadata()
        if again is None or again.member_id != member.member_id:
            raise StreamUnavailableError(f"this process is joining group {self._group} again")
        holders = {one["member_id"] for one in found["members"] if one.get("group_instance_id") == self._owner}
        if holders - {member.member_id}:
            raise StreamError(
                f"another process writes as {self._client.transactional_id}: its state directory is a copy of this one,"
                " so this process stops. Remove the file 'member' from the copy and start it again"
            )

    def _committed(self, partitions: Collection[Partition] | None) -> Positions:
        """The committed offsets of partitions, or of all topics; never one that a transaction may yet change."""
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

    def _within(self, timeout: float, call: Callable[..., object], *arguments: Any) -> None:
        """Make a call of the producer that may never return."""
        raised: list[Exception] = []

        def run() -> None:
            try:
                call(*arguments)
            except Exception as error:  # noqa: BLE001  # it is raised below
                raised.append(error)

        thread = threading.Thread(target=run, name="kafka-transaction", daemon=True)
        thread.start()
        thread.join(timeout)
        what = f"transaction of {self._client.transactional_id}"
        if thread.is_alive():
            raise StreamUnavailableError(f"{what}: no answer from the cluster within {timeout:g} s")
        for error in raised:
            raise self._client.failure(error, what) from error
