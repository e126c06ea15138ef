"""What a daemon does when its broker, its topics or its rights are not as they should be; see docs/faults.md."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, TopicPartition
from kafka.admin import NewTopic

from streams.base import Message
from streams.kafka import KafkaSettings
from tests.broker.daemons import (
    SLOW,
    Daemon,
    Process,
    Topics,
    answers,
    committed,
    everything,
    send,
    small_events,
    small_feedback,
)
from tests.broker.helpers import LIMIT, SinkFactory, TopicFactory, remade
from tests.broker.node import Node
from tests.broker.proxy import Proxy
from tests.broker.rights import Rights, refused


@pytest.fixture
def daemons(tmp_path: Path, bootstrap: str, client: str) -> Iterator[Any]:
    made: list[Daemon] = []

    def make(topics: Topics, name: str = "daemon", **content: str) -> Daemon:
        made.append(Daemon(tmp_path / name, topics, bootstrap, client, **content))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end()


def names(count: int) -> set[str]:
    return {f"e{n}" for n in range(count)}


# -- positions and topics ---------------------------------------------------------------------------------------------


def test_records_that_retention_took_while_the_daemon_was_down_are_told_with_the_choices(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, admin: KafkaAdminClient
) -> None:
    topics = Topics.make(topic)
    daemon, events = daemons(topics), sink(topics.data)
    send(events, small_events(0, 100))
    life = daemon.start()
    life.until(lambda status: status["events"] == 100)
    assert life.terminate() == 0, life.words
    send(events, small_events(100, 100))
    admin.delete_records({TopicPartition(topics.data, 0): 150})
    for _ in range(2):  # the second start finds the same, since the first one changed nothing
        life = daemon.start()
        refused(
            life,
            78,
            f"offset 100 of {topics.data}-0 is gone, the earliest is 150",
            "restore a checkpoint",
            "fresh state directory and group and do without the 50 records",
            "retention.ms",
        )


def few_at_once(client: str) -> dict[str, int]:
    """Have a client read ahead little; librdkafka would hold all of a small topic at once."""
    ahead = {"queued_min_messages": 10} if client == "confluent" else {}
    return {"max_partition_fetch_bytes": 4000, **ahead}


def test_records_that_retention_takes_while_the_daemon_reads_are_told(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, admin: KafkaAdminClient, client: str
) -> None:
    topics = Topics.make(topic)
    send(sink(topics.data), small_events(0, 5000))
    few_held = "from streams import confluent_fetch\nconfluent_fetch.HELD_RECORDS = 64"
    life = daemons(topics, model=SLOW).start(extra=few_at_once(client), before=few_held)
    life.until(lambda status: status["events"] >= 8)
    admin.delete_records({TopicPartition(topics.data, 0): 5000})
    refused(life, 78, f"of {topics.data}-0 is gone, the earliest is 5000", "retention.ms")


def test_a_topic_that_was_made_anew_while_the_daemon_was_down_is_told(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, admin: KafkaAdminClient
) -> None:
    topics = Topics.make(topic)
    daemon = daemons(topics)
    send(sink(topics.data), small_events(0, 100))
    life = daemon.start()
    life.until(lambda status: status["events"] == 100)
    assert life.terminate() == 0, life.words
    remade(admin, topics.data)
    send(sink(topics.data), small_events(0, 40))
    life = daemon.start()
    refused(life, 78, topics.data, "made anew", "--fresh")


def test_a_topic_that_is_made_anew_while_the_daemon_reads_is_told(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, admin: KafkaAdminClient
) -> None:
    topics = Topics.make(topic)
    send(sink(topics.data), small_events(0, 100))
    life = daemons(topics).start(extra={"metadata_max_age_ms": 500})
    life.until(lambda status: status["events"] == 100)
    remade(admin, topics.data)
    refused(life, 78, topics.data, "made anew", "fresh state directory and group")


# -- rights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["data", "feedback", "predictions", "dead_letters", "group"])
def test_a_right_that_is_missing_at_the_start_is_told_and_with_it_the_daemon_works(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, admin: KafkaAdminClient, as_guest: list[str], missing: str
) -> None:
    topics = Topics.make(topic)
    rights, daemon = Rights(admin, topics), daemons(topics)
    rights.grant(*(rights.acls.keys() - {missing}))
    send(sink(topics.data), small_events(0, 20))
    refused(daemon.start(*as_guest), 78, getattr(topics, missing), "check")
    rights.grant(missing)
    life = daemon.start(*as_guest)
    life.until(lambda status: status["events"] == 20)
    assert life.terminate() == 0, life.words


@pytest.mark.parametrize("withdrawn", ["data", "feedback", "predictions", "dead_letters", "group"])
def test_a_right_that_is_withdrawn_ends_the_daemon_with_a_sentence_and_nothing_is_lost(
    topic: TopicFactory,
    sink: SinkFactory,
    daemons: Any,
    admin: KafkaAdminClient,
    settings: KafkaSettings,
    as_guest: list[str],
    withdrawn: str,
) -> None:
    topics = Topics.make(topic)
    rights, daemon, events, feedback = Rights(admin, topics), daemons(topics), sink(topics.data), sink(topics.feedback)
    rights.grant(*rights.acls)
    send(events, small_events(0, 20))
    send(feedback, small_feedback(0, 20))
    life = daemon.start(*as_guest)
    life.until(lambda status: (status["events"], status["labels"]) == (20, 20))
    rights.withdraw(withdrawn)
    bad = [Message(b"bad", b"no event %d" % n) for n in range(3)]
    send(events, [*bad, *small_events(20, 20)])
    send(feedback, small_feedback(20, 20))
    refused(life, 78, getattr(topics, withdrawn), "check the user and its ACLs")
    rights.grant(withdrawn)
    life = daemon.start(*as_guest)
    status = life.until(lambda status: (status["events"], status["labels"]) == (40, 40))
    assert (status["joins"]["joined"], status["joins"]["duplicate"]) == (40, 0)
    assert life.terminate() == 0, life.words
    found, _ = answers(settings, topics)
    assert found.keys() == names(40)
    letters = {letter.value for letter in everything(settings, topics.dead_letters)}
    assert letters == {message.value for message in bad}


# -- sinks ------------------------------------------------------------------------------------------------------------


def test_a_dead_letter_topic_that_goes_away_is_waited_for_and_no_letter_is_dropped(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, admin: KafkaAdminClient, settings: KafkaSettings
) -> None:
    topics = Topics.make(topic)
    events = sink(topics.data)
    life = daemons(topics).start("streams.kafka.timeout=2", "batching.max_size=1", extra={"metadata_max_age_ms": 500})
    send(events, small_events(0, 20))
    life.until(lambda status: status["events"] == 20)
    life.until(lambda _: committed(admin, topics.group).get((topics.data, 0)) == 20)
    admin.delete_topics([topics.dead_letters])
    bad = [Message(b"bad", b"no event %d" % n) for n in range(100)]
    send(events, [message for pair in zip(bad, small_events(20, 100), strict=True) for message in pair])
    life.until(lambda status: topics.dead_letters in status["waiting_for"])
    assert committed(admin, topics.group)[topics.data, 0] == 20
    admin.create_topics([NewTopic(topics.dead_letters, 1, 1)])
    life.until(lambda status: status["events"] == 120)
    assert life.terminate() == 0, life.words
    assert {letter.value for letter in everything(settings, topics.dead_letters)} == {m.value for m in bad}
    found, _ = answers(settings, topics)
    assert found.keys() == names(120)


def test_dead_letters_that_their_topic_refuses_go_without_their_value(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings
) -> None:
    topics = Topics.make(topic)
    topics.dead_letters = topic(1, "letters", max_message_bytes="2000")
    large, small = [b"x" * 5000, b"y" * 6000], [b"no event", b"none either"]
    values = [large[0], small[0], large[1], small[1]]
    send(sink(topics.data), [*(Message(b"k", value) for value in values), *small_events(0, 20)])
    life = daemons(topics).start()
    life.until(lambda status: status["events"] == 20)
    assert life.terminate() == 0, life.words
    letters = everything(settings, topics.dead_letters)
    assert {letter.value for letter in letters} == {b"", *small}
    omitted = {dict(letter.headers).get("__adaptd.errors.omitted") for letter in letters}
    assert omitted == {None, b"5000", b"6000"}


def test_an_answer_that_its_topic_refuses_for_its_size_ends_the_daemon_with_the_setting_to_change(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, admin: KafkaAdminClient
) -> None:
    topics = Topics.make(topic)
    topics.predictions = topic(1, "predictions", max_message_bytes="100")
    send(sink(topics.data), small_events(0, 20))
    life = daemons(topics).start()
    refused(life, 78, f"too large for topic {topics.predictions}", "raise max.message.bytes")
    assert committed(admin, topics.group).get((topics.data, 0), 0) == 0


# -- a broker that is slow, frozen, away or killed --------------------------------------------------------------------


def test_a_slow_line_that_breaks_costs_time_and_neither_answers_nor_memory(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, broker: Node
) -> None:
    topics, count = Topics.make(topic), 6000
    send(sink(topics.data), small_events(0, count))
    with Proxy(broker.proxy_port, broker.far_port) as line:
        life = daemons(topics).start(f"streams.kafka.bootstrap_servers=127.0.0.1:{broker.proxy_port}")
        life.until(lambda status: status["events"] > 200)
        line.delay, before = 0.7, life.memory
        for _ in range(2):
            line.cut()
            reached = life.status()["events"]
            life.until(lambda status, reached=reached: status["events"] > reached or status["events"] == count)
            assert life.metric("adaptd_queue_depth") < 2000
        line.delay = 0.0
        life.until(lambda status: status["events"] == count)
        assert life.memory - before < 60e6
        assert life.terminate() == 0, life.words
        assert line.passed > 100_000
    found, _ = answers(settings, topics)
    assert found.keys() == names(count)


def lagging(life: Process, name: str) -> dict[str, float]:
    """The series of a lag, by topic and partition."""
    found = {}
    for line in life.get("/metrics").splitlines():
        if line.startswith(f"adaptd_{name}{{"):
            labels, _, value = line.rpartition(" ")
            found[labels] = float(value)
    return found


def lag_of(life: Process, topic: str) -> tuple[float, float]:
    """The lag of the one partition of a topic, in records and in seconds."""
    found = [lagging(life, name) for name in ("lag_records", "lag_seconds")]
    records, seconds = ([value for labels, value in one.items() if f'"{topic}"' in labels] for one in found)
    return sum(records), sum(seconds)


FREEZE_SECONDS = 3.0
SOON_STUCK = f"import engine.admin; engine.admin.STUCK_SECONDS = {FREEZE_SECONDS / 2}"
"""A daemon that a freeze keeps from polling, or from answering what it has, would be called stuck before its end."""


def test_a_frozen_broker_is_waited_for_and_the_lag_is_seen_in_records_and_seconds(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, broker: Node
) -> None:
    topics, count = Topics.make(topic), 3400
    events = sink(topics.data)
    life = daemons(topics, model=SLOW).start(before=SOON_STUCK, extra={"request_timeout_ms": 12_000})
    send(events, small_events(0, 100))
    life.until(lambda status: status["events"] == 100 and lag_of(life, topics.data) == (0, 0))
    send(events, small_events(100, count - 200))  # far more than the model answers until the broker is thawed
    life.until(lambda status: status["lag"][f"{topics.data}-0"] > 800 and lag_of(life, topics.data)[1] > 0)
    with broker.frozen():
        begun = life.status()["events"]
        events.send(small_events(count - 100, 100))
        time.sleep(FREEZE_SECONDS)
        status, after = life.status(), lag_of(life, topics.data)
        assert json.loads(life.get("/livez"))["ok"]
    assert 100 <= begun < status["events"] < count - 100, "what the daemon has it answers, and no more is to be had"
    assert 0 < after[0] <= count - 100 - begun, "no more than the broker had"
    assert after[1] >= FREEZE_SECONDS, "what is answered meanwhile was sent before"
    events.flush(LIMIT)
    life.until(lambda status: status["events"] == count and lag_of(life, topics.data) == (0, 0))
    assert life.status()["lag"][f"{topics.data}-0"] == 0
    assert life.terminate() == 0, life.words
    found, again = answers(settings, topics)
    assert found.keys() == names(count)
    assert again == 0


def test_the_lag_is_exported_in_records_and_seconds_and_goes_with_the_partitions(
    topic: TopicFactory, sink: SinkFactory, daemons: Any
) -> None:
    topics, count = Topics.make(topic, partitions=2), 4000
    send(sink(topics.data), small_events(0, count))
    first = daemons(topics, "first", model=SLOW).start()
    first.until(lambda status: status["events"] >= 8 and len(status["lag"]) == 4)
    records, seconds = lagging(first, "lag_records"), lagging(first, "lag_seconds")
    assert len(records) == len(seconds) == 4
    assert sum(records.values()) > count / 8
    assert max(value for value in seconds.values() if not math.isnan(value)) > 0.5
    second = daemons(topics, "second", model=SLOW).start()
    status = first.until(lambda status: len(status["partitions"]) == 2)
    mine = {f'stream="{name.rpartition("-")[0]}"' for name in status["partitions"]}
    numbers = {f'partition="{name.rpartition("-")[2]}"' for name in status["partitions"]}
    for name in ("lag_records", "lag_seconds"):
        deadline = time.monotonic() + LIMIT
        while len(left := lagging(first, name)) != 2:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        assert all(any(m in labels for m in mine) and any(n in labels for n in numbers) for labels in left)
    for life in (first, second):
        assert life.terminate() == 0, life.words


def test_a_daemon_that_waits_for_its_broker_at_the_start_leaves_at_once_when_told_to(
    topic: TopicFactory, daemons: Any
) -> None:
    life = daemons(Topics.make(topic)).start("streams.kafka.bootstrap_servers=127.0.0.1:1", "streams.kafka.timeout=0.5")
    life.until(lambda status: "no broker at 127.0.0.1:1" in status["waiting_for"])
    assert life.terminate() == 0, life.words
    assert "gave up" not in life.words
