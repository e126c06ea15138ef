"""What librdkafka fetched, as records, and those of paused topics until they are wanted."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Any

from confluent_kafka import Consumer, Message, TopicPartition

from streams.base import Headers, Partition, Record
from streams.columns import Mapped, Records

HELD_RECORDS = 32_768
HELD_BYTES = 8 * 2**20
"""How much of a paused topic is held before librdkafka is told to stop fetching it. It fetches again at half of that,
which has to last until something comes: a tenth of a second or two."""


def records(messages: Sequence[Message]) -> Records:
    """Return messages, none of them an error, as records in the same order."""
    topics, offsets = list(map(Message.topic, messages)), list(map(Message.offset, messages))
    values: list[bytes | None] = list(map(Message.value, messages))
    if messages and topics.count(topics[0]) == len(topics):
        topics = topics[:1] * len(topics)  # one string, not as many
    return Records(
        topics,
        list(map(Message.partition, messages)),
        offsets,
        Mapped(_next, offsets),
        [milliseconds / 1000 if kind else math.nan for kind, milliseconds in map(Message.timestamp, messages)],
        Mapped(Message.key, messages),
        [value or b"" for value in values] if None in values else values,
        Mapped(_headers, messages),
    )


def _next(offset: int) -> int:
    return offset + 1


def _headers(message: Message) -> Headers:
    headers: Any = message.headers()
    return tuple([(name, content or b"") for name, content in headers]) if headers else ()


def _size(part: Records) -> int:
    return sum(map(len, part.values))


class Flow:
    """Which topics are paused, and what came of them.

    Pausing a partition makes librdkafka throw away what it has fetched of it and fetch that again later. A stream that
    is paused and resumed many times a second would spend its time on that; so what comes of a paused topic waits here,
    in order, and only a topic that stays paused until much of it waits is stopped in librdkafka as well.
    """

    def __init__(self) -> None:
        self.paused: set[str] = set()
        self.stopped: set[str] = set()
        """Topics that librdkafka gives nothing of."""
        self._held: dict[str, deque[Records]] = {}
        self._counts: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def divide(self, came: Records) -> Records:
        """Keep records of paused topics; return the others."""
        if not self.paused or not came:
            return came
        others = [came[:0]]
        for stream, part in came.by_stream():
            if stream in self.paused:
                self._held.setdefault(stream, deque()).append(part)
                self._counts[stream] += len(part)
                self._bytes[stream] += _size(part)
            else:
                others.append(part)
        return Records.joined(others)

    def take(self, most: int) -> Sequence[Record]:
        """Return up to ``most`` records that were kept of topics that are not paused any more."""
        taken: list[Records] = []
        for stream, waiting in self._held.items():
            while waiting and most and stream not in self.paused:
                part = waiting.popleft()
                if len(part) > most:
                    waiting.appendleft(part[most:])
                    part = part[:most]
                most -= len(part)
                self._counts[stream] -= len(part)
                self._bytes[stream] -= _size(part)
                taken.append(part)
        return taken[0] if len(taken) == 1 else Records.joined(taken) if taken else []

    def first(self, partition: Partition) -> int | None:
        """The offset of the first record that is kept of a partition."""
        waiting = self._held.get(partition[0], ())
        stretches = ((part, stretch) for part in waiting for stretch in part.stretches)
        return next((part.offsets[at.start] for part, at in stretches if at.partition == partition[1]), None)

    def apply(self, consumer: Consumer, owned: Collection[Partition]) -> None:
        """Stop topics of which much waits, and let those flow again of which little does."""
        for stream in {partition[0] for partition in owned}:
            fill = self._fill(stream)
            if stream not in self.stopped and stream in self.paused and fill >= 1:
                self.stopped.add(stream)
                consumer.pause([TopicPartition(*p) for p in owned if p[0] == stream])
            elif stream in self.stopped and fill <= 0.5:
                self.stopped.discard(stream)
                consumer.resume([TopicPartition(*p) for p in owned if p[0] == stream])

    def _fill(self, stream: str) -> float:
        return max(self._counts[stream] / HELD_RECORDS, self._bytes[stream] / HELD_BYTES)

    def clear(self) -> None:
        """Forget what is kept; what is paused stays so."""
        self.stopped.clear()
        self._held.clear()
        self._counts.clear()
        self._bytes.clear()
