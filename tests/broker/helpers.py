"""What the tests of this folder share."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from kafka import KafkaAdminClient, errors
from kafka.admin import NewTopic

from streams.base import Found, Message, Partition, Positions, Record, StreamUnavailableError
from streams.clients import client_of, sink_of
from streams.confluent_sink import ConfluentClient, ConfluentSink
from streams.confluent_source import ConfluentSource
from streams.kafka import KafkaClient, KafkaSettings, KafkaSink, KafkaSource

AnySource = KafkaSource | ConfluentSource
AnyClient = KafkaClient | ConfluentClient
AnySink = KafkaSink | ConfluentSink
Opened = Callable[..., AnySource]
SinkFactory = Callable[..., AnySink]
TopicFactory = Callable[..., str]
T = TypeVar("T")

LIMIT = 90.0
"""Seconds after which a test gives up; only a hang takes them, or a broker that recovers its logs on a slow disk."""
CLIENTS = ("kafka-python", "confluent")


def with_extra(settings: KafkaSettings, **extra: int) -> KafkaSettings:
    """The same settings with only these further ones, named as kafka-python names them."""
    return settings.model_copy(update={"extra": named_for(settings.client, extra)})


def named_for(client: str, extra: Mapping[str, int]) -> dict[str, int]:
    """Further settings under the names of a client."""
    return {key.replace("_", ".") if client == "confluent" else key: value for key, value in extra.items()}


def sink_on(topic: str, settings: KafkaSettings, *, client: AnyClient | None = None, **options: Any) -> AnySink:
    return sink_of(topic, client or client_of(settings), **options)


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


def patiently(action: Callable[[], T]) -> T:
    """Try until the cluster can: a broker that has just started coordinates no group yet, a busy one takes its time."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            return action()
        except StreamUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def write(sink: AnySink, count: int, first: int = 0) -> None:
    sink.send([Message(b"k%d" % n, b"%d" % n) for n in range(first, first + count)])
    sink.flush(LIMIT)


def read(source: AnySource, count: int) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + LIMIT
    while len(records) < count:
        assert time.monotonic() < deadline, f"{len(records)} of {count} records came"
        records.extend(source.poll(500, 0.2))
    return records


def poll_until(sources: Sequence[AnySource], done: Callable[[], bool]) -> list[Record]:
    records: list[Record] = []
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline
        for source in sources:
            records.extend(source.poll(500, 0.05))
    return records


def made(admin: KafkaAdminClient, topic: NewTopic) -> None:
    """Make a topic, by a broker that may have been killed in the test before, or takes its time."""
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            admin.create_topics([topic])
        except errors.TopicAlreadyExistsError:
            break  # an attempt that was not heard of
        except errors.RetriableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            break
    admin.wait_for_topics([topic.name], timeout_ms=round(LIMIT * 1000))


def remade(admin: KafkaAdminClient, name: str) -> None:
    """Delete a topic and make another of its name."""
    admin.delete_topics([name])
    deadline = time.monotonic() + LIMIT
    while name in admin.list_topics():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    made(admin, NewTopic(name, 1, 1))


def fresh_group() -> str:
    return f"g-{uuid.uuid4().hex[:12]}"
