"""A daemon in a process of its own on a real Kafka: a policy folder, its topics, and what came of them."""

from __future__ import annotations

import atexit
import functools
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition, errors

from streams.base import Message, Partition
from streams.codec import encode_event, encode_feedback
from streams.kafka import KafkaSettings
from tests.broker.helpers import LIMIT, AnySink, TopicFactory, fresh_group, named_for
from tests.crash.zygote import Zygote, environment

POLICY = """\
version: 1
state: ./state
model:
  factory: "./model.py:build"
  inputs: {shape: [3, 32, 32], dtype: uint8, scale: 0.00392156862745098, layout: hwc}
streams:
  kafka: {bootstrap_servers: "127.0.0.1:9092", group: digits}
  data: {kafka: events}
  feedback: {kafka: feedback}
  predictions: {kafka: predictions}
  dead_letters: {kafka: dead-letters}
delivery: at_least_once
batching: {max_size: 64, max_delay: 20ms}
join: {window: 24h, max_bytes: 256MB}
adaptation: {method: rotta}
reweighting: [{method: age, half_life: 1h}]
safeguards: [{method: replay, capacity: 5000}]
interpolation: {method: linear}
gate: {method: flips, budget: 0.01}
metrics: {port: 9464}
"""
"""The policy that README.md shows, with a method that takes steps in place of `auto`."""

SMALL = """\
version: 1
state: ./state
model: {factory: "./model.py:build", inputs: {shape: [4], dtype: float32}}
streams:
  kafka: {bootstrap_servers: "127.0.0.1:9092", group: digits}
  data: {kafka: events}
  feedback: {kafka: feedback}
  predictions: {kafka: predictions}
  dead_letters: {kafka: dead-letters}
batching: {max_size: 8, max_delay: 5ms}
adaptation: {method: bn, mode: ema, momentum: 0.1}
learning: {batch_size: 16, max_delay: 1s, lr: 0.05}
safeguards: [{method: finite}, {method: replay, capacity: 100}]
interpolation: {method: linear}
gate: {method: flips, budget: 0.05}
release: {every: 100}
metrics: {port: 9464}
"""
"""Small batches of small rows, so that a few hundred events make many batches, jobs and releases."""

CONVOLUTIONS = """\
from torch import nn


def build():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
"""

LAYERS = """\
from torch import nn


def build():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
"""

SLOW = """\
import time

from torch import nn


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        time.sleep(0.05)
        return self.layers(x)


def build():
    return Slow()
"""

GROUP: dict[str, int] = {"session_timeout_ms": 12_000, "heartbeat_interval_ms": 300}
"""A member hears of a rebalance at once, and is missed only where a machine stood still for long."""
MISSED_SOON = {"session_timeout_ms": 3000}
"""For a test that waits until a group misses a member that was killed, or until a member misses its broker."""


@dataclass
class Topics:
    """The topics of one test and its group."""

    data: str
    feedback: str
    predictions: str
    dead_letters: str
    group: str = field(default_factory=fresh_group)

    @classmethod
    def make(cls, topic: TopicFactory, partitions: int = 1) -> Topics:
        return cls(
            topic(partitions, "events"), topic(partitions, "feedback"), topic(2, "predictions"), topic(1, "letters")
        )

    def flags(self, bootstrap: str, client: str) -> list[str]:
        return [
            f"streams.kafka.client={client}",
            f"streams.kafka.bootstrap_servers={bootstrap}",
            f"streams.kafka.group={self.group}",
            extra_of(client, {}),
            f"streams.data.kafka={self.data}",
            f"streams.feedback.kafka={self.feedback}",
            f"streams.predictions.kafka={self.predictions}",
            f"streams.dead_letters.kafka={self.dead_letters}",
            "metrics.port=0",
        ]


def extra_of(client: str, extra: Mapping[str, int]) -> str:
    settings = named_for(client, {**GROUP, **extra})
    return f"streams.kafka.extra={{{', '.join(f'{key}: {value}' for key, value in settings.items())}}}"


