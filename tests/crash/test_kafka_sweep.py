"""The kill sweep on a real Kafka, in every mode of delivery."""

import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from streams.kafka import KafkaSettings
from tests.broker.daemons import Topics
from tests.broker.helpers import TopicFactory
from tests.crash.conftest import Budget, Tell
from tests.crash.kafka_trial import KafkaTrial
from tests.crash.results import KILLS
from tests.crash.sweep import Report, sweep
from tests.crash.workload import Workload
from tests.crash.zygote import Zygote

SHARE = 0.125
"""Of the kills and of the time of the whole tier, for each client in each mode."""

ABSENT = {
    "at_least_once": {
        "files.written",
        "files.renamed",
        "transaction.begun",
        "transaction.offsets",
        "transaction.committed",
    },
    "exactly_once": {
        "files.written",
        "files.renamed",
        "writer.flushed",
        "writer.passed",
        "reader.commit",
        "reader.committed",
    },
}
"""Failpoints that a mode of delivery never comes to on Kafka."""

Make = Callable[[str], Iterator[KafkaTrial]]


@pytest.fixture
def trials(
    zygote: Zygote,
    work: Workload,
    topic: TopicFactory,
    settings: KafkaSettings,
    admin: KafkaAdminClient,
    tmp_path: Path,
) -> Make:
    def make(delivery: str) -> Iterator[KafkaTrial]:
        for number in count():
            directory = tmp_path / f"trial-{number}"
            directory.mkdir()
            yield KafkaTrial(zygote, directory, Topics.make(topic, 2), delivery, work, settings, admin)
            shutil.rmtree(directory)

    return make


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_killed_anywhere_every_event_is_answered_and_learned_from_once(
    trials: Make, delivery: str, client: str, zygote: Zygote, budget: Budget, record_property: Tell, tmp_path: Path
) -> None:
    made = trials(delivery)
    trial = next(made)
    started = time.monotonic()
    life = trial.start("")
    assert not trial.wait(life, None)
    length = time.monotonic() - started
    assert trial.judge().problems == []
    name = f"{client}, {delivery}"
    report = Report(name, client, delivery, budget.seed_of(name))
    sweep(made, report, kills=int(budget.kills * SHARE), seconds=budget.seconds * SHARE, length=length)
    record_property(KILLS, [report.name, report.as_json()])
    assert report.findings.problems == []
    assert report.kills.total() > 0
    if budget.covers(report.kills.total()):
        assert report.never <= ABSENT[delivery]
