"""Partitions that are kept through an outage, a name that is not free, and when a transaction may be begun again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from confluent_kafka import KafkaError, TopicPartition

from streams import confluent_client, confluent_places, confluent_source
from streams.base import Found, Partition, Positions, StreamError, StreamUnavailableError
from streams.confluent_commits import Commits
from streams.confluent_places import ECHO, Places
from streams.confluent_placing import out_of_range
from streams.confluent_sink import ConfluentClient
from streams.confluent_source import ConfluentSource
from streams.confluent_transactions import ConfluentTransactions, Membership
from streams.kafka_settings import KafkaSettings
from streams.topic_source import GROWTH_INTERVAL

P = ("data", 0)
SETTINGS = KafkaSettings.model_validate({"bootstrap_servers": "localhost:1", "client": "confluent"})


class Consumer:
    """A consumer that its group knows."""

    def memberid(self) -> str:
        return "m-2"

    def consumer_group_metadata(self) -> str:
        return "generation 2"

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Engine:
    """Notes whether a transaction could be begun while it was asked."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.told: list[tuple[str, bool]] = []

    def may_begin(self) -> bool:
        client = SimpleNamespace(producer=SimpleNamespace(begin_transaction=lambda: None))
        try:
            ConfluentTransactions(cast("ConfluentClient", client), "g", "m", lambda: self.places.membership).begin()
        except StreamUnavailableError:
            return False
        return True

    def look_up(self, *_: object, **__: object) -> dict[Partition, Found]:
        self.told.append(("look_up", self.may_begin()))
        return {P: self.found}

    found = Found()

    def assigned(self, found: Mapping[Partition, Found]) -> Positions:
        self.told.append(("assigned", self.may_begin()))
        return {}

    def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> None:
        self.told.append(("lost" if lost else "revoked", self.may_begin()))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Found(0, 5), ["look_up"]),
        (Found(0, 7, theirs=True), ["look_up", "lost", "assigned"]),
    ],
)
def test_no_transaction_is_begun_before_it_is_known_which_partitions_are_still_ours(
    found: Found, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(["data"], Commits(1.0, "m"), group=True, member="m", settings=SETTINGS)
    engine, consumer = Engine(places), cast("Any", Consumer())
    engine.found, places.assignment = found, engine
    monkeypatch.setattr(confluent_places, "look_up", engine.look_up)
    monkeypatch.setattr(confluent_places, "identities", lambda *_: {})
    places.positions[P] = 5
    places.membership = Membership("generation 1", "m-1", placed=True)
    assert engine.may_begin()
    places.keep()
    places.unplaced = [TopicPartition(*P)]
    assert not engine.may_begin()
    places.place(consumer, 1.0)
    assert engine.told == [(what, False) for what in told]
    assert engine.may_begin()
    assert places.membership == Membership("generation 2", "m-2", placed=True)


def test_whoever_has_been_shut_out_asks_once_a_second_whether_the_name_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = ConfluentSource(["data"], SETTINGS, group="g", assignment="group", member="m")
    now, asked = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def holders(*_: object) -> set[str]:
        asked.append(now)
        return {"m-1"}

    monkeypatch.setattr(confluent_source, "CLOCK", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(confluent_source, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(confluent_source, "members_named", holders)
    source._consumer, source.commits.fenced, source._shut_out = cast("Any", Consumer()), True, now + 1000.0
    for _ in range(50):
        assert source.poll(10, 0.1) == ()
    assert 4 <= len(asked) <= 5
    assert min(after - before for before, after in pairwise(asked)) > 0.9


def test_whenever_partitions_are_placed_topics_are_asked_once_whether_they_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[dict[str, str]] = [{}, {"data": "one"}, {"data": "one"}, {}, {"data": "another"}]
    monkeypatch.setattr(confluent_places, "identities", lambda *_: told.pop(0))
    monkeypatch.setattr(confluent_places, "look_up", lambda *_, **__: {})
    places = Places(["data"], Commits(1.0), group=True, member="", settings=SETTINGS)
    places.assignment = Engine(places)
    for left in (4, 3, 2, 1):
        places.place(cast("Any", Consumer()), 1.0)
        assert len(told) == left
    with pytest.raises(StreamError, match="topic data was made anew while it was read: it was one and is another now"):
        places.place(cast("Any", Consumer()), 1.0)


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (3, "offset 3 of data-0 is gone, the earliest is 5"),
        (12, "offset 12 of data-0 lies past its end 9: the topic was made anew"),
        (7, "offset 7 of data-0 does not go on from what was read, up to its end 9: the topic was made anew"),
    ],
)
def test_a_position_that_is_not_there_is_told_with_what_is(offset: int, words: str) -> None:
    consumer = SimpleNamespace(get_watermark_offsets=lambda *_, **__: (5, 9))
    message = SimpleNamespace(topic=lambda: "data", partition=lambda: 0, offset=lambda: offset)
    assert words in str(out_of_range(cast("Any", consumer), cast("Any", message), 1.0))


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (confluent_client, confluent_places):
        monkeypatch.setattr(module, "CLOCK", clock)
    return clock


def test_an_outage_explains_for_a_minute_that_the_group_does_not_know_us(clock: Clock) -> None:
    places = Places(["data"], Commits(1.0, "m"), group=True, member="m", settings=SETTINGS)
    assert not places.echoes()
    places.watch.hear(KafkaError(KafkaError._ALL_BROKERS_DOWN))
    clock.now += 10 * ECHO
    assert places.echoes(), "it lasts"
    places.watch.well()
    clock.now += ECHO - 1
    assert places.echoes()
    clock.now += 1
    assert not places.echoes()


def test_partitions_that_were_added_to_a_topic_are_looked_for_once_in_a_while(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confluent_places, "identities", lambda *_: {})
    places, asked = Places(["data"], Commits(1.0), group=False, member="", settings=SETTINGS), []

    def list_topics(topic: str, timeout: float) -> object:
        asked.append(clock.now)
        return SimpleNamespace(topics={topic: SimpleNamespace(partitions={0: None})})

    places.positions[P] = 5
    for _ in range(8):
        clock.now += GROWTH_INTERVAL / 4
        places.look_again(cast("Any", SimpleNamespace(list_topics=list_topics)), growth=True)
    assert asked == [1e6 + GROWTH_INTERVAL, 1e6 + 2 * GROWTH_INTERVAL]


def test_a_member_of_a_group_that_keeps_its_partitions_looks_that_topics_are_the_same(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(["first", "first", "second"])
    monkeypatch.setattr(confluent_places, "identities", lambda *_: {"data": next(told)})
    places = Places(["data"], Commits(1.0, "m"), group=True, member="m", settings=SETTINGS)
    consumer = cast("Any", SimpleNamespace())
    for _ in range(2):
        clock.now += GROWTH_INTERVAL
        places.look_again(consumer, growth=False)
        places.look_again(consumer, growth=False)
    clock.now += GROWTH_INTERVAL
    with pytest.raises(StreamError, match="topic data was made anew"):
        places.look_again(consumer, growth=False)
