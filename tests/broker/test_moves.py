"""Daemons that join and leave a group on a real Kafka: what waits for labels goes where its partition goes.

ADAPTD_CHURN_SECONDS says for how long two of them come and go, ADAPTD_CHURN_REPORT names a folder for what was counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient

from streams.kafka import KafkaSettings
from tests.broker.daemons import (
    MISSED_SOON,
    SLOW,
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
from tests.broker.helpers import LIMIT, AnySink, SinkFactory, TopicFactory

CHURN_SECONDS = {
    mode: float(os.environ.get("ADAPTD_CHURN_SECONDS", default))
    for mode, default in (("at_least_once", "60"), ("exactly_once", "30"))
}
LABEL_COUNTS = ("joined", "late", "orphan", "overflow")


@pytest.fixture
def daemons(tmp_path: Path, bootstrap: str, client: str) -> Iterator[Any]:
    made: list[Daemon] = []

    def make(topics: Topics, name: str, **content: str) -> Daemon:
        made.append(Daemon(tmp_path / name, topics, bootstrap, client, **content))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end()


@pytest.mark.parametrize("killed", [False, True], ids=["leaves", "is killed"])
def test_labels_of_events_that_another_answered_are_joined_where_the_partition_is(
    topic: TopicFactory,
    sink: SinkFactory,
    daemons: Any,
    settings: KafkaSettings,
    admin: KafkaAdminClient,
    killed: bool,
) -> None:
    topics, count = Topics.make(topic, partitions=2), 600
    events, feedback = sink(topics.data), sink(topics.feedback)
    first = daemons(topics, "first").start(extra=MISSED_SOON)
    send(events, small_events(0, count))
    send(feedback, small_feedback(0, 200))
    first.until(lambda status: (status["events"], status["labels"]) == (count, 200))
    reached = ends(settings, topics.data, topics.feedback)
    first.until(lambda _: committed(admin, topics.group) == reached)
    if killed:
        first.kill()
    else:
        assert first.terminate() == 0, first.words
    second = daemons(topics, "second").start()
    send(feedback, small_feedback(100, 500))  # half of the first 200 come again
    status = second.until(lambda status: status["labels"] == 400 and not status["rebuilding"]["partitions"])
    assert status["events"] == 0
    assert (status["joins"]["joined"], status["joins"]["duplicate"], status["joins"]["pending"]) == (400, 100, 0)
    assert "rebuilding_joins" in second.words
    assert "joins_rebuilt" in second.words
    assert second.terminate() == 0, second.words
    found, again = answers(settings, topics)
    assert (len(found), again) == (count, 0)


def test_labels_find_their_events_where_a_partition_comes_back_that_a_later_life_was_not_given_at_first(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, admin: KafkaAdminClient
) -> None:
    """The other has made what waited anew, and committed nothing: the notes beside the offsets are ours still."""
    topics, count = Topics.make(topic, partitions=2), 400
    events, feedback = sink(topics.data), sink(topics.feedback)
    first, other = daemons(topics, "first"), daemons(topics, "second")
    life = first.start()
    send(events, small_events(0, count))
    send(feedback, small_feedback(0, 100))
    life.until(lambda status: (status["events"], status["labels"]) == (count, 100))
    reached = ends(settings, topics.data, topics.feedback)
    life.until(lambda _: committed(admin, topics.group) == reached)
    assert life.terminate() == 0, life.words
    meanwhile = other.start()
    meanwhile.until(lambda status: status["joins"]["pending"] == 300 and not status["rebuilding"]["partitions"])
    life = first.start()
    life.until(lambda status: len(status["partitions"]) == 2 and not status["rebuilding"]["partitions"])
    assert meanwhile.terminate() == 0, meanwhile.words
    life.until(lambda status: len(status["partitions"]) == 4 and not status["rebuilding"]["partitions"])
    send(feedback, small_feedback(100, 300))
    reached = ends(settings, topics.data, topics.feedback)
    status = life.until(lambda _: committed(admin, topics.group) == reached)
    assert (status["joins"]["joined"], status["joins"]["pending"]) == (count, 0)


def test_a_daemon_that_stood_still_past_its_session_takes_no_commit_of_its_successor_back(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, admin: KafkaAdminClient
) -> None:
    topics, count = Topics.make(topic, partitions=2), 200
    events, feedback = sink(topics.data), sink(topics.feedback)
    sleeper = daemons(topics, "sleeper").start(extra=MISSED_SOON)
    send(events, small_events(0, count))
    sleeper.until(lambda status: status["events"] == count)
    send(events, small_events(count, count))
    sleeper.send(signal.SIGSTOP)  # in the middle of answering these, or before
    heir = daemons(topics, "heir").start(extra=MISSED_SOON)
    send(feedback, small_feedback(0, 2 * count))
    reached = ends(settings, topics.data, topics.feedback)
    heir.until(lambda _: committed(admin, topics.group) == reached, LIMIT)
    sleeper.send(signal.SIGCONT)
    sleeper.until(lambda _: "partitions_lost" in sleeper.words, LIMIT)
    status = sleeper.until(
        lambda status: len(status["partitions"]) == 2 and not status["rebuilding"]["partitions"], LIMIT
    )
    in_vain = status["joins"]["joined"]  # labels that lay in its sockets: learned from once by each of the two
    assert committed(admin, topics.group) == reached, "nothing of before is committed late"
    send(events, small_events(2 * count, count))
    send(feedback, small_feedback(2 * count, count))
    reached = ends(settings, topics.data, topics.feedback)
    heir.until(lambda _: committed(admin, topics.group) == reached, LIMIT)
    joined = sum(life.status()["joins"]["joined"] for life in (sleeper, heir))
    for life in (sleeper, heir):
        assert life.terminate() == 0, life.words
    given: dict[str, set[bytes]] = {}
    for record in everything(settings, topics.predictions):
        given.setdefault(record.key.decode(), set()).add(dict(record.headers)["adaptd-id"])
    assert given.keys() == {f"e{n}" for n in range(3 * count)}
    assert all(len(ids) == 1 for ids in given.values()), "an answer that comes again has the id of the first"
    assert joined == 3 * count + in_vain


class Member:
    """A daemon that comes and goes, and what its lives counted."""

    def __init__(self, daemon: Daemon, delivery: str) -> None:
        self.daemon, self.delivery = daemon, delivery
        self.life: Process | None = None
        self.last: dict[str, Any] = {}

    def join(self) -> None:
        self.life = self.daemon.start("checkpoint.every=5s", f"delivery={self.delivery}")

    def look(self) -> dict[str, Any]:
        if self.life is not None:
            with contextlib.suppress(OSError):
                self.last = self.life.status()
        return self.last

    def leave(self) -> None:
        assert self.life is not None
        self.life.until(lambda status: status["partitions"] and not status["rebuilding"]["partitions"])
        self.look()
        assert self.life.terminate() == 0, self.life.words
        self.life = None

    def count(self, *names: str) -> int:
        return sum(self.last.get("joins", {}).get(name, 0) for name in names)


class Churn:
    """Events and labels that keep coming, and two members of which at least one is there."""

    def __init__(self, events: AnySink, feedback: AnySink, members: list[Member]) -> None:
        self.events, self.feedback, self.members = events, feedback, members
        self.sent = self.labelled = self.moves = 0
        self._turn, self._next = 1, 0.0

    def send(self) -> None:
        send(self.events, small_events(self.sent, 20))
        self.sent += 20
        if self.sent - self.labelled > 300:  # labels come seconds after their events, many behind a move
            send(self.feedback, small_feedback(self.labelled, 20))
            self.labelled += 20

    def finish(self) -> None:
        send(self.feedback, small_feedback(self.labelled, self.sent - self.labelled))
        for member in self.members:
            if member.life is None:
                member.join()

    def move(self) -> None:
        """Every two seconds a member comes, or one goes."""
        if time.monotonic() < self._next:
            return
        member = self.members[self._turn % 2]
        if member.life is None:
            member.join()
            self._turn += 1  # the other one goes next
        else:
            member.leave()
        self.moves += 1
        self._next = time.monotonic() + 2.0


@pytest.mark.timeout(max(CHURN_SECONDS.values()) + 400)
@pytest.mark.parametrize("delivery", CHURN_SECONDS)
def test_while_two_daemons_come_and_go_everything_is_answered_and_every_label_is_learned_once(
    topic: TopicFactory,
    sink: SinkFactory,
    daemons: Any,
    settings: KafkaSettings,
    admin: KafkaAdminClient,
    delivery: str,
) -> None:
    topics, seconds = Topics.make(topic, partitions=4), CHURN_SECONDS[delivery]
    members = [Member(daemons(topics, name), delivery) for name in ("first", "second")]
    members[0].join()
    churn = Churn(sink(topics.data), sink(topics.feedback), members)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        churn.send()
        churn.move()
        time.sleep(0.05)
    churn.finish()
    reached = ends(settings, topics.data, topics.feedback)
    deadline = time.monotonic() + LIMIT
    while committed(admin, topics.group) != reached:
        assert time.monotonic() < deadline, [member.look() for member in members]
        time.sleep(0.2)
    for member in members:
        member.leave()
    found, again = answers(settings, topics)
    total = {name: sum(member.count(name) for member in members) for name in (*LABEL_COUNTS, "duplicate", "moved")}
    told = {"seconds": seconds, "moves": churn.moves, "events": churn.sent, "answered_again": again, "labels": total}
    told |= {"dead_letters": len(everything(settings, topics.dead_letters))}
    report(settings.client, delivery, told)
    assert found.keys() == {f"e{n}" for n in range(churn.sent)}
    assert again == 0, told
    assert sum(total[name] for name in LABEL_COUNTS) == churn.sent, told
    assert total["duplicate"] == 0, told
    assert not told["dead_letters"]


def report(client: str, delivery: str, told: dict[str, Any]) -> None:
    """Log what was counted, and write it where it was asked for."""
    logging.getLogger(__name__).info(json.dumps(told))
    if folder := os.environ.get("ADAPTD_CHURN_REPORT"):
        found = {
            "client": client,
            "delivery": delivery,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **told,
        }
        (Path(folder) / f"churn-{client}-{delivery}.json").write_text(json.dumps(found, indent=2) + "\n")


def test_a_step_longer_than_the_poll_interval_costs_no_partition_and_no_answer(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings
) -> None:
    topics = Topics.make(topic, partitions=2)
    slow = SLOW.replace("0.05", "0.05 if len(x) < 8 else 5")
    extra = {"session_timeout_ms": 3500, "max_poll_interval_ms": 3500}
    daemon = daemons(topics, "first", model=slow)
    life = daemon.start("learning.mode=inline", "batching.max_delay=60s", extra=extra)
    life.until(lambda status: len(status["partitions"]) == 4)
    started = time.monotonic()
    send(sink(topics.data), small_events(0, 16))
    life.until(lambda status: status["events"] == 16)
    assert time.monotonic() - started > 5
    assert "partitions_" not in life.words, "steps of five seconds, and the group never missed it"
    assert life.terminate() == 0, life.words
    assert len(answers(settings, topics)[0]) == 16
