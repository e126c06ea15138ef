"""Records out of Kafka: positions that are given, never guessed, and partitions that change hands safely.

Fetches start only from `KafkaConsumer.poll`, so a partition without a position is harmless until then: it gets its
position before the first poll that could read it, and an implicit "earliest" or "latest" never exists.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from kafka import KafkaConsumer, TopicPartition, errors

from streams.base import Assignment, Found, Partition, Positions, Record, StreamError, StreamUnavailableError
from streams.kafka_client import as_stream_error, check_topics, connect, describe, explain, shut_out, unreachable
from streams.kafka_commits import Commits
from streams.kafka_fetch import edges, free_slot, gone, offsets, records
from streams.kafka_note import found_beside
from streams.kafka_rebalance import HandoverError, HandoverListener, check_together
from streams.kafka_settings import KafkaSettings
from streams.kafka_sink import KafkaClient, KafkaSink
from streams.seams import CLOCK
from streams.topic_source import BEGINNINGS_TIMEOUT, ENDS_TIMEOUT, GROWTH_INTERVAL, PLACING_TIMEOUT, TopicSource

__all__ = ["KafkaClient", "KafkaSettings", "KafkaSink", "KafkaSource"]

_PASSING = (
    errors.RetriableError,
    errors.CommitFailedError,
    errors.IllegalGenerationError,
    errors.RebalanceInProgressError,
    errors.UnknownMemberIdError,
)
"""Errors of `poll` that the client gets over by itself, by asking again or by joining its group again."""


class KafkaSource(TopicSource):
    """Reads topics through a `KafkaConsumer`; implements `streams.base.Source`."""

    commits: Commits
    _commits_kind = Commits
    _failures = errors.KafkaError

    def _set_up(self) -> None:
        self.rebalances = 0
        """Times that partitions were taken away."""
        self._listener = HandoverListener()
        self._assignment: Assignment | None = None
        self._owned: set[Partition] = set()
        self._unplaced: list[TopicPartition] = []
        self._next_look = 0.0

    @property
    def trouble(self) -> str:
        """That no broker can be reached, with the reason, or that offsets cannot be committed; else empty."""
        consumer = self._consumer
        if consumer is None:
            return ""
        return unreachable(consumer, self.settings) or self.commits.trouble

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
        config = self.settings.consumer_config(group=self._group, member=self._member)
        self._consumer = connect(KafkaConsumer, config)
        self._assignment = assignment
        try:
            self._take({topic: found.partitions for topic, found in described.items()})
        except errors.KafkaError as error:
            self.close()
            raise as_stream_error(error, f"opening {', '.join(self._topics)}") from error
        except BaseException:
            self.close()
            raise

    def _take(self, counts: Mapping[str, int]) -> None:
        partitions = [TopicPartition(topic, n) for topic, count in counts.items() for n in range(count)]
        if self._shared:
            self._consumer.subscribe(topics=self._topics, listener=self._listener)
            # Waits for the topics' metadata. A member that joins without it and becomes the leader gives everybody
            # nothing, only to start another rebalance when the metadata comes.
            offsets(self._consumer, partitions, last=False, timeout=self.settings.timeout)
            return
        self._next_look = CLOCK.monotonic() + GROWTH_INTERVAL
        self._consumer.assign(partitions)
        self._unplaced = partitions
        self._place(self.settings.timeout)

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return up to ``max_records`` records; wait up to ``timeout`` seconds for the first.

        Raises:
            StreamError: Reading cannot go on: a position is gone, permission was withdrawn, a record is damaged.
        """
        consumer = self._opened()
        if self.commits.fenced or (self._shared and shut_out(consumer)):
            raise self._fenced()
        try:
            if self._unplaced:
                self._place(min(PLACING_TIMEOUT, self.settings.timeout))
            elif not self._shared:
                self._look_for_growth()
            self.commits.send(consumer)  # before the poll: should it fail, no record is in our hands to be lost
            free_slot(consumer)
            fetched = consumer.poll(timeout_ms=round(timeout * 1000), max_records=max_records)
        except errors.KafkaError as error:
            self._recover(error, timeout)
            fetched = {}
        check_topics(consumer, self._identities)
        return records(fetched)

    def pause(self, streams: Sequence[str]) -> None:
        """Give no more records of these topics; partitions assigned later are paused as well."""
        self._paused.update(streams)
        self._apply_pause()

    def resume(self, streams: Sequence[str]) -> None:
        """Give records of these topics again."""
        self._paused.difference_update(streams)
        self._apply_pause()

    def position(self, partition: Partition) -> int | None:
        """Where `poll` reads on, past markers and records of aborted transactions."""
        if self._consumer is None or partition not in self._owned:
            return None
        try:
            at: int | None = self._consumer.position(TopicPartition(*partition), timeout_ms=0)
        except errors.KafkaError:
            return None
        return at

    def group_metadata(self) -> Any:
        """This member as the group knows it, for offsets in a transaction; None while closed. From any thread."""
        consumer = self._consumer
        return None if consumer is None else consumer.group_metadata()

    def beginnings(self) -> Positions:
        """See `Source.beginnings`."""
        if self._consumer is None or self._unplaced:
            return {}
        return edges(self._consumer, self._owned, last=False, timeout=BEGINNINGS_TIMEOUT)

    def _reached(self) -> Mapping[Partition, tuple[int, int | None]]:
        consumer = self._consumer
        if consumer is None or self._unplaced:
            return {}
        reached = {}
        try:
            for partition in self._owned & {tuple(tp) for tp in consumer.assignment()}:
                tp = TopicPartition(*partition)
                position = consumer.position(tp, timeout_ms=0)
                if position is not None:
                    reached[partition] = position, consumer.highwater(tp)
        except errors.KafkaError as error:  # as `poll` will raise it again, this is no place to fail
            self.last_error = explain(error)
        return reached

    def _ask_ends(self, partitions: Collection[Partition]) -> Positions:
        return edges(self._consumer, partitions, last=True, timeout=ENDS_TIMEOUT)

    def close(self) -> None:
        """Commit what is not committed yet, leave the group and disconnect, within ``settings.timeout`` seconds."""
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        half = self.settings.timeout / 2
        self.commits.finish(consumer, half)
        self._let_go()
        try:
            # A named member would stay in the group until it is missed; who takes over should not wait for that.
            consumer._coordinator.is_dynamic_member = lambda: True  # noqa: SLF001
            consumer.close(autocommit=False, timeout_ms=round(half * 1000))
        except errors.KafkaError as error:
            self.last_error = explain(error)

    def _apply_pause(self) -> None:
        consumer = self._consumer
        if consumer is None:
            return
        for tp in consumer.assignment():
            (consumer.pause if tp.topic in self._paused else consumer.resume)(tp)

    def _recover(self, error: Exception, timeout: float) -> None:
        """Do what an error out of `poll` asks for; raise where reading cannot go on."""
        if isinstance(error.__cause__, HandoverError):
            self._hand_over(error.__cause__)
        elif isinstance(error, errors.OffsetOutOfRangeError):
            raise self._out_of_range(error) from error
        elif isinstance(error, errors.LogTruncationError):
            raise StreamError(
                f"records of {', '.join(self._topics)} that were read are gone: a topic was made anew or cut back"
                f" ({explain(error)}). Begin with a fresh state directory and group, or bring the old records back"
            ) from error
        elif isinstance(error, errors.FencedInstanceIdError):
            raise self._fenced() from error
        elif not isinstance(error, _PASSING):
            raise as_stream_error(error, f"reading {', '.join(self._topics)}") from error
        else:
            self.last_error = explain(error)
            time.sleep(min(timeout, 0.1))  # such an error comes at once; do not spin on it

    def _hand_over(self, handover: HandoverError) -> None:
        if handover.kind == "assigned":
            check_together(self._topics, handover.partitions)
            self._unplaced = handover.partitions
            if not self._unplaced and self._assignment is not None:
                self._assignment.assigned({})
            return
        self.rebalances += 1
        lost = handover.kind == "lost"
        deadline = CLOCK.monotonic() + self.settings.patience
        if self._assignment is not None:
            self._assignment.revoked(sorted(self._owned), lost=lost)
        if not lost:
            self.commits.finish(self._consumer, max(deadline - CLOCK.monotonic(), 0.2 * self.settings.patience))
        self._let_go()

    def _let_go(self) -> None:
        self._owned.clear()
        self._unplaced = []
        self.commits.disown()
        self._listener.holding = False

    def _place(self, timeout: float) -> None:
        """Give each new partition its start position; asks the cluster first, so that trying again is harmless."""
        consumer, partitions, milliseconds = self._consumer, self._unplaced, round(timeout * 1000)
        earliest = offsets(consumer, partitions, last=False, timeout=timeout)
        found = {tuple(tp): Found(earliest[tp]) for tp in partitions}
        if self._group is not None:
            for tp in partitions:
                stored = consumer.committed(tp, metadata=True, timeout_ms=milliseconds)
                if stored is not None:
                    found[tuple(tp)] = found_beside(stored.metadata, earliest[tp], stored.offset, self._member)
        self._unplaced = []
        self._owned.update(tuple(tp) for tp in partitions)
        self.commits.own(self._owned, {p: at.committed for p, at in found.items() if at.committed is not None})
        self._listener.holding = bool(self._owned)
        assert self._assignment is not None
        given = self._assignment.assigned(found)
        for tp in partitions:
            known = found[tuple(tp)].committed
            start = given.get(tuple(tp), earliest[tp] if known is None else known)
            if start < earliest[tp]:
                raise StreamError(gone(tp, start, earliest[tp]))
            consumer.seek(tp, start)
        self._apply_pause()

    def _look_for_growth(self) -> None:
        """Take partitions that were added to a topic; the client's metadata is at most five minutes old."""
        if CLOCK.monotonic() < self._next_look:
            return
        self._next_look = CLOCK.monotonic() + GROWTH_INTERVAL
        counts = {topic: self._consumer.partitions_for_topic(topic) or () for topic in self._topics}
        known = {TopicPartition(topic, n) for topic, numbers in counts.items() for n in numbers}
        new = sorted(known - self._owned)
        if new:
            self._consumer.assign([*self._consumer.assignment(), *new])
            self._unplaced = new
            self._place(min(PLACING_TIMEOUT, self.settings.timeout))

    def _out_of_range(self, error: Exception) -> StreamError:
        tp, offset = next(iter(error.args[0].items()))
        ask = partial(offsets, self._consumer, [tp], timeout=self.settings.timeout)
        try:
            earliest, end = ask(last=False)[tp], ask(last=True)[tp]
        except errors.KafkaError:
            return StreamUnavailableError(f"offset {offset} of {tp.topic}-{tp.partition} is out of range")
        if offset < earliest:
            return StreamError(gone(tp, offset, earliest))
        return StreamError(
            f"offset {offset} of {tp.topic}-{tp.partition} lies past its end {end}: the topic was made anew or this is"
            " another cluster. Use the cluster that the position is of, or begin with a fresh state directory and group"
        )
