"""Answers and offsets in one step: transactions of a `ConfluentClient`, each call under a deadline.

librdkafka 2.16 takes a deadline with each call, but while a broker comes back its ``send_offsets_to_transaction`` may
last without end. So calls run in a thread of their own; past the deadline the producer is given up, and what the thread
still waits for is of no account.

Making a producer with the same transactional id ends whatever the one before left open: a transaction whose commit had
begun is completed, any other is aborted, and the cluster takes nothing more from the old producer. So there is one
answer to every failure and to every start: a new producer, then the committed offsets as they are now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from streams.base import Partition, Positions, StreamError, StreamUnavailableError
from streams.confluent_client import as_stream_error, holders, make
from streams.confluent_config import consumer_config
from streams.confluent_sink import ConfluentClient
from streams.kafka_note import Note

_GRACE = 0.5
"""Seconds in which librdkafka may itself say that the time is over."""


class Membership(NamedTuple):
    """A member of a group at one moment."""

    metadata: Any
    """What librdkafka sends with offsets, so that the cluster refuses those of a member that its group has missed."""
    member_id: str


class ConfluentTransactions:
    """Commits what the sinks of one client sent together with offsets; implements `streams.base.Transactions`."""

    def __init__(
        self,
        client: ConfluentClient,
        group: str,
        owner: str,
        metadata: Callable[[], Membership | None],
        topics: Collection[str] = (),
    ) -> None:
        """Prepare; nothing is connected before `open`.

        Args:
            client: The producer of all sinks, made with a transactional id.
            group: Whose offsets are committed.
            owner: Our name in the group, the same in every life.
            metadata: Gives our membership of the group, None while there is none.
            topics: Whose committed offsets `open` returns.
        """
        self._client = client
        self._group = group
        self._owner = owner
        self._metadata = metadata
        self._topics = topics
        self._open = False
        self._member: Membership | None = None
        self._attempted: tuple[Partition, ...] = ()

    def open(self) -> Positions:
        """End what an earlier life left open, shut it out, and return the committed offsets of the topics.

        Raises:
            StreamUnavailableError: No broker answers, or another member's offsets are about to change; call it again.
            StreamError: The cluster refuses us.
        """
        if not self._open:
            self._client.acquire()
            self._open = True
        self._start_over()
        return self._committed(None)

    def begin(self) -> None:
        """Start a transaction, as the member of the group that we are now. Raises as `commit` does."""
        # Before anything is sent: should partitions go to others meanwhile, these metadata are too old to commit.
        self._member = self._metadata()
        if self._member is None:
            raise StreamUnavailableError(f"this process has not joined group {self._group}")
        try:
            self._producer.begin_transaction()  # asks nobody
        except KafkaException as error:
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
        offsets = [TopicPartition(*p, end, Note(self._owner, floors.get(p)).pack()) for p, end in positions.items()]
        producer, what = self._producer, f"transaction of {self._client.transactional_id}"
        assert self._member is not None
        if offsets:
            self._do(what, producer.send_offsets_to_transaction, offsets, self._member.metadata, timeout=timeout)
        self._attempted = tuple(positions)
        self._do(what, producer.commit_transaction, timeout=timeout)
        self._attempted = ()

    def recover(self) -> Positions:
        """Start over with a new producer; return the committed offsets of what the last `commit` was about.

        Raises:
            StreamUnavailableError: No broker answers; call it again.
            StreamError: Another process has taken our place, or the cluster refuses us.
        """
        self._refuse_if_replaced()
        self._start_over()
        positions = self._committed(self._attempted) if self._attempted else {}
        self._attempted = ()
        return positions

    def close(self) -> None:
        """Give the producer back. What is not committed is left to be aborted. Safe to call twice."""
        if self._open:
            self._open = False
            self._client.release(0)

    @property
    def _producer(self) -> Producer:
        producer = self._client.producer
        if producer is None:
            raise StreamUnavailableError("the producer was given up")
        return producer

    def _start_over(self) -> None:
        producer = self._client.renew()
        what = f"transactions of {self._client.transactional_id}"
        self._do(what, producer.init_transactions, timeout=self._client.settings.timeout)

    def _do(self, what: str, call: Callable[..., object], *arguments: Any, timeout: float) -> None:
        """Make a call of the producer that may last longer than it was told to."""
        raised: list[Exception] = []

        def run() -> None:
            try:
                call(*arguments, timeout)
            except Exception as error:  # noqa: BLE001  # it is raised below
                raised.append(error)

        thread = threading.Thread(target=run, name="kafka-transaction", daemon=True)
        thread.start()
        thread.join(timeout + _GRACE)
        if thread.is_alive():
            raise StreamUnavailableError(f"{what}: no answer from the cluster within {timeout:g} s")
        for error in raised:
            if not isinstance(error, KafkaException):
                raise error
            raise self._client.failure(error, what) from error

    def _refuse_if_replaced(self) -> None:
        """Ask the group who goes by our name. A producer of ours would shut out that of whoever does.

        Raises:
            StreamError: Another process does. Were we to start over, it would do the same, and so on.
            StreamUnavailableError: Another process does, or we do ourselves and have not heard of it yet.
        """
        current = self._metadata()
        known = {member.member_id for member in (current, self._member) if member is not None}
        if not known or not holders(self._client.settings, self._group, self._owner) - known:
            return
        if current is None:
            raise StreamUnavailableError(f"this process has not joined group {self._group} again")
        raise StreamError(
            f"another process writes as {self._client.transactional_id}: its state directory is a copy of this one,"
            " so this process stops. Remove the file 'member' from the copy and start it again"
        )

    def _committed(self, partitions: Collection[Partition] | None) -> Positions:
        """The committed offsets of partitions, or of all topics; never one that a transaction may yet change."""
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