@functools.cache
def zygote() -> Zygote:
    """What lives are forked from: starting Python with PyTorch anew would take longer than most tests."""
    made = Zygote()
    atexit.register(made.__exit__)
    return made


class Process:
    """One life of a daemon: forked, or with ``variables`` a program of its own, as an operator starts it."""

    def __init__(
        self,
        directory: Path,
        flags: Sequence[str],
        *,
        before: str = "",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.log = directory / f"log-{time.monotonic_ns()}"
        arguments = ["run", str(directory / "policy.yaml"), *[part for flag in flags for part in ("--set", flag)]]
        self._address = ""
        self._program: subprocess.Popen[bytes] | None = None
        if variables is None:
            self._life = zygote().start(arguments, {}, self.log, before)
            self.pid = self._life.pid
            return
        with self.log.open("wb") as log:
            self._program = subprocess.Popen(
                [sys.executable, "-c", f"{before}\nfrom engine.cli import main\nmain()", *arguments],
                stdout=log,
                stderr=log,
                env={**environment(), **variables},
            )
        self.pid = self._program.pid

    @property
    def ended(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        return self._life.ended if self._program is None else self._program.poll()

    @property
    def alive(self) -> bool:
        return self.ended is None

    @property
    def memory(self) -> int:
        """Bytes that are resident."""
        return int(psutil.Process(self.pid).memory_info().rss)

    @property
    def arguments(self) -> str:
        """What everybody on this machine can read of how it was started."""
        return " ".join(psutil.Process(self.pid).cmdline())

    @property
    def words(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def get(self, page: str) -> str:
        if not self._address:
            found = re.search(r'"address": "(http://[^"]+)"', self.words)
            if found is None:
                raise OSError("it does not listen yet")
            self._address = found[1]
        with urllib.request.urlopen(self._address + page, timeout=LIMIT / 3) as answer:
            return str(answer.read().decode())

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/status"))
        return found

    def metric(self, name: str) -> float:
        """The sum of all series of a metric."""
        lines = [line for line in self.get("/metrics").splitlines() if re.match(rf"{name}(\{{| )", line)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def until(self, done: Callable[[dict[str, Any]], bool], limit: float = LIMIT) -> dict[str, Any]:
        """Ask for the status until it is as wished."""
        deadline = time.monotonic() + limit
        status: dict[str, Any] = {}
        while time.monotonic() < deadline:
            assert self.alive, f"the daemon ended with {self.ended}: {self.words}"
            try:
                status = self.status()
            except OSError:
                pass
            else:
                if done(status):
                    return status
            time.sleep(0.05)
        raise AssertionError(f"not within {limit:g} s; last status {status}; log {self.words}")

    def send(self, sign: signal.Signals) -> None:
        if self._program is None:
            self._life.signal(sign)
        else:
            self._program.send_signal(sign)

    def kill(self) -> None:
        """SIGKILL, as the kernel or an operator in a hurry sends it."""
        self.send(signal.SIGKILL)
        self.wait()

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def wait(self, limit: float = LIMIT) -> int:
        if self._program is not None:
            return self._program.wait(timeout=limit)
        code = self._life.wait(limit)
        assert code is not None, f"it has not ended within {limit:g} s: {self.words}"
        return code


class Daemon:
    """A policy folder on its topics, and the processes that it was run by."""

    def __init__(
        self,
        directory: Path,
        topics: Topics,
        bootstrap: str,
        client: str,
        *,
        policy: str = SMALL,
        model: str = LAYERS,
    ) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "policy.yaml").write_text(policy)
        (directory / "model.py").write_text(model)
        self.directory = directory
        self.topics = topics
        self._client = client
        self._flags = topics.flags(bootstrap, client)
        self._lives: list[Process] = []

    def start(
        self,
        *flags: str,
        before: str = "",
        variables: Mapping[str, str] | None = None,
        extra: Mapping[str, int] | None = None,
    ) -> Process:
        """Begin a life; ``extra`` settings of the client come under kafka-python's names, whatever the client."""
        flags = (*self._flags, *([extra_of(self._client, extra)] if extra else []), *flags)
        life = Process(self.directory, flags, before=before, variables=variables)
        self._lives.append(life)
        return life

    def end(self) -> None:
        for life in self._lives:
            if life.alive:
                life.kill()


def small_events(first: int, count: int, seed: int = 0) -> list[Message]:
    """Events e<first>... of four numbers, binary, one second apart."""
    x = np.random.default_rng(seed + first).normal(size=(count, 4)).astype(np.float32)
    names = [f"e{n}" for n in range(first, first + count)]
    return [
        Message(name.encode(), encode_event(name, row, time=1e9 + first + n))
        for n, (name, row) in enumerate(zip(names, x, strict=True))
    ]


def small_feedback(first: int, count: int, delay: float = 0.5) -> list[Message]:
    return [
        Message(b"e%d" % n, encode_feedback(f"e{n}", label=n % 3, time=1e9 + n + delay))
        for n in range(first, first + count)
    ]


def send(sink: AnySink, messages: Sequence[Message]) -> None:
    sink.send(messages)
    sink.flush(LIMIT)


def everything(settings: KafkaSettings, topic: str) -> list[Any]:
    """Every record of a topic, as kafka-python gives it, in order within each partition."""
    consumer = KafkaConsumer(
        bootstrap_servers=list(settings.bootstrap_servers),
        isolation_level="read_committed",
        reconnect_backoff_max_ms=500,
    )
    try:
        partitions = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic))]
        consumer.assign(partitions)
        consumer.seek_to_beginning()
        ends = consumer.end_offsets(partitions)
        records: list[Any] = []
        deadline = time.monotonic() + LIMIT
        while any(consumer.position(tp) < end for tp, end in ends.items()):
            assert time.monotonic() < deadline
            for came in consumer.poll(timeout_ms=200).values():
                records.extend(came)
        return records
    finally:
        consumer.close()


