"""What librdkafka fetched, as records, and those of paused topics until they are wanted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from itertools import repeat
from typing import Any

from confluent_kafka import Consumer, Message, TopicPartition

from streams.base import Headers, Partition, Record

HELD_RECORDS = 32_768
HELD_BYTES = 8 * 2**20
"""How much of a paused topic is held before librdkafka is told to stop fetching it. It fetches again at half of that,
which has to last until something comes: a tenth of a second or two."""

_make_record = partial(tuple.__new__, Record)  # what `Record` does, without a Python call for each


def records(messages: Sequence[Message]) -> list[Record]:
    """Return messages, none of them an error, as records in the same order."""
    offsets: list[int] = list(map(Message.offset, messages))  # type: ignore[arg-type]  # None only for an error
    values, headers = list(map(Message.value, messages)), list(map(Message.headers, messages))
    times = [milliseconds / 1000 if kind else math.nan for kind, milliseconds in map(Message.timestamp, messages)]
    columns = (
        map(Message.topic, messages),
        map(Message.partition, messages),
        offsets,
        [offset + 1 for offset in offsets],
        times,
        map(Message.key, messages),
        [value or b"" for value in values] if None in values else values,
        map(_plain, headers) if any(headers) else repeat((), len(messages)),
    )
    return list(map(_make_record, zip(*columns, strict=True)))


def _size(part: Collection[Record]) -> int:
    return sum([len(record.value) for record in part])


def _plain(headers: Any) -> Headers:
    return tuple([(name, content or b"") for name, content in headers]) if headers else ()


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
        self._held: dict[str, deque[Record]] = {}
        self._bytes: dict[str, int] = {}

    def divide(self, came: list[Record]) -> list[Record]:
        """Keep records of paused topics; return the others."""
        streams = {record[0] for record in came} if self.paused else set()
        kept = streams & self.paused
        for stream in kept:
            part = came if len(streams) == 1 else [record for record in came if record[0] == stream]
            self._held.setdefault(stream, deque()).extend(part)
            self._bytes[stream] = self._bytes.get(stream, 0) + _size(part)
        return [record for record in came if record[0] not in kept] if kept else came

    def take(self, most: int) -> list[Record]:
        """Return up to ``most`` records that were kept of topics that are not paused any more."""
        taken: list[Record] = []
        for stream, waiting in self._held.items():
            if stream not in self.paused:
                part = [waiting.popleft() for _ in range(min(most - len(taken), len(waiting)))]
                self._bytes[stream] -= _size(part)
                taken += part
        return taken

    def first(self, partition: Partition) -> int | None:
        """The offset of the first record that is kept of a partition."""
        waiting = self._held.get(partition[0], ())
        return next((record.offset for record in waiting if record.partition == partition[1]), None)

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
        count = len(self._held.get(stream, ()))
        return max(count / HELD_RECORDS, self._bytes.get(stream, 0) / HELD_BYTES)

    def clear(self) -> None:
        """Forget what is kept; what is paused stays so."""
        self.stopped.clear()
        self._held.clear()
        self._bytes.clear()
