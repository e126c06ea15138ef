"""`delivery: exactly_once` on a real Kafka: whatever is killed, a reader of committed records sees each answer once."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

from streams.kafka import KafkaSettings
from tests.broker.daemons import Daemon, Topics, everything, send, small_events, small_feedback
from tests.broker.helpers import SinkFactory, TopicFactory

EXACTLY = "delivery=exactly_once"


def seen(settings: KafkaSettings, topics: Topics) -> Counter[str]:
    """How often each event is answered, for a reader of committed records."""
    return Counter(json.loads(record.value)["id"] for record in everything(settings, topics.predictions))


def once(settings: KafkaSettings, topics: Topics, count: int) -> bool:
    """Whether all events are answered; fails where one is answered twice or another is answered."""
    found = seen(settings, topics)
    twice = {name: times for name, times in found.items() if times > 1}
    assert not twice
    assert found.keys() <= {f"e{n}" for n in range(count)}
    return len(found) == count


def test_a_daemon_that_is_killed_again_and_again_answers_each_event_once(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings, bootstrap: str, tmp_path: Path
) -> None:
    topics = Topics.make(topic, 2)
    daemon = Daemon(tmp_path / "d", topics, bootstrap)
    events, feedback = sink(topics.data), sink(topics.feedback)
    chance = random.Random(7)
    count = 0
    try:
        for _ in range(6):
            life = daemon.start(EXACTLY, "checkpoint.every=300ms")
            send(events, small_events(count, 200))
            send(feedback, small_feedback(count, 200))
            count += 200
            life.until(lambda status: status["state"] in ("serving", "waiting for records"))
            time.sleep(chance.uniform(0.0, 0.5))
            life.kill()
            once(settings, topics, count)
        last = daemon.start(EXACTLY)
        deadline = time.monotonic() + 40
        while not once(settings, topics, count):
            assert time.monotonic() < deadline, last.words
        assert last.terminate() == 0
        assert once(settings, topics, count)
    finally:
        daemon.end()
