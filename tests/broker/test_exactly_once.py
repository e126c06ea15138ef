"""`delivery: exactly_once` on a real Kafka: whatever is killed, a reader of committed records sees each answer once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, OffsetAndMetadata, TopicPartition

from streams.base import Message
from streams.kafka import KafkaSettings
from tests.broker.daemons import (
    MISSED_SOON,
    Daemon,
    Process,
    Topics,
    committed,
    ends,
    everything,
    send,
    small_events,
    small_feedback,
    until_no_transaction_is_open,
)
from tests.broker.helpers import LIMIT, AnySink, SinkFactory, TopicFactory
from tests.broker.node import Node

KILLS = int(os.environ.get("ADAPTD_BROKER_KILLS", "3"))
SEED = int(os.environ.get("ADAPTD_CRASH_SEED", "0"))
FLAGS = ("delivery=exactly_once", "checkpoint.every=300ms")
AWAY_SECONDS, AWAY_TIMEOUT = 8.0, 3
"""Longer than twice what any question to a cluster may take, so that some are given up and others are under way."""

SIGNAL = """
import signal, threading
import streams.{module} as module
calls = []
class Watched(module.{owner}):
    def {call}(self, *arguments, **options):
        calls.append(1)
        if {after}:
            super().{call}(*arguments, **options)
        if len(calls) == {nth}:
            signal.pthread_kill(threading.get_ident(), signal.{sign})
        return None if {after} else super().{call}(*arguments, **options)
module.{owner} = Watched
"""
"""A process that ends or stops itself at one call of the client.

