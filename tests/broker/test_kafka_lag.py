from __future__ import annotations

import pytest

from tests.broker.helpers import LIMIT, Opened, SinkFactory, TopicFactory, poll_until, read, write
from tests.broker.node import Node


def test_lag_counts_what_is_left(topic: TopicFactory, source: Opened, sink: SinkFactory) -> None:
    name = topic()
    write(sink(name), 10)
    reader = source(name)
    assert len(reader.poll(4, LIMIT)) == 4
    assert reader.lag() == {(name, 0): 6}
    read(reader, 6)
    assert reader.lag() == {(name, 0): 0}


@pytest.mark.parametrize("paused", [True, False], ids=["paused", "held by the client"])
def test_lag_grows_with_what_comes_while_nothing_is_fetched(
    topic: TopicFactory, source: Opened, sink: SinkFactory, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    monkeypatch.setattr("streams.confluent_fetch.HELD_RECORDS", 1)
    name = topic()
    out = sink(name)
    write(out, 10)
    reader = source(name)
    assert len(reader.poll(4, LIMIT)) == 4
    if paused:
        reader.pause([name])
    write(out, 1)
    if paused:
        assert [reader.poll(500, 0.1) for _ in range(10)] == 10 * [[]]  # librdkafka is stopped once it has given more
    write(out, 9)
    poll_until([reader] if paused else [], lambda: reader.lag() == {(name, 0): 16})
    reader.resume([name])
    read(reader, 16)
    assert reader.lag() == {(name, 0): 0}


def test_lag_of_a_stream_that_was_paused_before_its_first_fetch_is_known(
    topic: TopicFactory, source: Opened, sink: SinkFactory
) -> None:
    name = topic()
    reader = source(name)
    reader.pause([name])
    write(sink(name), 10)
    poll_until([reader], lambda: reader.lag() == {(name, 0): 10})


def test_while_the_broker_stands_still_the_lag_is_what_was_known_last(
    topic: TopicFactory, source: Opened, sink: SinkFactory, broker: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.topic_source.ENDS_INTERVAL", 0.0)
    monkeypatch.setattr("streams.topic_source.ENDS_BACKOFF", 0.0)
    name = topic()
    out = sink(name)
    write(out, 10)
    reader = source(name)
    assert len(reader.poll(4, LIMIT)) == 4
    write(out, 10)
    poll_until([], lambda: reader.lag() == {(name, 0): 16})
    with broker.frozen():
        assert len(reader.poll(6, LIMIT)) == 6
        assert reader.lag() == {(name, 0): 10}
    read(reader, 10)
    assert reader.lag() == {(name, 0): 0}
