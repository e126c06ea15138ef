"""Errors that brokers answer with, injected one by one."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from streams.base import Message, StreamError, StreamUnavailableError
from streams.clients import source_of
from streams.kafka import KafkaSettings
from tests.broker.helpers import (
    LIMIT,
    AnySink,
    AnySource,
    Keeper,
    fresh_group,
    named_for,
    patiently,
    poll_until,
    read,
    sink_on,
    write,
)
from tests.broker.mock import (
    API_VERSION,
    COORDINATOR_AWAY,
    COORDINATOR_LOADING,
    FETCH,
    FIND_COORDINATOR,
    GROUP_FORBIDDEN,
    LIST_OFFSETS,
    METADATA,
    NOT_COORDINATOR,
    NOT_LEADER,
    OFFSET_COMMIT,
    OFFSET_FETCH,
    PRODUCE,
    TOO_LARGE,
    TOPIC_FORBIDDEN,
    Mock,
)
from tests.broker.node import BrokerMissingError


@pytest.fixture(scope="module")
def mock() -> Iterator[Mock]:
    try:
        made = Mock(brokers=2)
    except BrokerMissingError as error:
        if os.environ.get("ADAPTD_REQUIRE_BROKER"):
            raise
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.fixture
def settings(mock: Mock, client: str) -> KafkaSettings:
    extra: dict[str, Any] = named_for(client, {"heartbeat_interval_ms": 300, "retry_backoff_ms": 50})
    if client == "kafka-python":
        extra["api_version"] = API_VERSION
    given = {"bootstrap_servers": mock.bootstrap, "client": client, "extra": extra}
    return KafkaSettings.model_validate(given)


@pytest.fixture
def name(mock: Mock) -> str:
    made = mock.topic(f"t-{uuid.uuid4().hex[:12]}", 2)
    for partition in (0, 1):
        mock.lead(made, partition, 1)
    return made


@pytest.fixture
def sink(settings: KafkaSettings, name: str) -> Iterator[AnySink]:
    # The mock cluster does not say how large a message may be, and librdkafka waits for that as long as it may.
    made = sink_on(name, settings.model_copy(update={"timeout": 0.5}))
    patiently(made.open)
    yield made
    made.close()


Open = Callable[..., AnySource]


@pytest.fixture
def source(settings: KafkaSettings, name: str) -> Iterator[Open]:
    made: list[AnySource] = []

    def opened(group: str | None = None) -> AnySource:
        made.append(source_of([name], settings, group=group))
        made[-1].open(Keeper())
        return made[-1]

    yield opened
    for one in made:
        one.close()


def values(source: AnySource, count: int) -> list[int]:
    return sorted(int(record.value) for record in read(source, count))


def test_all_is_well_without_errors(sink: AnySink, source: Open) -> None:
    write(sink, 20)
    assert values(source(fresh_group()), 20) == list(range(20))


@pytest.mark.parametrize("request_", [PRODUCE, FETCH], ids=["produce", "fetch"])
def test_three_answers_of_not_the_leader_are_got_over(mock: Mock, sink: AnySink, source: Open, request_: int) -> None:
    mock.fail(request_, [NOT_LEADER] * 3)
    write(sink, 20)
    assert values(source(), 20) == list(range(20))


def test_a_leader_that_moves_is_followed_and_order_is_kept(mock: Mock, sink: AnySink, source: Open, name: str) -> None:
    reader = source()
    for first in range(0, 80, 20):
        for partition in (0, 1):
            mock.lead(name, partition, 1 + (first // 20) % 2)
        sink.send([Message(b"one", b"%d" % n) for n in range(first, first + 20)])
    sink.flush(LIMIT)
    assert [int(record.value) for record in read(reader, 80)] == list(range(80))


def test_writing_that_is_not_permitted_is_told_with_what_to_check(mock: Mock, sink: AnySink, name: str) -> None:
    mock.fail(PRODUCE, [TOPIC_FORBIDDEN])
    with pytest.raises(StreamError, match=f"writing to {name}.*does not permit it.*check the user and its ACLs"):
        write(sink, 1)


def test_a_message_that_the_topic_refuses_for_its_size_is_told(mock: Mock, sink: AnySink) -> None:
    mock.fail(PRODUCE, [TOO_LARGE])
    with pytest.raises(StreamError, match=r"refuses a message of 3 bytes: raise max\.message\.bytes"):
        write(sink, 1)


@pytest.mark.parametrize("error", [COORDINATOR_LOADING, COORDINATOR_AWAY, NOT_COORDINATOR])
@pytest.mark.parametrize("request_", [OFFSET_COMMIT, FIND_COORDINATOR], ids=["commit", "find"])
def test_a_commit_is_tried_again_until_the_coordinator_takes_it(
    mock: Mock, sink: AnySink, source: Open, request_: int, error: int
) -> None:
    write(sink, 20)
    reader = source(fresh_group())
    ends = {(record.stream, record.partition): record.end for record in read(reader, 20)}
    mock.fail(request_, [error] * 3)
    try:
        reader.commit(ends)
        poll_until([reader], lambda: reader.committed() == ends)
        assert reader.trouble == ""
    finally:
        mock.heal(request_)


def test_a_coordinator_that_moves_is_followed(mock: Mock, sink: AnySink, source: Open) -> None:
    write(sink, 20)
    group = fresh_group()
    mock.coordinate(group, 1)
    reader = source(group)
    ends = {(record.stream, record.partition): record.end for record in read(reader, 20)}
    mock.coordinate(group, 2)
    reader.commit(ends)
    poll_until([reader], lambda: reader.committed() == ends)


def test_a_group_that_is_not_permitted_is_told_and_reading_does_not_begin(mock: Mock, source: Open) -> None:
    mock.fail(OFFSET_FETCH, [GROUP_FORBIDDEN] * 3)
    try:
        with pytest.raises(StreamError, match=r"does not permit it.*check the user and its ACLs"):
            source(fresh_group())
    finally:
        mock.heal(OFFSET_FETCH)


@pytest.mark.parametrize("request_", [METADATA, LIST_OFFSETS], ids=["metadata", "offsets"])
def test_a_start_that_fails_for_the_moment_may_be_tried_again(
    mock: Mock, sink: AnySink, source: Open, request_: int
) -> None:
    write(sink, 5)
    mock.fail(request_, [NOT_LEADER] * 2)
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            reader = source()
        except StreamUnavailableError:
            assert time.monotonic() < deadline
        else:
            break
    assert values(reader, 5) == list(range(5))


def test_a_slow_broker_costs_time_and_nothing_else(mock: Mock, sink: AnySink, source: Open) -> None:
    reader = source(fresh_group())
    mock.slow(0.5)
    try:
        started = time.monotonic()
        write(sink, 20)
        assert time.monotonic() - started > 0.4
        records = read(reader, 20)
        assert sorted(int(record.value) for record in records) == list(range(20))
        ends = {(record.stream, record.partition): record.end for record in records}
        reader.commit(ends)
        poll_until([reader], lambda: reader.committed() == ends)
    finally:
        mock.slow(0)


def test_brokers_that_are_away_are_waited_for_at_the_start_and_on_the_way(
    mock: Mock, settings: KafkaSettings, sink: AnySink, source: Open, name: str
) -> None:
    write(sink, 10)
    reader = source()
    assert values(reader, 10) == list(range(10))
    for broker in (1, 2):
        mock.down(broker)
    try:
        sink.send([Message(None, b"%d" % n) for n in range(10, 20)])
        with pytest.raises(StreamUnavailableError, match="messages wait"):
            sink.flush(0.3)
        poll_until([reader], lambda: "no broker at" in reader.trouble)
        late = source_of([name], settings.model_copy(update={"timeout": 0.5}))
        with pytest.raises(StreamUnavailableError, match="no broker at"):
            late.open(Keeper())
    finally:
        for broker in (1, 2):
            mock.up(broker)
    sink.flush(LIMIT)
    assert values(reader, 10) == list(range(10, 20))
    poll_until([reader], lambda: reader.trouble == "")
