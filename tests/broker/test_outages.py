"""The broker is killed and started again, over and over, while a daemon works. ADAPTD_OUTAGES says how often.

ADAPTD_OUTAGES_REPORT names a file for what was measured, as in `benchmarks/results/broker_kills.json`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from streams.kafka import KafkaSettings
from tests.broker.daemons import (
    MISSED_SOON,
    Daemon,
    Process,
    Topics,
    answers,
    committed,
    ends,
    everything,
    send,
    small_events,
    small_feedback,
)
from tests.broker.helpers import LIMIT, SinkFactory, TopicFactory
from tests.broker.node import Node

OUTAGES = int(os.environ.get("ADAPTD_OUTAGES", "2"))
PER_ROUND = 600


@pytest.fixture
def daemon(tmp_path: Path, bootstrap: str, client: str, topic: TopicFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "daemon", Topics.make(topic, partitions=2), bootstrap, client)
    yield made
    made.end()


def reached(life: Process, key: str, count: int) -> None:
    life.until(lambda status: bool(status[key] >= count), LIMIT)


def ordered(settings: KafkaSettings, topics: Topics) -> bool:
    """Whether answers to the records of one partition follow one another in each partition of the answers."""
    last: dict[tuple[int, str], int] = {}
    for record in everything(settings, topics.predictions):
        origin, _, offset = dict(record.headers)["adaptd-id"].decode().rpartition("-")
        if int(offset) <= last.get((record.partition, origin), -1):
            return False
        last[record.partition, origin] = int(offset)
    return bool(last)


@pytest.mark.timeout(400 + 60 * OUTAGES)
def test_killed_under_load_again_and_again_the_broker_costs_no_answer_no_order_and_no_memory(
    sink: SinkFactory, daemon: Daemon, settings: KafkaSettings, broker: Node, admin: KafkaAdminClient
) -> None:
    topics, started, memory = daemon.topics, time.monotonic(), []
    events, feedback = sink(topics.data), sink(topics.feedback)
    life = daemon.start("checkpoint.every=2s", extra=MISSED_SOON)
    waited = []
    for round_ in range(OUTAGES):
        first = round_ * PER_ROUND
        send(events, small_events(first, PER_ROUND // 2))
        send(feedback, small_feedback(first, PER_ROUND // 2))
        reached(life, "events", first + 1)
        broker.kill()
        events.send(small_events(first + PER_ROUND // 2, PER_ROUND // 2))
        feedback.send(small_feedback(first + PER_ROUND // 2, PER_ROUND // 2))
        life.until(
            lambda status: broker.bootstrap in status["waiting_for"] or topics.predictions in status["waiting_for"]
        )
        broker.start()
        back = time.monotonic()
        events.flush(LIMIT)
        feedback.flush(LIMIT)
        reached(life, "labels", first + PER_ROUND)
        waited.append(time.monotonic() - back)
        memory.append(life.memory)
    total = OUTAGES * PER_ROUND
    status = life.status()
    assert status["events"] == status["labels"] == status["joins"]["joined"] == total
    assert life.terminate() == 0, life.words
    found, again = answers(settings, topics)
    assert found.keys() == {f"e{n}" for n in range(total)}
    assert again == 0
    assert ordered(settings, topics)
    assert committed(admin, topics.group) == ends(settings, topics.data, topics.feedback)
    assert memory[-1] - memory[0] < 3e6 * OUTAGES + 20e6
    report(memory, waited, total, again, time.monotonic() - started)


def report(memory: list[int], waited: list[float], total: int, again: int, seconds: float) -> None:
    figures = {
        "command": f"ADAPTD_OUTAGES={OUTAGES} python -m pytest -m broker tests/broker/test_outages.py",
        "outages": OUTAGES,
        "events": total,
        "lost": 0,
        "answered_twice": again,
        "out_of_order": 0,
        "resident_mb_after_each": [round(size / 1e6, 1) for size in memory],
        "seconds_from_broker_back_to_caught_up": [round(value, 2) for value in waited],
        "seconds": round(seconds, 1),
    }
    print(json.dumps(figures))
    if path := os.environ.get("ADAPTD_OUTAGES_REPORT"):
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")
