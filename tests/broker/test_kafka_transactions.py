"""Transactions of the sinks against a real Kafka: what a reader of committed records sees, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from kafka import KafkaAdminClient

from streams.base import Message, Positions, StreamError, StreamUnavailableError
from streams.clients import client_of, sink_of, source_of, transactions_of
from streams.group_transactions import GroupTransactions
from streams.kafka import KafkaSettings
from streams.kafka_note import read_note
from tests.broker.daemons import everything, until_no_transaction_is_open
from tests.broker.helpers import (
    AnySink,
    AnySource,
    Keeper,
    Opened,
    SinkFactory,
    TopicFactory,
    fresh_group,
    named_for,
    patiently,
    poll_until,
    read,
    write,
)

QUICK = {"heartbeat_interval_ms": 300, "session_timeout_ms": 6000}


@dataclass
class Member:
    """A member of a group with what it writes in transactions."""

    source: AnySource
    sink: AnySink
    letters: AnySink
    transactions: GroupTransactions

    def send(self, value: bytes, end: int) -> Positions:
        self.sink.send([Message(None, value)])
        self.sink.flush(10)
        return {(self.source.streams[0], 0): end}

    def close(self) -> None:
        for part in (self.sink, self.letters, self.transactions, self.source):
            part.close()


Members = Callable[..., Member]


@dataclass
class Place:
    data: str
    out: str
    letters: str
    group: str
    settings: KafkaSettings

    def seen(self) -> list[bytes]:
        return [record.value for record in everything(self.settings, self.out)]

    def buried(self) -> list[bytes]:
        return [record.value for record in everything(self.settings, self.letters)]


@pytest.fixture
def timeout() -> float:
    """Seconds for an answer; transactions expire after half as much again."""
    return 10.0


@pytest.fixture
def place(topic: TopicFactory, bootstrap: str, client: str, timeout: float) -> Place:
    given = {"bootstrap_servers": bootstrap, "allow_insecure": True, "client": client, "timeout": timeout}
    settings = KafkaSettings.model_validate(given | {"extra": named_for(client, QUICK)})
    return Place(topic(1, "data"), topic(1, "out"), topic(1, "letters"), fresh_group(), settings)


@pytest.fixture
def member(place: Place) -> Iterator[Members]:
    made: list[Member] = []

    def make(name: str = "m", *, joined: bool = True) -> Member:
        source = source_of([place.data], place.settings, group=place.group, assignment="group", member=name)
        keeper = Keeper()
        client = client_of(place.settings, transactional_id=f"{place.group}-{name}")
        transactions = transactions_of(client, source, group=place.group, owner=name)
        sink, letters = (sink_of(topic, client) for topic in (place.out, place.letters))
        made.append(Member(source, sink, letters, transactions))
        patiently(lambda: source.open(keeper))
        if joined:
            poll_until([source], lambda: bool(keeper.owned))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ready(member: Member) -> Positions:
    """Open in the order of the engine: sinks first."""
    member.sink.open()
    member.letters.open()
    return member.transactions.open()


def test_answers_letters_and_offsets_become_visible_together(
    place: Place, member: Members, admin: KafkaAdminClient
) -> None:
    one = member()
    assert ready(one) == {}
    one.transactions.begin()
    positions = one.send(b"a", 3)
    one.letters.send([Message(None, b"bad")])
    one.letters.flush(10)
    assert (place.seen(), place.buried()) == ([], [])
    one.transactions.commit(positions, {(place.data, 0): 1}, 10)
    assert (place.seen(), place.buried()) == ([b"a"], [b"bad"])
    ((_, stored),) = admin.list_group_offsets(place.group)[place.group].items()
    assert stored.offset == 3
    assert read_note(stored.metadata) == ("m", 1)
    two = member(joined=False)
    assert ready(two) == {(place.data, 0): 3}


def test_a_second_life_goes_on_where_the_first_committed_and_shuts_it_out(
    place: Place, member: Members, sink: SinkFactory, source: Opened
) -> None:
    write(sink(place.data), 10)
    first = member()
    ready(first)
    first.transactions.begin()
    first.transactions.commit(first.send(b"a", 3), None, 10)
    first.transactions.begin()
    first.send(b"never seen", 9)
    second = member(joined=False)
    assert ready(second) == {(place.data, 0): 3}
    with pytest.raises(StreamUnavailableError, match="the transaction failed"):
        first.transactions.commit({(place.data, 0): 9}, None, 10)
    poll_until([second.source], lambda: second.source.committed() == {(place.data, 0): 3})
    second.transactions.begin()
    second.transactions.commit(second.send(b"b", 4), None, 10)
    seen = source(place.out)
    assert [record.value for record in read(seen, 2)] == [b"a", b"b"]
    poll_until([seen], lambda: seen.lag() == {(place.out, 0): 0})  # past the marks of transactions
    assert second.transactions.recover() == {}
    third = member(joined=False)
    poll_until([third.source], lambda: third.source.committed() == {(place.data, 0): 4})


def test_a_process_that_is_not_in_its_group_begins_no_transaction(place: Place, member: Members) -> None:
    with pytest.raises(StreamUnavailableError, match=f"has not joined group {place.group}"):
        member(joined=False).transactions.begin()


def test_what_was_not_committed_is_never_seen_and_is_sent_again(place: Place, member: Members) -> None:
    one = member()
    ready(one)
    one.transactions.begin()
    one.send(b"a", 1)
    one.letters.send([Message(None, b"bad")])
    one.letters.flush(10)
    assert one.transactions.recover() == {}
    one.transactions.begin()
    positions = one.send(b"a again", 1)
    one.transactions.commit(positions, None, 10)
    assert (place.seen(), place.buried()) == ([b"a again"], [])


@pytest.mark.parametrize("timeout", [2.0])
def test_a_transaction_that_expired_is_made_again(place: Place, member: Members) -> None:
    one = member()
    ready(one)
    one.transactions.begin()
    one.send(b"late", 1)
    until_no_transaction_is_open(place.settings, place.out)
    with pytest.raises(StreamUnavailableError):
        one.transactions.commit({(place.data, 0): 1}, None, 10)
    poll_until([one.source], lambda: True)
    assert one.transactions.recover() == {}
    one.transactions.begin()
    one.transactions.commit(one.send(b"in time", 1), None, 10)
    assert place.seen() == [b"in time"]


class Late:
    """A producer whose commits are done and not heard of until ``told``."""

    def __init__(self, producer: Any, told: threading.Event) -> None:
        self._producer = producer
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def commit_transaction(self, *arguments: float) -> None:
        self._producer.commit_transaction(*arguments)
        self._told.wait()


def test_a_commit_that_happened_and_was_not_heard_of_is_found_out(
    place: Place, member: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = member()
    ready(one)
    shared, told = one.transactions._client, threading.Event()
    monkeypatch.setattr(type(one.transactions), "_producer", property(lambda _: Late(shared.producer, told)))
    one.transactions.begin()
    with pytest.raises(StreamUnavailableError, match="no answer from the cluster"):
        one.transactions.commit(one.send(b"a", 5), None, 4)
    assert one.transactions.recover() == {(place.data, 0): 5}
    told.set()
    assert place.seen() == [b"a"]


def test_a_process_whose_place_was_taken_stops_and_its_successor_goes_on(place: Place, member: Members) -> None:
    zombie = member()
    ready(zombie)
    zombie.transactions.begin()
    zombie.send(b"zombie", 1)
    successor = member()
    assert ready(successor) == {}
    successor.transactions.begin()
    positions = successor.send(b"successor", 1)
    with pytest.raises(StreamUnavailableError):
        zombie.transactions.commit({(place.data, 0): 1}, None, 10)
    with pytest.raises(StreamError, match=r"another process writes as .*-m: its state directory is a copy") as told:
        zombie.transactions.recover()
    assert not isinstance(told.value, StreamUnavailableError)
    successor.transactions.commit(positions, None, 10)
    assert place.seen() == [b"successor"]


def test_a_member_that_the_group_has_missed_commits_nothing(
    place: Place, member: Members, sink: SinkFactory, admin: KafkaAdminClient
) -> None:
    write(sink(place.data), 3)
    one = member("one")
    ready(one)
    one.transactions.begin()
    stale = one.send(b"of one", 3)
    two = member("two", joined=False)
    ready(two)
    one.source.close()  # its partition goes to the other
    poll_until([two.source], lambda: bool(two.source.committed() or two.source.position((place.data, 0)) is not None))
    one.transactions._metadata = lambda: one.transactions._member
    with pytest.raises(StreamUnavailableError):
        one.transactions.commit(stale, None, 10)
    one.transactions.recover()
    two.transactions.begin()
    two.transactions.commit(two.send(b"of two", 3), None, 10)
    assert place.seen() == [b"of two"]