def answers(settings: KafkaSettings, topics: Topics) -> tuple[dict[str, bytes], int]:
    """Answers by event id, and how many came again; one that comes again must be equal to the first."""
    found: dict[str, bytes] = {}
    again = 0
    for record in everything(settings, topics.predictions):
        name = record.key.decode()
        assert json.loads(record.value)["id"] == name
        if name in found:
            assert found[name] == record.value, f"{name} was answered in two ways"
            again += 1
        found[name] = record.value
    return found, again


def committed(admin: KafkaAdminClient, group: str) -> dict[Partition, int]:
    """The offsets of a group; none while its coordinator is not to be had."""
    try:
        offsets: Mapping[Any, Any] = admin.list_group_offsets({group: None})[group]
    except errors.RetriableError:
        return {}
    return {(tp.topic, tp.partition): at.offset for tp, at in offsets.items()}


def ends(settings: KafkaSettings, *topics: str, isolation_level: str = "read_uncommitted") -> dict[Partition, int]:
    consumer = KafkaConsumer(bootstrap_servers=list(settings.bootstrap_servers), isolation_level=isolation_level)
    try:
        partitions = [TopicPartition(topic, n) for topic in topics for n in consumer.partitions_for_topic(topic)]
        return {(tp.topic, tp.partition): end for tp, end in consumer.end_offsets(partitions).items()}
    finally:
        consumer.close()


def until_no_transaction_is_open(settings: KafkaSettings, topic: str) -> None:
    """Wait until readers of committed records get to the end, as they do when what was begun has ended or expired."""
    deadline = time.monotonic() + LIMIT
    while ends(settings, topic) != ends(settings, topic, isolation_level="read_committed"):
        assert time.monotonic() < deadline, f"a transaction stays open in {topic}"
        time.sleep(0.1)