The signal goes to the thread that calls: one to the process may be taken by another thread a moment later, and the call
goes on until then.
"""


OWNERS = {"kafka-python": ("kafka_sink", "KafkaProducer"), "confluent": ("confluent_sink", "Producer")}


def at(client: str, call: str, nth: int, sign: str = "SIGKILL", *, after: bool = False) -> str:
    module, owner = OWNERS[client]
    return SIGNAL.format(module=module, owner=owner, call=call, nth=nth, sign=sign, after=after)


def once(settings: KafkaSettings, topics: Topics, count: int, bad: int = 0) -> bool:
    """Whether all events are answered and all bad records buried; fails where anything comes twice."""
    found = Counter(json.loads(record.value)["id"] for record in everything(settings, topics.predictions))
    buried = Counter(record.value for record in everything(settings, topics.dead_letters))
    assert not {name: times for name, times in (found | buried).items() if times > 1}
    assert found.keys() <= {f"e{n}" for n in range(count)}
    return len(found) == count and len(buried) == bad


def settle(settings: KafkaSettings, topics: Topics, count: int, life: Process, bad: int = 0) -> None:
    """Wait until everything is answered once; and see that draining adds nothing."""
    deadline = time.monotonic() + LIMIT
    while not once(settings, topics, count, bad):
        assert time.monotonic() < deadline, life.words
        assert life.alive, life.words
        time.sleep(0.2)
    life.until(lambda status: status["state"] != "starting", LIMIT)  # only then does it drain
    assert life.terminate() == 0, life.words
    assert once(settings, topics, count, bad)


def stopped(life: Process) -> bool:
    status = Path(f"/proc/{life.pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0] == "T"


def until(done: Callable[[], bool], life: Process) -> None:
    deadline = time.monotonic() + LIMIT
    while not done():
        assert time.monotonic() < deadline, life.words
        time.sleep(0.05)


def send_until_stopped(events: AnySink, life: Process) -> int:
    """Send until a process has stopped itself; how many events. Two sends may end in one transaction, never in none."""
    count = 0
    deadline = time.monotonic() + LIMIT
    while not stopped(life):
        assert time.monotonic() < deadline, life.words
        send(events, small_events(count, 50))
        count += 50
        time.sleep(0.3)
    return count


Daemons = Callable[..., Daemon]


@pytest.fixture
def daemons(tmp_path: Path, bootstrap: str, client: str) -> Iterator[Daemons]:
    made: list[Daemon] = []

    def make(topics: Topics, name: str = "daemon") -> Daemon:
        made.append(Daemon(tmp_path / name, topics, bootstrap, client))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end()


def test_a_daemon_that_is_killed_again_and_again_answers_each_event_once(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons
) -> None:
    topics = Topics.make(topic, 2)
    daemon = daemons(topics)
    events, feedback = sink(topics.data), sink(topics.feedback)
    chance = random.Random(SEED)
    count = bad = 0
    for _ in range(KILLS):
        life = daemon.start(*FLAGS)
        send(events, small_events(count, 200))
        send(events, [Message(b"bad", b"bad %d" % bad)])
        send(feedback, small_feedback(count, 200))
        count, bad = count + 200, bad + 1
        life.until(lambda status: status["state"] in ("serving", "waiting for records"))
        time.sleep(chance.uniform(0.0, 0.6))
        life.kill()
    settle(settings, topics, count, daemon.start(*FLAGS), bad)


MOMENTS = [
    ("begin_transaction", 3, True),
    ("send_offsets_to_transaction", 3, False),
    ("send_offsets_to_transaction", 3, True),
    ("commit_transaction", 3, False),
    ("commit_transaction", 3, True),
]


def test_a_kill_at_every_step_of_a_transaction_leaves_each_answer_once(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons
) -> None:
    topics = Topics.make(topic)
    daemon = daemons(topics)
    events = sink(topics.data)
    count = 0
    for call, nth, after in MOMENTS:
        life = daemon.start(*FLAGS, before=at(settings.client, call, nth, after=after))
        life.until(lambda status: status["state"] != "starting")
        deadline = time.monotonic() + LIMIT
        while life.alive:
            assert time.monotonic() < deadline, life.words
            send(events, small_events(count, 20))
            count += 20
            time.sleep(0.3)
        assert life.wait(LIMIT) == -signal.SIGKILL
    send(events, [Message(None, b"bad")])
    settle(settings, topics, count, daemon.start(*FLAGS), bad=1)


def test_a_broker_that_is_killed_in_the_middle_of_transactions_costs_no_answer_and_doubles_none(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons, broker: Node
) -> None:
    topics = Topics.make(topic)
    daemon = daemons(topics)
    events = sink(topics.data)
    life = daemon.start(*FLAGS, extra=MISSED_SOON)
    life.until(lambda status: status["state"] != "starting")
    count = 0
    for _ in range(2):
        send(events, small_events(count, 600))
        count += 600
        life.until(lambda status, seen=count: status["events"] > seen - 500)  # type: ignore[misc]
        broker.kill()
        broker.start()
    settle(settings, topics, count, life)


def test_a_broker_that_is_away_for_long_ends_no_daemon_and_each_answer_is_there_once(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons, broker: Node
) -> None:
    topics = Topics.make(topic)
    events = sink(topics.data)
    life = daemons(topics).start(*FLAGS, f"streams.kafka.timeout={AWAY_TIMEOUT}", extra=MISSED_SOON)
    send(events, small_events(0, 600))
    life.until(lambda status: status["events"] > 100)  # so that a transaction is under way
    broker.kill()
    events.send(small_events(600, 100))
    try:
        time.sleep(AWAY_SECONDS)
        assert life.alive, life.words
    finally:
        broker.start()
    events.flush(LIMIT)
    settle(settings, topics, 700, life)


def test_of_two_daemons_one_is_killed_and_the_other_goes_on_where_it_was(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons
) -> None:
    topics = Topics.make(topic, 2)
    events = sink(topics.data)
    flags = (*FLAGS, "streams.kafka.timeout=3")
    one, two = (daemons(topics, name).start(*flags, extra=MISSED_SOON) for name in ("one", "two"))
    for life in (one, two):
        life.until(lambda status: status["state"] == "waiting for records")
    count = 0
    for _ in range(5):
        send(events, small_events(count, 100))
        count += 100
        time.sleep(0.3)
    one.kill()
    send(events, small_events(count, 100))
    settle(settings, topics, count + 100, two)


def test_a_daemon_that_stood_still_until_its_transaction_expired_goes_on(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons
) -> None:
    topics = Topics.make(topic)
    events = sink(topics.data)
    stopping = at(settings.client, "commit_transaction", 2, "SIGSTOP")
    life = daemons(topics).start(*FLAGS, "streams.kafka.timeout=3", before=stopping, extra=MISSED_SOON)
    life.until(lambda status: status["state"] == "waiting for records")
    count = send_until_stopped(events, life)
    until_no_transaction_is_open(settings, topics.predictions)
    life.send(signal.SIGCONT)
    settle(settings, topics, count, life)
    assert "transaction_again" in life.words


def test_a_zombie_whose_successor_lives_writes_nothing_and_ends_with_a_sentence(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons, tmp_path: Path
) -> None:
    topics = Topics.make(topic)
    events = sink(topics.data)
    zombie = daemons(topics, "zombie").start(*FLAGS, before=at(settings.client, "commit_transaction", 3, "SIGSTOP"))
    zombie.until(lambda status: status["state"] == "waiting for records")
    count = send_until_stopped(events, zombie)
    heir = daemons(topics, "heir")
    shutil.copytree(tmp_path / "zombie" / "state", tmp_path / "heir" / "state")
    successor = heir.start(*FLAGS)
    until(lambda: once(settings, topics, count), successor)
    zombie.send(signal.SIGCONT)
    assert zombie.wait(LIMIT) == 78
    assert "its state directory is a copy of this one" in zombie.words
    send(events, small_events(count, 50))
    settle(settings, topics, count + 50, successor)


def test_a_zombie_that_has_nothing_to_do_ends_with_a_sentence_as_well(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons, tmp_path: Path
) -> None:
    topics = Topics.make(topic)
    events = sink(topics.data)
    zombie = daemons(topics, "zombie").start(*FLAGS)
    send(events, small_events(0, 50))
    until(lambda: once(settings, topics, 50), zombie)
    zombie.send(signal.SIGSTOP)
    heir = daemons(topics, "heir")
    shutil.copytree(tmp_path / "zombie" / "state", tmp_path / "heir" / "state")
    zombie.send(signal.SIGCONT)  # soon, so that its session goes on and heartbeats alone hear of the other
    heir.start(*FLAGS)
    assert zombie.wait(LIMIT) == 78
    assert "its state directory is a copy of this one" in zombie.words


LOSSES = {
    "refused by the group": ("send_offsets_to_transaction", 20, True),
    "committed late": ("commit_transaction", 20, False),
    "expired": ("commit_transaction", 3, True),
}
"""What becomes of the transaction, and for that: where its process stops, `streams.kafka.timeout`, and whether until
another has answered what the transaction holds, or only until the group has given that away."""


@pytest.mark.parametrize("fate", LOSSES)
def test_partitions_that_are_lost_in_an_open_transaction_are_answered_once_and_the_loser_goes_on(
    topic: TopicFactory,
    sink: SinkFactory,
    settings: KafkaSettings,
    daemons: Daemons,
    admin: KafkaAdminClient,
    fate: str,
) -> None:
    call, timeout, answered = LOSSES[fate]
    topics = Topics.make(topic, 2)
    events = sink(topics.data)
    flags = (*FLAGS, f"streams.kafka.timeout={timeout}")
    stopping = at(settings.client, call, 3, "SIGSTOP")
    loser = daemons(topics, "loser").start(*flags, before=stopping, extra=MISSED_SOON)
    heir = daemons(topics, "heir").start(*flags, extra=MISSED_SOON)
    for life in (loser, heir):
        life.until(lambda status: len(status["partitions"]) == 2)
    count = send_until_stopped(events, loser)

    def moved(status: dict[str, Any]) -> bool:
        given = len(admin.describe_groups([topics.group])[topics.group]["members"]) == 1
        reached = {f"{name}-{n}": end for (name, n), end in ends(settings, topics.data).items()}
        return given and (not answered or reached.items() <= status["positions"].items())

    heir.until(moved, LIMIT)
    loser.send(signal.SIGCONT)
    loser.until(lambda _: "partitions_lost" in loser.words, LIMIT)
    for life in (loser, heir):
        life.until(lambda status: len(status["partitions"]) == 2, LIMIT)
    if fate == "refused by the group":  # a commit may have ended before its process stopped
        given_up = r'adaptd_transactions_total\{result="given_up"\}'
        loser.until(lambda _: loser.metric(given_up) > 0 and "transaction_again" in loser.words, LIMIT)
    send(events, small_events(count, 50))
    settle(settings, topics, count + 50, loser)
    settle(settings, topics, count + 50, heir)


def test_a_group_that_has_forgotten_its_offsets_is_refused_until_they_are_set_back(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, daemons: Daemons, admin: KafkaAdminClient
) -> None:
    topics = Topics.make(topic)
    events, daemon = sink(topics.data), daemons(topics)
    send(events, small_events(0, 100))
    settle(settings, topics, 100, daemon.start(*FLAGS))
    assert committed(admin, topics.group) == {(topics.data, 0): 100}
    admin.delete_groups([topics.group])
    assert committed(admin, topics.group) == {}
    send(events, small_events(100, 50))
    for _ in range(2):
        life = daemon.start(*FLAGS)
        assert life.wait(LIMIT) == 78, life.words
        last = life.words.strip().splitlines()[-1]
        assert last.startswith(f"adaptd: the group has no offset of {topics.data}-0 any more"), life.words
        assert f"({topics.data}:0 to 100 is what" in last
        assert "--fresh" in last
    admin.alter_group_offsets(topics.group, {TopicPartition(topics.data, 0): OffsetAndMetadata(100, "", -1)})
    settle(settings, topics, 150, daemon.start(*FLAGS))
