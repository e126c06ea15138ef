"""Which partitions are ours, and where reading goes on in each: how they come, go, and stay through an outage."""

from __future__ import annotations

from collections.abc import Sequence

from confluent_kafka import Consumer, TopicPartition

from streams.base import Assignment, Found, Partition, Positions, Record, StreamError
from streams.columns import Records
from streams.confluent_client import Watch, identities
from streams.confluent_commits import Commits
from streams.confluent_fetch import Flow
from streams.confluent_placing import look_up
from streams.confluent_transactions import Membership
from streams.kafka_fetch import gone
from streams.kafka_rebalance import check_together
from streams.kafka_settings import KafkaSettings
from streams.seams import CLOCK
from streams.topic_source import GROWTH_INTERVAL, PLACING_TIMEOUT

ECHO = 60.0
"""Seconds after an outage within which a request from before it may still arrive."""


class Places:
    """The partitions of one source; used by the thread that polls, also out of librdkafka's callbacks.

    librdkafka gives up all partitions once no broker has answered for ``session.timeout.ms``, though the group, which
    was away as well, has given them to nobody. They are kept then, without records, until the group has spoken: if it
    gives the same ones back and nobody has committed in between, reading goes on as if nothing had happened.
    """

    def __init__(
        self, topics: Sequence[str], commits: Commits, *, group: bool, member: str, settings: KafkaSettings
    ) -> None:
        """Prepare.

        Args:
            topics: What is read.
            commits: What is committed of it.
            group: Whether offsets are committed at all.
            member: Our name in the group; empty for none.
            settings: How long to wait for the cluster, and how long the group waits for us.
        """
        self.flow = Flow()
        self.positions: Positions = {}
        """The next offset after what was given, for every partition that is ours."""
        self.unplaced: list[TopicPartition] | None = None
        """Partitions that are new and wait for their position; an empty list if the group has given us none."""
        self.kept = False
        """Whether the partitions are ours from before an outage, and the group has not spoken yet."""
        self.membership: Membership | None = None
        """What the group knew us as when it gave us these partitions; None while it has given none.

        Kept here for other threads: a call of theirs into the consumer would wait for a poll to end, and starve.
        """
        self.rebalances = 0
        self.changed = False
        """Whether partitions came or went; whoever looks sets it back."""
        self.failure: BaseException | None = None
        """What went wrong in a callback: librdkafka loses exceptions."""
        self.assignment: Assignment | None = None
        self.watch = Watch()
        """What the client says of its connections."""
        self._topics = list(topics)
        self._commits = commits
        self._group = group
        self._member = member
        self._settings = settings
        self._ends: Positions = {}
        self._identities: dict[str, str] = {}
        self._next_look = CLOCK.monotonic() + GROWTH_INTERVAL

    def subscribe(self, consumer: Consumer) -> None:
        """Take the partitions that the group gives."""
        consumer.subscribe(self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def position(self, partition: Partition) -> int | None:
        """The offset of the next record to give; None for a partition that is not ours."""
        if partition not in self.positions:
            return None
        held = self.flow.first(partition)
        return held if held is not None else max(self.positions[partition], self._ends.get(partition, 0))

    def note_given(self, records: Sequence[Record]) -> None:
        """Hear what `poll` returns."""
        came = Records.of(records)
        self.positions.update({at[:2]: came.ends[at.stop - 1] for at in came.stretches})

    def note_end(self, partition: Partition, end: int) -> None:
        """Hear that there is nothing before ``end`` any more, and nothing behind it yet."""
        self._ends[partition] = end

    def echoes(self) -> bool:
        """Whether an outage may explain that the group does not know us."""
        return self.watch.down or CLOCK.monotonic() - self.watch.down_at < ECHO

    # -- callbacks, out of a poll -------------------------------------------------------------------------------

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.changed = True
        try:
            consumer.assign([])  # the next poll gives them positions
            check_together(self._topics, partitions)
            self.unplaced = sorted(partitions)
        except BaseException as error:  # noqa: BLE001
            self.failure = error

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.hand_over(consumer, lost=self.kept)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self.positions and self.echoes():
            self.keep()
        else:
            self.hand_over(consumer, lost=True)

    def keep(self) -> None:
        """Wait for what the group says after an outage."""
        self.kept = self.changed = True
        self.membership = None
        self.unplaced = None

    def hand_over(self, consumer: Consumer, *, lost: bool) -> None:
        """Finish with all partitions; what goes wrong is left in `failure`."""
        self.changed = True
        try:
            if self.positions and self.assignment is not None:
                self.rebalances += 1
                patience = self._settings.patience
                deadline = CLOCK.monotonic() + patience
                self.assignment.revoked(sorted(self.positions), lost=lost)
                if not lost:
                    self._commits.finish(consumer, max(deadline - CLOCK.monotonic(), 0.2 * patience))
        except BaseException as error:  # noqa: BLE001
            self.failure = error
        self.let_go()

    def let_go(self) -> None:
        """Forget all partitions."""
        self.kept = False
        self.membership = None
        self.unplaced = None
        self.positions.clear()
        self._ends.clear()
        self.flow.clear()
        self._commits.disown()

    # -- positions ----------------------------------------------------------------------------------------------

    def place(self, consumer: Consumer, timeout: float) -> None:
        """Give each new partition its start position; asks the cluster first, so that trying again is harmless.

        Raises:
            KafkaException: The cluster does not answer, or may not be asked.
            StreamError: A start position is gone, or a topic is another one than when partitions were placed before.
        """
        if member_id := consumer.memberid():
            # Before the offsets, which are not told while a transaction of ours waits to be ended. Another is begun
            # only behind them: what is kept of partitions may turn out to be lost.
            self.membership = Membership(consumer.consumer_group_metadata(), member_id, placed=False)
        partitions = self.unplaced or ()
        found = look_up(consumer, partitions, group=self._group, member=self._member, timeout=timeout)
        self._check_identities(timeout)
        more = bool(self.positions) and not self.kept
        if self.kept and not self._is_as_before(found):
            membership = self.membership
            self.hand_over(consumer, lost=True)
            self.membership = membership
        starts = self._kept_starts() if self.kept else self._starts(found)
        if self.membership is not None:
            self.membership = self.membership._replace(placed=True)
        self.unplaced = None
        for partition, start in starts.items():
            if start < found[partition].earliest:
                raise StreamError(gone(TopicPartition(*partition), start, found[partition].earliest))
        self.positions.update(starts)
        placed = [TopicPartition(*partition, start) for partition, start in starts.items()]
        consumer.resume(placed)  # librdkafka remembers what was paused of a partition that comes back
        (consumer.incremental_assign if more else consumer.assign)(placed)

    def _check_identities(self, timeout: float) -> None:
        """Remember which topics these are, and that none has become another of its name; one request for all."""
        for topic, now in identities(self._settings, self._topics, timeout).items():
            before = self._identities.setdefault(topic, now)
            if before != now:
                raise StreamError(
                    f"topic {topic} was made anew while it was read: it was {before} and is {now} now, so positions"
                    " mean nothing in it. Begin with a fresh state directory and group, or bring the old topic back"
                )

    def _is_as_before(self, found: dict[Partition, Found]) -> bool:
        return found.keys() == self.positions.keys() and all(self._commits.are_ours(p, at) for p, at in found.items())

    def _kept_starts(self) -> Positions:
        starts = {partition: self.position(partition) or 0 for partition in self.positions}
        self.flow.clear()
        self.kept = False
        return starts

    def _starts(self, found: dict[Partition, Found]) -> Positions:
        self.positions.update({p: at.earliest for p, at in found.items()})
        self._commits.own(set(found), {p: at.committed for p, at in found.items() if at.committed is not None})
        assert self.assignment is not None
        given = self.assignment.assigned(found)
        stored = {p: at.earliest if at.committed is None else at.committed for p, at in found.items()}
        return {p: given.get(p, stored[p]) for p in found}

    def look_again(self, consumer: Consumer, *, growth: bool) -> None:
        """Once in a while, look that topics are the same ones, and with ``growth`` take partitions that were added.

        A group gives those itself. Raises as `place` does.
        """
        if CLOCK.monotonic() < self._next_look:
            return
        self._next_look = CLOCK.monotonic() + GROWTH_INTERVAL
        timeout = min(PLACING_TIMEOUT, self._settings.timeout)
        self._check_identities(timeout)
        if not growth:
            return
        found = {topic: consumer.list_topics(topic, timeout).topics[topic].partitions for topic in self._topics}
        known = {(topic, n) for topic, numbers in found.items() for n in numbers}
        new = sorted(known - self.positions.keys())
        if new:
            self.unplaced = [TopicPartition(*partition) for partition in new]
            self.place(consumer, timeout)
