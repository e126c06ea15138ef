"""Records out of Kafka through librdkafka, for heavy streams; as `streams.kafka` does it through kafka-python.

librdkafka calls rebalance callbacks out of the poll, on the thread that polls, while its own threads go on with the
heartbeats. So partitions are finished with inside the callback, and the group waits for that, up to
``max.poll.interval.ms``. New partitions are left without a position until the callback is over, and an implicit
"earliest" or "latest" never exists.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from streams.base import Assignment, Partition, Positions, Record, StreamError, StreamUnavailableError
from streams.columns import Records
from streams.confluent_client import (
    Watch,
    as_stream_error,
    describe,
    error_of,
    explain,
    make,
    no_broker,
    passes,
)
from streams.confluent_commits import Commits
from streams.confluent_config import consumer_config, session_seconds
from streams.confluent_fetch import records
from streams.confluent_places import Places
from streams.confluent_placing import edges, out_of_range
from streams.confluent_transactions import Membership
from streams.kafka_members import members_named
from streams.seams import CLOCK
from streams.topic_source import BEGINNINGS_TIMEOUT, ENDS_TIMEOUT, PLACING_TIMEOUT, TopicSource

_SESSION_MARGIN = 5.0
"""Seconds after the end of a session within which a group has let go of its member."""

_PROBE_INTERVAL = 1.0
"""Seconds between two looks whether a broker is there again."""


class ConfluentSource(TopicSource):
    """Reads topics through one consumer of librdkafka; implements `streams.base.Source` as `streams.kafka` does.

    `close` leaves the group at once, also as a named member: librdkafka keeps the place of one that closes, but not
    of one that ends its subscription first.
    """

    commits: Commits
    _commits_kind = Commits
    _failures = KafkaException
    _consumer: Consumer | None

    def _set_up(self) -> None:
        self._places = Places(
            self._topics,
            self.commits,
            group=self._group is not None,
            member=self._member or "",
            settings=self.settings,
        )
        self._flow = self._places.flow
        self._paused = self._flow.paused
        self._next_probe = 0.0
        self._shut_out: float | None = None

    @property
    def rebalances(self) -> int:
        """Times that partitions were taken away."""
        return self._places.rebalances

    @property
    def trouble(self) -> str:
        """That no broker can be reached, with the reason, or that offsets cannot be committed; else empty."""
        if self._consumer is None:
            return ""
        watch = self._places.watch
        if watch.down:
            return str(no_broker(self.settings, watch))
        if self._shut_out is not None:
            return f"group {self._group} has shut member {self._member} out: waiting to see whether another goes by it"
        return self.commits.trouble

    def open(self, assignment: Assignment) -> None:
        """Connect; static partitions are taken at once, those of a group as `poll` goes on.

        Raises:
            StreamUnavailableError: No broker answers; `open` may be called again.
            StreamError: A topic is missing or forbidden, a start position is gone, or the topics of a group have
                unequal numbers of partitions.
        """
        if self._consumer is not None:
            return
        described = describe(self.settings, self._topics)
        self._meet(described)
        self._places.assignment = assignment
        self._consumer = self._connect(join=self._shared)
        try:
            if not self._shared:
                partitions = [(topic, n) for topic, found in described.items() for n in range(found.partitions)]
                self._places.unplaced = [TopicPartition(*partition) for partition in partitions]
                self._places.place(self._consumer, self.settings.timeout)
        except KafkaException as error:
            refusal = self._refusal_of(self._consumer) or as_stream_error(error, f"opening {', '.join(self._topics)}")
            self.close()
            raise refusal from error
        except BaseException:
            self.close()
            raise

    def _connect(self, *, join: bool) -> Consumer:
        self._places.watch = Watch()
        config = consumer_config(self.settings, group=self._group, member=self._member)
        consumer = make(Consumer, config | {"error_cb": self._places.watch.hear, "on_commit": self.commits.done})
        if join:
            self._places.subscribe(consumer)
        return consumer

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return up to ``max_records`` records; wait up to ``timeout`` seconds for the first.

        Raises:
            StreamError: Reading cannot go on: a position is gone, permission was withdrawn, a record is damaged.
        """
        try:
            consumer = self._opened()
            if self.commits.fenced:
                return self._await_name(consumer, timeout)
            self._prepare(consumer)
            came = self._flow.take(max_records) or self._flow.divide(self._fetch(consumer, max_records, timeout))
            self._flow.apply(consumer, self._places.positions)
        except KafkaException as error:
            self._recover(error_of(error))
            time.sleep(min(timeout, 0.1))  # such an error comes at once; do not spin on it
            return ()
        self._places.note_given(came)
        return came

    def _prepare(self, consumer: Consumer) -> None:
        """Do what is due before a poll."""
        places = self._places
        if places.unplaced is not None:
            places.place(consumer, min(PLACING_TIMEOUT, self.settings.timeout))
        elif not places.watch.down:
            places.look_again(consumer, growth=not self._shared)
        if not places.kept:
            self.commits.send(consumer)
        if places.watch.down:
            self._probe(consumer)

    def _fetch(self, consumer: Consumer, most: int, timeout: float) -> Records:
        """Whatever is there, up to ``most`` records; waits for the first.

        ``consume`` alone would wait until all of them are there or the time is over.
        """
        if self._paused.issuperset(self._topics):
            most = 1  # for the callbacks alone; what comes has to be held
        places = self._places
        places.changed = False
        messages = consumer.consume(most, 0)
        if not messages and timeout > 0 and places.failure is None:
            first = consumer.poll(timeout)
            if first is not None:
                messages = [first, *(consumer.consume(most - 1, 0) if most > 1 else ())]
        failure, places.failure = places.failure, None
        if failure is not None:
            raise failure
        if not all([message.error() is None for message in messages]):  # noqa: C419  # this is faster
            messages = [message for message in messages if self._is_record(consumer, message)]
        if messages:
            places.watch.well()
        if places.changed:  # partitions may have gone while records of them were collected
            messages = [message for message in messages if (message.topic(), message.partition()) in places.positions]
        return records(messages)

    def pause(self, streams: Sequence[str]) -> None:
        """Give no more records of these topics; partitions assigned later are paused as well."""
        self._paused.update(streams)

    def resume(self, streams: Sequence[str]) -> None:
        """Give records of these topics again."""
        self._paused.difference_update(streams)

    def _send_commits(self, consumer: Consumer) -> None:
        if not self._places.kept:
            super()._send_commits(consumer)

    def position(self, partition: Partition) -> int | None:
        """Where `poll` reads on, past markers and records of aborted transactions.

        Past those at the end of a partition once librdkafka has found nothing behind them, within
        ``fetch.wait.max.ms`` of an empty fetch.
        """
        return None if self._consumer is None else self._places.position(partition)

    def group_metadata(self) -> Membership | None:
        """This member as the group knows it, for offsets in a transaction; None while it does not. From any thread."""
        return None if self._consumer is None else self._places.membership

    def beginnings(self) -> Positions:
        """See `Source.beginnings`."""
        if self._consumer is None:
            return {}
        return edges(self._consumer, self._places.positions, last=False, timeout=BEGINNINGS_TIMEOUT)

    def _reached(self) -> Mapping[Partition, tuple[int, int | None]]:
        consumer = self._consumer
        if consumer is None:
            return {}
        reached = {}
        try:
            for partition in self._places.positions:
                _, end = consumer.get_watermark_offsets(TopicPartition(*partition), cached=True)
                position = self.position(partition)
                if position is not None:
                    reached[partition] = position, end if end >= 0 else None
        except KafkaException as error:  # as `poll` will tell it again, this is no place to fail
            self.last_error = explain(error)
        return reached

    def _ask_ends(self, partitions: Collection[Partition]) -> Positions:
        return {} if self._consumer is None else edges(self._consumer, partitions, last=True, timeout=ENDS_TIMEOUT)

    def close(self) -> None:
        """Commit what is not committed yet, leave the group and disconnect, within ``settings.timeout`` seconds."""
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        half = self.settings.timeout / 2
        self.commits.finish(consumer, half)
        self._places.let_go()
        try:
            if self._shared and not self._places.watch.down:
                self._leave(consumer, half)
            consumer.close()
        except (KafkaException, RuntimeError) as error:
            self.last_error = str(error)

    def _leave(self, consumer: Consumer, timeout: float) -> None:
        """End the subscription, and wait until the group knows; `Consumer.close` keeps the place of a named member."""
        consumer.unsubscribe()
        deadline = CLOCK.monotonic() + timeout
        while consumer.memberid() and CLOCK.monotonic() < deadline:
            consumer.poll(0.01)

    def _probe(self, consumer: Consumer) -> None:
        """Look whether a broker is there again, where no record tells it."""
        if CLOCK.monotonic() >= self._next_probe:
            self._next_probe = CLOCK.monotonic() + _PROBE_INTERVAL
            try:
                consumer.list_topics(self._topics[0], min(0.2, self.settings.timeout))
            except KafkaException as error:
                self.last_error = explain(error)
            else:
                self._places.watch.well()

    # -- errors -------------------------------------------------------------------------------------------------

    def _is_record(self, consumer: Consumer, message: Message) -> bool:
        """Whether a message is one; does what an error in its place asks for."""
        error = message.error()
        if error is None:
            return True
        partition = (message.topic() or "", message.partition() or 0)
        if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001
            self._places.note_end(partition, message.offset() or 0)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:  # noqa: SLF001
            raise out_of_range(consumer, message, self.settings.timeout)
        else:
            self._recover(error)
        return False

    def _refusal_of(self, consumer: Consumer) -> StreamError | None:
        """What keeps the cluster from answering: librdkafka tells it out of a poll, and lets the question time out."""
        try:
            message = consumer.poll(0.1)
            if message is not None:
                self._is_record(consumer, message)
        except StreamError as error:
            return error
        return None

    def _recover(self, error: KafkaError) -> None:
        """Note an error that the client gets over; raise where reading cannot go on."""
        unasked = self._group is None and error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED
        if "same group.instance.id" in error.str():
            self.commits.fenced = True  # the next poll deals with it
        elif error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED and not unasked:
            raise StreamError(
                f"reading {', '.join(self._topics)}: the cluster does not permit it (group {self._group}:"
                f" {explain(error)}); check the user and its ACLs"
            )
        elif not passes(error) and not unasked:
            raise as_stream_error(error, f"reading {', '.join(self._topics)}")
        self.last_error = explain(error)

    def _await_name(self, consumer: Consumer, timeout: float) -> Sequence[Record]:
        """Deal with a member that was shut out: by a namesake, unless an outage explains it.

        librdkafka sends a commit that an outage has held back under the member id of before, while it joins again
        under a new one. The group takes them for two processes, and that consumer is of no use from then on. Its own
        place in the group ends with the session, while that of a namesake lasts.

        Raises:
            StreamError: Another process has our name.
        """
        now = CLOCK.monotonic()
        if self._shut_out is None:
            if not self._places.echoes():
                raise self._fenced()
            if self._places.positions:
                self._places.keep()
            consumer.close()
            self._consumer = self._connect(join=False)
            self._shut_out = now + session_seconds(self.settings) + _SESSION_MARGIN
        time.sleep(min(timeout, _PROBE_INTERVAL))
        if now < self._next_probe:
            return ()
        self._next_probe = now + _PROBE_INTERVAL
        assert self._group is not None
        try:
            others = members_named(self.settings, self._group, self._member or "")
        except StreamUnavailableError as error:  # whoever is there is not expected to report meanwhile either
            self.last_error = str(error)
            self._shut_out = now + session_seconds(self.settings) + _SESSION_MARGIN
            return ()
        if not others:
            self._shut_out = None
            self.commits.fenced = False
            self._places.subscribe(self._opened())
        elif now > self._shut_out:
            raise self._fenced()
        return ()
