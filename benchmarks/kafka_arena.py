"""A real broker with topics full of records, and what the broker itself noted of the answers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

from benchmarks.results import one_thread
from streams.codec import encode_event, encode_feedback
from tests.broker.node import QUIET, Node, jars

PARTITIONS = 4
SHAPE = 64
PATIENCE = 60.0
"""Seconds without an answer after which a run has failed."""

START = 1_700_000_000.0
"""Event time of the first record, seconds; a thousand events a second follow."""


class Answered(NamedTuple):
    """What the broker noted of the answers of one run.

    Attributes:
        count: Answers, each to another event.
        last: When the last one was appended, seconds since the epoch.
    """

    count: int
    last: float


SEGMENT_BYTES = 1 << 30
"""As brokers have it by default; that of the tests begins a new file for each 16 MiB, so that they see that too."""

JVM = (
    "-Xms1g",
    "-Xmx1g",
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-XX:MaxInlineLevel=15",
    *QUIET,
)
"""As Kafka's own scripts start a broker; that of the tests has a quarter of the memory and never compiles well."""


class Arena:
    """Topics on one broker. All of them stamp records with the broker's clock as they are appended."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap
        self._admin = KafkaAdminClient(bootstrap_servers=bootstrap)
        self._watcher = KafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)

    def close(self) -> None:
        self._watcher.close()
        self._admin.close()

    def topic(self, name: str) -> str:
        """Make an empty topic."""
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        configs = {"message.timestamp.type": "LogAppendTime", "segment.bytes": str(SEGMENT_BYTES)}
        self._admin.create_topics([NewTopic(unique, PARTITIONS, 1, topic_configs=configs)])
        self._admin.wait_for_topics([unique])
        return unique

    def drop(self, topic: str) -> None:
        """Delete a topic and what it holds."""
        self._admin.delete_topics([topic])

    def count(self, topic: str) -> int:
        """Records appended so far."""
        ends = self._watcher.end_offsets(partitions(topic))
        return int(sum(ends.values()))

    def wait(self, topic: str, count: int, alive: Callable[[], bool], timeout: float) -> None:
        """Return once a topic holds so many records.

        Raises:
            RuntimeError: Nothing came for ``timeout`` seconds, or the writer has ended.
        """
        seen, deadline = 0, time.monotonic() + timeout
        while seen < count:
            now = self.count(topic)
            if now > seen:
                seen, deadline = now, time.monotonic() + timeout
            elif not alive() or time.monotonic() > deadline:
                raise RuntimeError(f"{seen} of {count} answers came")
            time.sleep(0.1)

    def times(self, topic: str) -> dict[bytes, float]:
        """When the broker appended each record, in seconds, by key."""
        found: dict[bytes, float] = {}
        ends = self._watcher.end_offsets(partitions(topic))
        self._watcher.assign(partitions(topic))
        self._watcher.seek_to_beginning()
        left = sum(ends.values())
        while left > 0:
            for records in self._watcher.poll(timeout_ms=1000, max_records=10_000).values():
                left -= len(records)
                found |= {record.key: record.timestamp / 1000 for record in records}
        self._watcher.assign([])
        return found

    def answered(self, topic: str) -> Answered:
        """What the broker noted of the answers in a topic."""
        times = self.times(topic)
        return Answered(len(times), max(times.values()))


def partitions(topic: str) -> list[TopicPartition]:
    return [TopicPartition(topic, number) for number in range(PARTITIONS)]


@contextlib.contextmanager
def arena() -> Iterator[Arena]:
    """A broker for the length of a block: that of ``ADAPTD_TEST_BOOTSTRAP``, or one that is started and stopped.

    Raises:
        BrokerMissingError: None can be had here.
    """
    if given := os.environ.get("ADAPTD_TEST_BOOTSTRAP"):
        made = Arena(given)
        yield made
        made.close()
        return
    with tempfile.TemporaryDirectory() as home:
        node = Node(jars(), Path(home), JVM)
        node.format()
        node.start()
        try:
            made = Arena(node.bootstrap)
            yield made
            made.close()
        finally:
            node.stop()


class Records:
    """Records to fill topics with: 64 numbers of six digits each."""

    def __init__(self, form: str, seed: int = 0) -> None:
        self.form = form
        self._rows = np.random.default_rng(seed).normal(size=(4096, SHAPE)).round(6)

    def data(self, number: int) -> tuple[bytes, bytes]:
        """Key and value of one data record."""
        name, moment = f"event-{number:07}", START + number / 1000
        row = self._rows[number % len(self._rows)]
        if self.form == "binary":
            return name.encode(), encode_event(name, row.astype(np.float32), moment)
        return name.encode(), encode_event(name, row, moment, form="json", tensor=False)

    def feedback(self, number: int) -> tuple[bytes, bytes]:
        """Key and value of the label of one event."""
        name, moment = f"event-{number:07}", START + number / 1000 + 1
        return name.encode(), encode_feedback(name, label=number % 10, time=moment, form=self.form)  # type: ignore[arg-type]


def fill(bootstrap: str, topic: str, records: Iterator[tuple[bytes, bytes]]) -> None:
    """Append records, spread evenly over the partitions."""
    producer: Any = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=20, batch_size=131_072)
    for number, (key, value) in enumerate(records):
        producer.send(topic, value, key, partition=number // 64 % PARTITIONS)
    producer.flush()
    producer.close()


class running:  # noqa: N801 - a block, not a thing
    """A process that runs for the length of a block."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = command
        self._log = log

    def __enter__(self) -> subprocess.Popen[bytes]:
        environment = one_thread() | {"ADAPTD_BENCHMARK_START": str(self._log.with_suffix(".start"))}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)
        return self._process

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._process.kill()
        self._process.wait()
        if kind is RuntimeError:
            sys.stderr.write(self._log.read_text(errors="replace")[-2000:])
