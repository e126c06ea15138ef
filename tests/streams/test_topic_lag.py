from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest
from kafka import TopicPartition, errors

from streams.base import Partition, Positions
from streams.kafka_commits import Commits
from streams.kafka_fetch import edges, offsets
from streams.kafka_settings import KafkaSettings
from streams.topic_source import TopicSource

A, B = ("a", 0), ("a", 1)


class Known(TopicSource):
    """A source whose client knows what it is told to know, as does its cluster."""

    _commits_kind = Commits
    _failures = errors.KafkaError
    trouble = ""

    def _set_up(self) -> None:
        self.reached: dict[Partition, tuple[int, int | None]] = {}
        self.cluster: Positions = {}
        self.asked: list[set[Partition]] = []

    def _reached(self) -> Mapping[Partition, tuple[int, int | None]]:
        return self.reached

    def _ask_ends(self, partitions: Collection[Partition]) -> Positions:
        self.asked.append(set(partitions))
        return {p: self.cluster[p] for p in partitions if p in self.cluster}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    monkeypatch.setattr("streams.topic_source.ENDS_INTERVAL", 0.0)
    return Known(["a"], KafkaSettings(bootstrap_servers=("127.0.0.1:9092",)))


def test_the_cluster_is_asked_only_for_ends_that_stand_still_while_more_may_have_come(known: Known) -> None:
    known.cluster = {A: 50, B: 60}
    known.reached = {A: (4, 10), B: (7, 7)}
    assert known.lag() == {A: 6, B: 0}
    known.reached = {A: (5, 12), B: (7, 7)}
    assert known.lag() == {A: 7, B: 0}
    assert known.asked == []
    assert known.lag() == {A: 45, B: 0}
    assert known.asked == [{A}]
    known._paused.add("a")
    assert known.lag() == {A: 45, B: 53}


def test_a_lag_that_nobody_knows_is_left_out_and_asked_for(known: Known) -> None:
    known.reached = {A: (4, None), B: (0, 0)}
    assert known.lag() == {B: 0}
    known.cluster = {A: 9}
    assert known.lag() == {A: 5, B: 0}


def test_what_was_asked_for_holds_while_the_cluster_does_not_answer(known: Known) -> None:
    known.reached, known.cluster = {A: (4, 10)}, {A: 50}
    known.lag()
    assert known.lag() == {A: 46}
    known.cluster, known.reached = {}, {A: (9, 10)}
    assert known.lag() == {A: 41}
    asked = len(known.asked)
    assert known.lag() == {A: 41}
    assert len(known.asked) == asked, "not again at once"


def test_nobody_is_asked_while_no_broker_answers(known: Known) -> None:
    known.reached, known.trouble = {A: (4, 10)}, "no broker"
    for _ in range(3):
        assert known.lag() == {A: 6}
    assert known.asked == []


class Leaderless:
    """Asks as kafka-python 3.0 does, which leaves partitions without a leader out and misses them in the answer."""

    def end_offsets(self, partitions: list[TopicPartition], timeout_ms: int) -> dict[TopicPartition, int]:
        return {tp: {TopicPartition("a", 0): 5}[tp] for tp in partitions}


def test_a_partition_without_a_leader_is_an_error_that_passes() -> None:
    with pytest.raises(errors.LeaderNotAvailableError, match=r"topic='a', partition=1.* has no leader"):
        offsets(Leaderless(), [TopicPartition(*A), TopicPartition(*B)], last=True, timeout=1.0)
    assert issubclass(errors.LeaderNotAvailableError, errors.RetriableError)
    assert edges(Leaderless(), [A, B], last=True, timeout=1.0) == {}
    assert edges(Leaderless(), [A], last=True, timeout=1.0) == {A: 5}
