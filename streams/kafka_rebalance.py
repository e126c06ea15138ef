"""How partitions of a Kafka group change hands on the thread that polls, not on the client's own.

What kafka-python 3.0 does and this module builds on:

* All network traffic runs on an I/O thread of the client; `KafkaConsumer.poll` waits for it. Rebalance listeners run
  on that thread, where finishing with partitions (answers out, checkpoint, commit) would stop the heartbeats and
  where every blocking call of the consumer is an error.
* An exception from a listener comes out of `poll`. Raised by ``on_partitions_revoked`` it does so before the member
  asks to join again: it is still a stable member of the old generation, heartbeats go on, commits are taken, and the
  next `poll` starts the same rebalance anew. Raised by ``on_partitions_assigned`` it does so after the new generation
  is complete and before anything is fetched.

So the listener does nothing but raise, and the work happens between two polls. The group waits for the member
meanwhile, up to ``max_poll_interval_ms``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

from kafka import ConsumerRebalanceListener, TopicPartition

from streams.base import StreamError


class HandoverError(Exception):
    """Carries a rebalance from the client's I/O thread to the thread that polls."""

    def __init__(self, kind: Literal["assigned", "revoked", "lost"], partitions: Iterable[TopicPartition]) -> None:
        super().__init__(kind)
        self.kind = kind
        self.partitions = sorted(partitions)


class HandoverListener(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Raises `HandoverError`. It runs while the polling thread waits in `poll`, so the flag needs no lock."""

    def __init__(self) -> None:
        self.holding = False
        """Whether the polling thread has partitions to finish with."""

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        """Ask the polling thread to finish with its partitions; once it has, let the rebalance pass."""
        if self.holding:
            raise HandoverError("revoked", revoked)

    def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        """Tell the polling thread that its partitions are somebody else's."""
        if self.holding:
            raise HandoverError("lost", lost)

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        """Give the polling thread its partitions, which have no positions yet."""
        raise HandoverError("assigned", assigned)


def check_together(topics: Sequence[str], partitions: Sequence[TopicPartition]) -> None:
    """Check that a member got the same partition numbers of every topic.

    Raises:
        StreamError: It did not, so that feedback would miss its events.
    """
    numbers = {topic: sorted(tp.partition for tp in partitions if tp.topic == topic) for topic in topics}
    if any(owned != numbers[topics[0]] for owned in numbers.values()):
        raise StreamError(
            f"the group gave this process different partitions of its topics, {numbers}: all members must read the same"
            " topics with the range assignor, and the topics need equally many partitions. A topic without any was"
            " deleted or made anew: begin with a fresh state directory and group, or bring it back"
        )


def _is_no_handover(record: logging.LogRecord) -> bool:
    # kafka-python logs a listener's exception with its stack as an error; this one is a message, not an error.
    return not (record.exc_info and isinstance(record.exc_info[1], HandoverError))


logging.getLogger("kafka.coordinator.consumer").addFilter(_is_no_handover)
