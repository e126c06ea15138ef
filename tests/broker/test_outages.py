"""The broker is killed and started again, over and over, while a daemon works. ADAPTD_OUTAGES says how often.

ADAPTD_OUTAGES_REPORT names a folder for what was measured, a file for each client.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
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

OUTAGES = int(os.environ.get("ADAPTD_OUTAGES", "6"))
PER_ROUND = 2000
WARM = 3
"""Outages after which memory is looked at: queues and buffers have had what they may hold by then."""
GROWTH = 3.0
"""Megabytes for each outage that are still noise, and what is remembered of the ids of a round."""
JUDGED = 10
"""Outages from which on the slope says something; with fewer, memory may grow by so much for each of them in all."""


@pytest.fixture
def daemon(tmp_path: Path, bootstrap: str, client: str, topic: TopicFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "daemon", Topics.make(topic, partitions=2), bootstrap, client)
    yield made
    made.end()


def reached(life: Process, key: str, count: int) -> None:
    life.until(lambda status: bool(status[key] >= count), LIMIT)


def disordered(settings: KafkaSettings, topics: Topics) -> int:
    """Answers that come behind one to a later record of the same partition, within a partition of the answers."""
    last: dict[tuple[int, str], int] = {}
    wrong = 0
    for record in everything(settings, topics.predictions):
        origin, _, offset = dict(record.headers)["adaptd-id"].decode().rpartition("-")
        wrong += int(offset) <= last.get((record.partition, origin), -1)
        last[record.partition, origin] = int(offset)
    return wrong


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
    figures = {
        "events": total,
        "lost": len({f"e{n}" for n in range(total)} - found.keys()),
        "answered_twice": again,
        "out_of_order": disordered(settings, topics),
        "resident_mb_after_each": [round(size / 1e6, 1) for size in memory],
        "mb_for_each_outage": growth(memory),
        "seconds_from_broker_back_to_caught_up": [round(value, 2) for value in waited],
        "seconds": round(time.monotonic() - started, 1),
    }
    report(settings.client, figures)
    assert len(found) == total
    assert (figures["lost"], figures["answered_twice"], figures["out_of_order"]) == (0, 0, 0)
    assert committed(admin, topics.group) == ends(settings, topics.data, topics.feedback)
    if OUTAGES >= JUDGED:
        assert growth(memory) < GROWTH, figures
    assert memory[-1] - memory[0] < 1e6 * JUDGED * GROWTH, figures


def growth(memory: list[int]) -> float:
    """The slope of a straight line through what is resident after each outage, in megabytes; warm ones alone."""
    warm = memory[WARM:]
    return round(float(np.polyfit(range(len(warm)), warm, 1)[0]) / 1e6, 2) if len(warm) > 1 else 0.0


def report(client: str, figures: dict[str, Any]) -> None:
    """Log what was measured, and write it where it was asked for."""
    command = f"ADAPTD_OUTAGES={OUTAGES} python -m pytest -m broker tests/broker/test_outages.py"
    date = datetime.now(UTC).isoformat(timespec="seconds")
    told = {"command": command, "client": client, "date": date, "outages": OUTAGES, **figures}
    logging.getLogger(__name__).info(json.dumps(told))
    if folder := os.environ.get("ADAPTD_OUTAGES_REPORT"):
        (Path(folder) / f"broker_kills-{client}.json").write_text(json.dumps(told, indent=2) + "\n")
