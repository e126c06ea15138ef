from __future__ import annotations

import json
import math
import os
import random
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaAdminClient

from streams.base import Message
from streams.codec import Form, encode_event, encode_feedback
from streams.kafka import KafkaSettings
from tests.broker.daemons import (
    CONVOLUTIONS,
    MISSED_SOON,
    POLICY,
    SLOW,
    Daemon,
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

KILLS = int(os.environ.get("ADAPTD_BROKER_KILLS", "3"))
SEED = int(os.environ.get("ADAPTD_CRASH_SEED", "0"))


@pytest.fixture
def daemons(tmp_path: Path, bootstrap: str, client: str) -> Iterator[Any]:
    made: list[Daemon] = []

    def make(topics: Topics, name: str = "daemon", **content: str) -> Daemon:
        made.append(Daemon(tmp_path / name, topics, bootstrap, client, **content))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end()


def image_events(count: int) -> list[Message]:
    """Images in each of the forms of an event: lists, base64, binary."""
    rng = np.random.default_rng(0)
    messages = []
    for n in range(count):
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        form: Form = "binary" if n % 3 == 2 else "json"
        value = encode_event(f"e{n}", image, time=1e9 + n, form=form, tensor=n % 3 == 1)
        messages.append(Message(b"e%d" % n, value))
    return messages


def test_the_documented_policy_answers_joins_buries_drains_and_commits(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, admin: KafkaAdminClient
) -> None:
    topics, count = Topics.make(topic), 300
    life = daemons(topics, policy=POLICY, model=CONVOLUTIONS).start()
    events, feedback = sink(topics.data), sink(topics.feedback)
    bad = [
        Message(b"b1", b'{"id": "b1", "inputs": [1, NaN]}', (("trace", b"\x00\xff"),)),
        Message(None, b"\xff\xfe\x00 no text"),
        Message(b"b3", b""),
    ]
    send(events, [*image_events(count)[:150], *bad[:2], *image_events(count)[150:]])
    send(feedback, bad[2:])
    life.until(lambda status: status["events"] == count)
    labels = [encode_feedback(f"e{n}", label=n % 10, time=1e9 + n + 60, form="json") for n in range(count)]
    send(feedback, [Message(b"e%d" % n, value) for n, value in enumerate(labels)])
    status = life.until(lambda status: status["labels"] == count)
    assert status["joins"]["joined"] == count
    assert status["joins"]["pending"] == 0
    assert life.metric("adaptd_events_total") == count
    life.until(lambda _: life.metric("adaptd_dead_letters_total") == 3)  # the writer counts them, behind the model
    assert life.terminate() == 0, life.words

    records = everything(settings, topics.predictions)
    found = [json.loads(record.value) for record in records]
    assert sorted(answer["id"] for answer in found) == sorted(f"e{n}" for n in range(count))
    for answer, record in zip(found, records, strict=True):
        assert answer.keys() - {"version"} == {"id", "label", "probabilities", "time", "model"}
        assert answer["model"].keys() == {"release", "step"}
        assert answer["time"] == 1e9 + int(answer["id"][1:])
        assert record.key == answer["id"].encode()
        assert len(answer["probabilities"]) == 10
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert answer["label"] == int(np.argmax(answer["probabilities"]))
    letters = everything(settings, topics.dead_letters)
    assert sorted((letter.value, letter.key) for letter in letters) == sorted((m.value, m.key) for m in bad)
    first = next(letter for letter in letters if letter.key == b"b1")
    assert first.headers[0] == ("trace", b"\x00\xff")
    told = dict(first.headers)
    assert told["__adaptd.errors.topic"] == topics.data.encode()
    assert told["__adaptd.errors.reason"] == b"not_finite"
    assert committed(admin, topics.group) == ends(settings, topics.data, topics.feedback)


def quiet(labels: int) -> Callable[[dict[str, Any]], bool]:
    """Whether all labels are joined and no job has been under way for a while; there is none for an instant often."""
    seen: list[tuple[int, int, bool]] = []

    def look(status: dict[str, Any]) -> bool:
        seen.append((status["labels"], status["model"]["step"], status["background_job"]))
        return len(seen) > 10 and set(seen[-10:]) == {(labels, status["model"]["step"], False)}

    return look


def test_what_was_answered_and_committed_is_learned_again_in_silence(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, admin: KafkaAdminClient
) -> None:
    topics, count = Topics.make(topic, partitions=2), 2000
    daemon = daemons(topics)
    events, feedback = sink(topics.data), sink(topics.feedback)
    life = daemon.start("checkpoint.every=1h")
    send(events, small_events(0, count))
    send(feedback, small_feedback(0, count))
    reached = ends(settings, topics.data, topics.feedback)
    life.until(lambda _: committed(admin, topics.group) == reached)
    before = life.until(quiet(count))
    life.kill()
    life = daemon.start("checkpoint.every=1h")
    after = life.until(quiet(count))
    assert not after["replaying"]
    assert after["replayed"] > count // 8
    for key in ("events", "model", "counts", "accuracy", "positions", "joins"):
        assert after[key] == before[key]
    send(events, small_events(count, 50))
    life.until(lambda status: status["events"] == count + 50)
    assert life.terminate() == 0, life.words
    found, again = answers(settings, topics)
    assert found.keys() == {f"e{n}" for n in range(count + 50)}
    assert again == 0


@pytest.mark.parametrize("grouped", [True, False], ids=["in a group", "alone"])
def test_killed_again_and_again_the_daemon_answers_everything_and_learns_everything_once(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, grouped: bool
) -> None:
    rng = random.Random(SEED)
    topics, per_life = Topics.make(topic, partitions=2), 400
    total = per_life * KILLS
    daemon = daemons(topics)
    events, feedback = sink(topics.data), sink(topics.feedback)
    flags = ["checkpoint.every=500ms", *([] if grouped else ["streams.kafka.group=null"])]
    for first in range(0, total, per_life):
        life = daemon.start(*flags)
        send(events, small_events(first, per_life))
        send(feedback, small_feedback(first, per_life))
        begun = rng.choice([0, first])  # while the journal is repeated, or in new work
        life.until(lambda status, begun=begun: status["events"] >= begun)
        time.sleep(rng.uniform(0, 0.6))
        life.kill()
    life = daemon.start(*flags)
    status = life.until(lambda status: status["labels"] >= total and status["events"] >= total)
    assert status["events"] == status["labels"] == status["joins"]["joined"] == total
    assert life.terminate() == 0, life.words
    found, again = answers(settings, topics)
    assert found.keys() == {f"e{n}" for n in range(total)}
    print(f"seed {SEED}: {KILLS} kills; {again} of {total} answers came again, each equal to the first")


def test_a_killed_broker_is_waited_for_by_name_and_nothing_is_lost(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, broker: Node, admin: KafkaAdminClient
) -> None:
    topics, count = Topics.make(topic, partitions=2), 600
    life = daemons(topics).start(extra=MISSED_SOON)
    events, feedback = sink(topics.data), sink(topics.feedback)
    send(events, small_events(0, count))
    life.until(lambda status: status["events"] == count)
    broker.kill()
    try:
        life.until(lambda status: broker.bootstrap in status["waiting_for"])
        life.until(lambda status: status["state"] == "waiting for a broker")
        assert life.metric("adaptd_stream_available") <= 2, "those of data and feedback are 0"
        assert math.isnan(life.metric("adaptd_lag_records"))
        life.get("/livez")
        with pytest.raises(urllib.error.HTTPError, match="503") as told:
            life.get("/readyz")
        told.value.close()
    finally:
        broker.start()
    send(events, small_events(count, count))
    send(feedback, small_feedback(0, 2 * count))
    status = life.until(lambda status: status["labels"] >= 2 * count)
    assert status["events"] == status["labels"] == 2 * count
    life.until(lambda _: '"stream_available"' in life.words)
    assert broker.bootstrap not in life.status()["waiting_for"]
    assert life.terminate() == 0, life.words
    assert life.words.count('"stream_unavailable"') == life.words.count('"stream_available"') == 1, life.words
    assert '"level": "error"' not in life.words
    found, again = answers(settings, topics)
    assert found.keys() == {f"e{n}" for n in range(2 * count)}
    assert again == 0
    assert committed(admin, topics.group) == ends(settings, topics.data, topics.feedback)


def test_a_broker_that_goes_while_a_backlog_is_answered_costs_no_answer(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, broker: Node
) -> None:
    topics, count = Topics.make(topic, partitions=2), 6000
    send(sink(topics.data), small_events(0, count))
    life = daemons(topics).start(extra=MISSED_SOON)
    life.until(lambda status: status["events"] > 200)
    broker.kill()
    try:
        status = life.until(lambda status: topics.predictions in status["waiting_for"])
        assert status["events"] < count
    finally:
        broker.start()
    status = life.until(lambda status: status["events"] >= count)
    assert life.terminate() == 0, life.words
    found, again = answers(settings, topics)
    assert found.keys() == {f"e{n}" for n in range(count)}
    assert again == 0


def test_a_broker_that_never_answers_ends_the_start_with_a_sentence(topic: TopicFactory, daemons: Any) -> None:
    daemon = daemons(Topics.make(topic))
    patch = "import engine.daemon; engine.daemon.START_SECONDS = 1.0"
    life = daemon.start("streams.kafka.bootstrap_servers=127.0.0.1:1", "streams.kafka.timeout=0.5", before=patch)
    assert life.wait() == 69
    assert "adaptd: no broker at 127.0.0.1:1 answers" in life.words
    assert "Traceback" not in life.words


def test_a_broker_that_comes_late_is_waited_for(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, broker: Node
) -> None:
    topics = Topics.make(topic)
    send(sink(topics.data), small_events(0, 20))
    broker.kill()
    try:
        life = daemons(topics).start("streams.kafka.timeout=2")
        status = life.until(lambda status: "no broker at" in status["waiting_for"])
        assert status["state"].startswith("starting")
    finally:
        broker.start()
    life.until(lambda status: status["events"] == 20)
    assert life.terminate() == 0, life.words


@pytest.mark.parametrize("missing", ["data", "predictions", "dead_letters"])
def test_a_missing_topic_is_refused_by_name(topic: TopicFactory, daemons: Any, missing: str) -> None:
    life = daemons(Topics.make(topic)).start(f"streams.{missing}.kafka=nowhere")
    assert life.wait() == 78
    assert "adaptd: topic nowhere does not exist" in life.words
    assert "Traceback" not in life.words


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_all_missing_topics_are_refused_at_once(topic: TopicFactory, daemons: Any, delivery: str) -> None:
    streams = ("data", "feedback", "predictions", "dead_letters")
    missing = [f"streams.{stream}.kafka=no-{stream}" for stream in streams]
    life = daemons(Topics.make(topic)).start(*missing, f"delivery={delivery}")
    assert life.wait() == 78
    for stream in streams:
        assert life.words.count(f"topic no-{stream} does not exist") == 1


def test_a_record_that_fills_its_topic_does_not_end_the_daemon_when_it_becomes_a_dead_letter(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings
) -> None:
    topics = Topics.make(topic)
    send(sink(topics.data), [Message(b"k", b"x" * 1_048_300), *small_events(0, 20)])
    life = daemons(topics).start()
    life.until(lambda status: status["events"] == 20)
    assert life.terminate() == 0, life.words
    (letter,) = everything(settings, topics.dead_letters)
    told = dict(letter.headers)
    assert (letter.key, letter.value, told["__adaptd.errors.omitted"]) == (b"k", b"", b"1048300")
    assert told["__adaptd.errors.reason"] == b"not_json"
    assert "dead_letter_without_value" in life.words


def test_two_daemons_share_the_partitions_and_one_takes_over_from_the_other(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, admin: KafkaAdminClient
) -> None:
    topics = Topics.make(topic, partitions=4)
    events, feedback = sink(topics.data), sink(topics.feedback)
    first, second = daemons(topics, "first").start(), daemons(topics, "second").start()
    for life in (first, second):
        life.until(lambda status: len(status["partitions"]) == 4)
    send(events, small_events(0, 800))
    send(feedback, small_feedback(0, 800))
    first.until(lambda status: status["events"] + second.status()["events"] == 800)
    assert 0 < first.status()["events"] < 800
    assert first.terminate() == 0, first.words
    second.until(lambda status: len(status["partitions"]) == 8)
    send(events, small_events(800, 400))
    send(feedback, small_feedback(800, 400))
    second.until(lambda _: committed(admin, topics.group) == ends(settings, topics.data, topics.feedback))
    assert second.terminate() == 0, second.words
    found, again = answers(settings, topics)
    assert found.keys() == {f"e{n}" for n in range(1200)}
    assert again == 0


def test_a_daemon_whose_partitions_went_on_without_it_reads_on_where_the_other_stopped(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings, admin: KafkaAdminClient
) -> None:
    topics, rounds = Topics.make(topic, partitions=2), 4
    events = sink(topics.data)
    first, second = daemons(topics, "first"), daemons(topics, "second")

    def send_and_commit(round_: int) -> None:
        send(events, small_events(400 * round_, 400))
        reached = ends(settings, topics.data)
        life.until(lambda _: committed(admin, topics.group).items() >= reached.items())

    life = first.start("checkpoint.every=1h", extra=MISSED_SOON)
    send_and_commit(0)
    life.kill()
    life = second.start()
    send_and_commit(1)
    assert life.terminate() == 0, life.words
    life = first.start("checkpoint.every=1h")
    send_and_commit(2)
    assert "replay_abandoned" in life.words
    assert life.status()["events"] == 400
    life.kill()
    life = first.start("checkpoint.every=1h")
    send_and_commit(3)
    assert life.status()["events"] == 800
    assert life.terminate() == 0, life.words
    found, again = answers(settings, topics)
    assert found.keys() == {f"e{n}" for n in range(400 * rounds)}
    assert again == 0


def test_a_slow_model_bounds_what_waits_and_shows_the_lag(
    topic: TopicFactory, sink: SinkFactory, daemons: Any, settings: KafkaSettings
) -> None:
    topics, count = Topics.make(topic), 5000
    send(sink(topics.data), small_events(0, count))
    life = daemons(topics, model=SLOW).start()
    most = 0.0
    deadline = time.monotonic() + LIMIT
    life.until(lambda status: f"paused until the backlog is worked off: {topics.data}" == status["waiting_for"])
    while life.status()["events"] < 200:
        assert time.monotonic() < deadline
        most = max(most, life.metric("adaptd_queue_depth"))
    assert 100 < most <= 16 * 8 + 512 + 32 + 8
    assert life.metric("adaptd_lag_records") > count - 1500
    assert life.metric("adaptd_paused") == 1
    assert life.terminate() == 0, life.words
    found, again = answers(settings, topics)
    assert 200 <= len(found) < count
    assert again == 0
