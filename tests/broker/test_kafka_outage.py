from __future__ import annotations

import time

import pytest

from streams.base import Message, Record, StreamUnavailableError
from streams.clients import source_of
from streams.kafka import KafkaSettings
from tests.broker.helpers import (
    LIMIT,
    Keeper,
    Opened,
    SinkFactory,
    TopicFactory,
    fresh_group,
    patiently,
    poll_until,
    read,
    sink_on,
    write,
)
from tests.broker.node import Node


def test_a_killed_broker_loses_nothing_and_keeps_order(
    topic: TopicFactory, source: Opened, sink: SinkFactory, broker: Node
) -> None:
    name, total = topic(3), 6000
    out = sink(name, max_pending=200_000)
    reader = source(name, group=fresh_group())
    records: list[Record] = []
    for first in range(0, total, 100):
        if first == total // 3:
            broker.kill()
        if first == 2 * total // 3:
            broker.start()
        out.send([Message(b"k%d" % (n % 30), b"%d" % n) for n in range(first, first + 100)])
        records.extend(reader.poll(500, 0.01))
        reader.commit({(record.stream, record.partition): record.end for record in records})
    out.flush(LIMIT)
    records.extend(read(reader, total - len(records)))
    assert sorted(int(record.value) for record in records) == list(range(total))
    by_partition: dict[int, list[Record]] = {}
    for record in records:
        by_partition.setdefault(record.partition, []).append(record)
    for came in by_partition.values():
        assert [record.offset for record in came] == list(range(len(came)))
        numbers = [int(record.value) for record in came]
        assert numbers == sorted(numbers)
    ends = {(name, number): len(came) for number, came in by_partition.items()}
    reader.commit(ends)
    poll_until([reader], lambda: reader.committed() == ends)


def test_an_outage_is_told_not_fatal_and_a_member_goes_on_after_it(
    topic: TopicFactory, settings: KafkaSettings, source: Opened, sink: SinkFactory, broker: Node
) -> None:
    name, group, keeper = topic(2), fresh_group(), Keeper()
    brief = settings.model_copy(update={"timeout": 1.0})
    hasty = sink_on(name, brief)
    patiently(hasty.open)
    out = sink(name)
    reader = source(name, keeper=keeper, group=group, shared=True)
    write(out, 10)
    ends = {(record.stream, record.partition): record.end for record in read(reader, 10)}
    broker.kill()
    try:
        for one in (hasty, out):
            one.send([Message(None, b"10")])
            with pytest.raises(StreamUnavailableError, match="1 messages wait"):
                one.flush(0.1)
        started = time.monotonic()
        hasty.close()
        assert time.monotonic() - started < LIMIT
        with pytest.raises(StreamUnavailableError, match="no broker"):
            source_of([name], brief).open(Keeper())
        reader.commit(ends)
        assert list(reader.poll(10, 0.3)) == []
    finally:
        broker.start()
    out.flush(LIMIT)
    assert [record.value for record in read(reader, 1)] == [b"10"]
    poll_until([reader], lambda: reader.committed() == ends)
