"""How near retention comes to what a restart would read."""

import math
from pathlib import Path
from typing import cast

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from engine import retention
from engine.daemon import Daemon
from engine.metrics import Metrics
from engine.retention import LOOK_SECONDS, WINDOW_SECONDS, Retention
from engine.status import status
from streams.base import Partition, Positions, Source
from streams.memory import MemorySource
from tests.engine.parts import daemon_on, fill, run, until

PLACE: Partition = ("data", 0)


class Log:
    """A log of which the beginning moves, read up to somewhere."""

    def __init__(self) -> None:
        self.begin, self.at, self.committed_at, self.trouble, self.asked = 0, 1000, 1000, "", 0
        self.covered: Positions = {PLACE: 1_000_000}
        self.retention = Retention(cast("Source", self))
        self.retention.covered = lambda: self.covered
        self.now = 0.0

    def beginnings(self) -> Positions:
        self.asked += 1
        return {PLACE: self.begin}

    def committed(self) -> Positions:
        return {PLACE: self.committed_at}

    def position(self, partition: Partition) -> int:
        return self.at

    def look(self, begin: int, lag: int = 100, after: float = LOOK_SECONDS) -> retention.Margin:
        self.begin, self.now = begin, self.now + after
        self.retention.look(self.now, {PLACE: lag})
        return self.retention.margins[PLACE]


def test_the_margin_is_what_lies_between_the_beginning_and_what_is_answered() -> None:
    log = Log()
    log.committed_at = 900
    assert log.look(300).records == 600
    log.committed_at = 1100  # of another life
    assert log.look(300).records == 700
    assert log.look(1200).records == 0


def test_it_is_measured_from_the_checkpoint_that_a_restart_would_read_on_from() -> None:
    log = Log()
    log.covered = {PLACE: 600}
    log.look(300, lag=0)
    assert log.look(500, lag=0) == (100, WINDOW_SECONDS / 2), "all is read and answered, and not in a checkpoint"
    log.covered = {PLACE: 1000}
    assert math.isnan(log.look(500, lag=0).seconds)


def test_of_a_partition_that_no_checkpoint_holds_it_is_measured_from_where_reading_began() -> None:
    log = Log()
    log.covered, log.committed_at = {}, 400
    log.look(300)
    log.committed_at = 1000
    assert log.look(300).records == 100
    log.retention.forget(PLACE)
    assert log.look(300).records == 700


def test_in_seconds_it_goes_by_what_retention_took_in_the_last_hour() -> None:
    log = Log()
    assert math.isnan(log.look(0).seconds), "nothing was taken yet"
    assert log.look(100).seconds == 9 * WINDOW_SECONDS
    assert log.look(500).seconds == WINDOW_SECONDS
    assert math.isnan(log.look(500, after=WINDOW_SECONDS).seconds), "nothing for an hour"


def test_where_everything_is_read_nothing_can_be_lost() -> None:
    log = Log()
    log.look(0)
    assert not log.look(1000, lag=0).near
    assert log.look(1000, lag=1).near
    log.committed_at = 999
    assert log.look(1000, lag=0).near


def test_it_is_warned_of_once_until_it_was_better() -> None:
    log = Log()
    with capture_logs() as logs:
        for begin in (0, 400, 600, 700):
            log.look(begin)
        log.at = log.committed_at = 100_000
        log.look(700)
        log.at = log.committed_at = 1000
        log.look(700)
    assert [(entry["event"], entry["records"]) for entry in logs] == [("retention_near", 400), ("retention_near", 300)]
    assert logs[0]["partition"] == "data-0"


def test_it_is_looked_at_seldom_and_not_while_no_broker_answers() -> None:
    log = Log()
    log.look(0)
    log.look(0, after=LOOK_SECONDS / 2)
    assert log.asked == 1
    log.trouble = "no broker answers"
    log.look(0)
    assert log.asked == 1


def test_a_partition_that_went_is_forgotten() -> None:
    log = Log()
    log.look(0)
    log.retention.forget(PLACE)
    assert log.retention.margins == {}
    assert math.isnan(log.look(900).seconds)


class Behind(MemorySource):
    """A stream that is never read to its end."""

    def lag(self) -> dict[Partition, int]:
        return super().lag() | {PLACE: 7}


async def test_a_margin_that_becomes_small_is_told_in_log_status_and_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "LOOK_SECONDS", 0.0)
    source, registry = Behind({"data": 1, "feedback": 1}), CollectorRegistry()
    fill(source, 0, 200)

    async def beside(daemon: Daemon) -> None:
        margins = daemon.readers[0].retention.margins
        await until(lambda: PLACE in margins and daemon.core.counts["events"] == 200)
        source.trim({PLACE: 190})
        await until(lambda: margins[PLACE].near)
        daemon.export()
        told = status(daemon)["retention"]
        assert told["data-0"]["near"]
        assert told["data-0"]["records"] <= 10
        assert told["feedback-0"] == {"records": told["feedback-0"]["records"], "seconds": None, "near": False}
        labels = {"stream": "data", "partition": "0"}
        assert registry.get_sample_value("adaptd_retention_margin_records", labels) == told["data-0"]["records"]
        seconds = registry.get_sample_value("adaptd_retention_margin_seconds", labels)
        assert seconds is not None
        assert seconds < WINDOW_SECONDS
        daemon.stop()

    with capture_logs() as logs, daemon_on(tmp_path, source, metrics=Metrics(registry)) as daemon:
        await run(daemon, beside)
    assert "retention_near" in [entry["event"] for entry in logs]


async def test_a_daemon_measures_it_from_its_newest_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "LOOK_SECONDS", 0.0)
    source = Behind({"data": 1, "feedback": 1}, bounded=False)

    async def drained(daemon: Daemon) -> None:
        await until(lambda: daemon.core.counts["events"] == 100)
        daemon.stop()

    async def beside(daemon: Daemon) -> None:
        reader = daemon.readers[0]
        await until(lambda: daemon.core.counts["events"] == 200 and source.committed()[PLACE] == 200)
        source.trim({PLACE: 60})
        await until(lambda: reader.retention.margins[PLACE].records == 40)
        async with daemon.turn:
            await daemon.settle()
        await until(lambda: reader.retention.margins[PLACE].records == 140)
        daemon.stop()

    for first, look in ((0, drained), (100, beside)):
        fill(source, first, 100)
        with daemon_on(tmp_path, source) as daemon:
            daemon.saver.next = math.inf  # checkpoints are made at the end, and where the test makes one
            await run(daemon, look)
