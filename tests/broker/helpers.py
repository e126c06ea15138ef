"""What the tests of this folder share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from streams.base import Found, Message, Partition, Positions, Record
from streams.kafka import KafkaSink, KafkaSource

Opened = Callable[..., KafkaSource]
SinkFactory = Callable[..., KafkaSink]
TopicFactory = Callable[..., str]

LIMIT = 20.0


class Keeper:
    """An assignment that starts where it is told and writes down what comes and goes."""

    def __init__(self, start: Positions | None = None) -> None:
        self.start = start or {}
        self.owned: set[Partition] = set()
        self.log: list[tuple[str, list[Partition]]] = []
        self.on_revoked: Callable[[], None] = lambda: None

    def assigned(self, found: Mapping[Partition, Found]) -> Positions:
        self.owned.update(found)
        self.log.append(("assigned", sorted(found)))
        return {p: self.start[p] for p, at in found.items() if p in self.start and not at.theirs}

    def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> None:
        self.on_revoked()
        self.owned.difference_update(partitions)
        self.log.append(("lost" if lost else "revoked", sorted(partitions)))


def write(sink: KafkaSink, count: int, first: int = 0) -> None:
    sink.send([Message(b"k%d" % n, b"%d" % n) for n in range(first, first + count)])
    sink.flush(LIMIT)


def read(source: KafkaSource, count: int) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + LIMIT
    while len(records) < count:
        assert time.monotonic() < deadline, f"{len(records)} of {count} records came"
        records.extend(source.poll(500, 0.2))
    return records


def poll_until(sources: Sequence[KafkaSource], done: Callable[[], bool]) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline
        for source in sources:
            records.extend(source.poll(500, 0.05))
    return records


def fresh_group() -> str:
    return f"g-{uuid.uuid4().hex[:12]}"
