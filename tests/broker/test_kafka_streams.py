from __future__ import annotations

import time

import pytest
from kafka import KafkaAdminClient, TopicPartition

from streams.base import Message, Record, StreamError
from streams.clients import client_of, source_of
from streams.kafka import KafkaSettings
from tests.broker.daemons import committed
from tests.broker.helpers import (
    LIMIT,
    AnySource,
    Keeper,
    Opened,
    SinkFactory,
    TopicFactory,
    fresh_group,
    poll_until,
    read,
    remade,
    sink_on,
    with_extra,
    write,
)

GROWTH = {
    "kafka-python": "streams.kafka.GROWTH_INTERVAL",
    "confluent": "streams.confluent_places.GROWTH_INTERVAL",
}


def test_a_record_comes_back_as_it_was_sent(topic: TopicFactory, source: Opened, sink: SinkFactory) -> None:
    name = topic()
    before = time.time()
    out = sink(name)
    out.send([Message(b"\x00\xff", bytes(range(256)), (("h", b"\x01"), ("h", b""))), Message(None, b"")])
    out.flush(LIMIT)
    first, second = read(source(name), 2)
    assert first._replace(timestamp=0.0) == Record(
        name, 0, 0, 1, 0.0, b"\x00\xff", bytes(range(256)), (("h", b"\x01"), ("h", b""))
    )
    assert before - 1 < first.timestamp < time.time() + 1
    assert (second.offset, second.key, second.value, second.headers) == (1, None, b"", ())


def test_reading_starts_at_the_positions_given(topic: TopicFactory, source: Opened, sink: SinkFactory) -> None:
    name = topic()
    write(sink(name), 10)
    keeper = Keeper({(name, 0): 7})
    assert [record.offset for record in read(source(name, keeper=keeper), 3)] == [7, 8, 9]
    assert keeper.log == [("assigned", [(name, 0)])]


def test_committed_offsets_are_found_again_and_given_positions_outrank_them(
    topic: TopicFactory, source: Opened, sink: SinkFactory
) -> None:
    name, group = topic(), fresh_group()
    write(sink(name), 10)
    first = source(name, group=group)
    assert first.committed() == {}
    read(first, 10)
    first.commit({(name, 0): 4, ("other", 0): 9})
    poll_until([first], lambda: first.committed() == {(name, 0): 4})
    first.commit({(name, 0): 6})
    first.close()
    again = source(name, group=group)
    assert again.committed() == {(name, 0): 6}
    assert read(again, 4)[0].offset == 6
    assert read(source(name, group=group, keeper=Keeper({(name, 0): 2})), 8)[0].offset == 2
    assert first.commits.failures == 0


def test_a_paused_topic_gives_nothing_while_the_other_flows(
    topic: TopicFactory, source: Opened, sink: SinkFactory
) -> None:
    data, feedback = topic(), topic()
    write(sink(data), 5)
    write(sink(feedback), 5)
    both = source(data, feedback)
    both.pause([data])
    assert {record.stream for record in read(both, 5)} == {feedback}
    assert both.poll(10, 0.2) == []
    both.resume([data])
    assert [record.offset for record in read(both, 5)] == [0, 1, 2, 3, 4]


def test_a_missing_topic_is_refused_by_name(settings: KafkaSettings) -> None:
    with pytest.raises(StreamError, match="topic nowhere does not exist"):
        source_of(["nowhere"], settings).open(Keeper())
    with pytest.raises(StreamError, match="topic nowhere does not exist"):
        sink_on("nowhere", settings).open()


def test_a_position_that_retention_removed_is_refused_with_the_choices(
    topic: TopicFactory, source: Opened, sink: SinkFactory, admin: KafkaAdminClient
) -> None:
    name = topic()
    write(sink(name), 20)
    admin.delete_records({TopicPartition(name, 0): 15})
    with pytest.raises(StreamError, match=f"offset 3 of {name}-0 is gone, the earliest is 15.*retention"):
        source(name, keeper=Keeper({(name, 0): 3}))


def test_the_first_offset_that_is_left_is_told_as_retention_moves_it(
    topic: TopicFactory, source: Opened, sink: SinkFactory, admin: KafkaAdminClient
) -> None:
    name = topic()
    write(sink(name), 20)
    reading = source(name)
    assert reading.beginnings() == {(name, 0): 0}
    admin.delete_records({TopicPartition(name, 0): 15})
    assert reading.beginnings() == {(name, 0): 15}
    reading.close()
    assert reading.beginnings() == {}


def test_a_position_that_goes_while_reading_is_refused(
    topic: TopicFactory, settings: KafkaSettings, sink: SinkFactory, admin: KafkaAdminClient
) -> None:
    name = topic()
    out = sink(name)
    for _ in range(20):
        out.send([Message(None, b"x" * 1000)])
        out.flush(LIMIT)
    one_by_one = {"max_partition_fetch_bytes": 1000}
    if settings.client == "confluent":
        one_by_one["queued_max_messages_kbytes"] = 1
    reader = source_of([name], with_extra(settings, **one_by_one))
    reader.open(Keeper())
    try:
        assert len(read(reader, 1)) == 1
        admin.delete_records({TopicPartition(name, 0): 15})
        with pytest.raises(StreamError, match=f"of {name}-0 is gone, the earliest is 15"):
            read(reader, 100)
    finally:
        reader.close()


def test_a_position_past_the_end_is_refused(topic: TopicFactory, source: Opened, sink: SinkFactory) -> None:
    name = topic()
    write(sink(name), 5)
    reader = source(name, keeper=Keeper({(name, 0): 50}))
    with pytest.raises(StreamError, match=f"offset 50 of {name}-0 lies past its end 5"):
        read(reader, 1)


def test_a_topic_that_was_made_anew_and_holds_more_is_told_once_the_client_has_looked(
    topic: TopicFactory,
    settings: KafkaSettings,
    sink: SinkFactory,
    admin: KafkaAdminClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GROWTH[settings.client], 0.3)
    name = topic()
    write(sink(name), 10)
    reader = source_of([name], with_extra(settings, metadata_max_age_ms=300))
    reader.open(Keeper())
    try:
        read(reader, 10)
        remade(admin, name)
        write(sink(name), 30)
        with pytest.raises(StreamError, match=f"{name}.* made anew"):
            read(reader, 100)
    finally:
        reader.close()


def test_partitions_added_to_a_topic_are_read_too(
    topic: TopicFactory,
    settings: KafkaSettings,
    sink: SinkFactory,
    admin: KafkaAdminClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GROWTH[settings.client], 0.0)
    name, keeper = topic(), Keeper()
    reader = source_of([name], with_extra(settings, metadata_max_age_ms=200))
    reader.open(keeper)
    try:
        admin.create_partitions({name: 3})
        poll_until([reader], lambda: len(keeper.owned) == 3)
        assert keeper.log == [("assigned", [(name, 0)]), ("assigned", [(name, 1), (name, 2)])]
        write(sink(name), 30)
        assert {record.partition for record in read(reader, 30)} == {0, 1, 2}
    finally:
        reader.close()


def test_unequal_partition_counts_are_refused_in_a_group_only(topic: TopicFactory, source: Opened) -> None:
    data, feedback = topic(4), topic(3)
    with pytest.raises(StreamError, match=f"{data} has 4, {feedback} has 3"):
        source(data, feedback, group=fresh_group(), shared=True)
    assert len(source(data, feedback).streams) == 2


def test_members_share_partitions_so_that_equal_numbers_meet(
    topic: TopicFactory, source: Opened, sink: SinkFactory
) -> None:
    data, feedback, group = topic(4), topic(4), fresh_group()
    one, two = Keeper(), Keeper()
    first = source(data, feedback, keeper=one, group=group, shared=True)
    poll_until([first], lambda: len(one.owned) == 8)
    second = source(data, feedback, keeper=two, group=group, shared=True)
    poll_until([first, second], lambda: len(one.owned) == len(two.owned) == 4)
    assert one.log[1] == ("revoked", one.log[0][1])
    for keeper in (one, two):
        numbers = {name: {number for stream, number in keeper.owned if stream == name} for name in (data, feedback)}
        assert numbers[data] == numbers[feedback]
    assert not one.owned & two.owned
    assert (first.rebalances, second.rebalances) == (1, 0)


def test_what_a_member_answered_is_committed_before_another_takes_over(
    topic: TopicFactory, source: Opened, sink: SinkFactory
) -> None:
    data, group = topic(4), fresh_group()
    one, two = Keeper(), Keeper()
    first = source(data, keeper=one, group=group, shared=True)
    write(sink(data), 40)
    ends = {(record.stream, record.partition): record.end for record in read(first, 40)}
    one.on_revoked = lambda: first.commit(ends)
    second = source(data, keeper=two, group=group, shared=True)
    poll_until([first, second], lambda: len(one.owned) == len(two.owned) == 2)
    write(sink(data), 40, 40)
    after: list[Record] = []
    deadline = time.monotonic() + LIMIT
    while len(after) < 40 and time.monotonic() < deadline:
        for member, keeper in ((first, one), (second, two)):
            records = member.poll(100, 0.1)
            assert {(record.stream, record.partition) for record in records} <= keeper.owned
            after.extend(records)
    assert sorted(int(record.value) for record in after) == list(range(40, 80))
    assert (first.commits.failures, first.last_error) == (0, None)


def test_partitions_that_come_while_paused_stay_paused(topic: TopicFactory, source: Opened, sink: SinkFactory) -> None:
    name, group, keeper = topic(2), fresh_group(), Keeper()
    write(sink(name), 10)
    reader = source(name, keeper=keeper, group=group, shared=True)
    reader.pause([name])
    assert poll_until([reader], lambda: len(keeper.owned) == 2) == []
    assert reader.poll(10, 0.2) == []
    reader.resume([name])
    assert len(read(reader, 10)) == 10


def test_a_member_that_pauses_and_polls_stays_in_its_group(
    topic: TopicFactory, settings: KafkaSettings, sink: SinkFactory
) -> None:
    name, keeper = topic(), Keeper()
    write(sink(name), 5)
    quick = with_extra(settings, session_timeout_ms=3000, heartbeat_interval_ms=300, max_poll_interval_ms=3000)
    reader = source_of([name], quick, group=fresh_group(), assignment="group")
    reader.open(keeper)
    try:
        reader.pause([name])
        poll_until([reader], lambda: len(keeper.owned) == 1)
        over = time.monotonic() + 4
        assert poll_until([reader], lambda: time.monotonic() > over) == []
        reader.resume([name])
        read(reader, 5)
        assert keeper.log == [("assigned", [(name, 0)])]
    finally:
        reader.close()


def test_a_member_that_stops_polling_loses_its_partitions_and_commits_nothing(
    topic: TopicFactory, settings: KafkaSettings, sink: SinkFactory, admin: KafkaAdminClient
) -> None:
    name, group, keeper = topic(), fresh_group(), Keeper()
    write(sink(name), 5)
    quick = with_extra(settings, session_timeout_ms=3000, heartbeat_interval_ms=100, max_poll_interval_ms=3000)
    reader = source_of([name], quick, group=group, assignment="group")
    reader.open(keeper)
    try:
        read(reader, 5)
        deadline = time.monotonic() + LIMIT
        while admin.describe_groups([group])[group]["members"]:
            assert time.monotonic() < deadline, "a member that does not poll stays in its group"
            time.sleep(0.1)
        reader.commit({(name, 0): 5})  # as it has not heard of its loss
        assert len(read(reader, 5)) == 5
        assert keeper.log == [("assigned", [(name, 0)]), ("lost", [(name, 0)]), ("assigned", [(name, 0)])]
        assert not any(reader.poll(10, 0.5) for _ in range(5))  # and what has failed is not tried again
        assert (reader.committed(), committed(admin, group)) == ({}, {})
        reader.commit({(name, 0): 4})
        poll_until([reader], lambda: committed(admin, group) == {(name, 0): 4})
    finally:
        reader.close()


def test_sinks_share_one_producer(
    topic: TopicFactory, settings: KafkaSettings, source: Opened, sink: SinkFactory
) -> None:
    answers, letters = topic(2), topic()
    client = client_of(settings)
    first, second = sink(answers, client=client), sink(letters, client=client)
    assert first._producer is second._producer
    write(first, 20)
    first.close()
    write(second, 3)
    assert sorted(int(record.value) for record in read(source(answers), 20)) == list(range(20))
    assert len(read(source(letters), 3)) == 3


def test_a_full_sink_waits_and_keeps_order(topic: TopicFactory, source: Opened, sink: SinkFactory) -> None:
    name = topic()
    out = sink(name, max_pending=50)
    for first in range(0, 1000, 20):
        out.send([Message(b"one", b"%d" % n) for n in range(first, first + 20)])
        assert out.pending <= 50
    out.flush(LIMIT)
    assert out.pending == 0
    assert [int(record.value) for record in read(source(name), 1000)] == list(range(1000))


def test_a_message_too_large_is_refused_with_its_size_and_the_setting(
    topic: TopicFactory, sink: SinkFactory, settings: KafkaSettings
) -> None:
    setting = {"kafka-python": "max_request_size", "confluent": r"message\.max\.bytes"}[settings.client]
    small, usual = sink(topic(max_message_bytes="2000")), sink(topic())
    small.send([Message(b"k", b"fits")])
    with pytest.raises(StreamError, match=r"5001 bytes .* 1872 are allowed: raise max\.message\.bytes"):
        small.send([Message(b"k", b"x" * 5000)])
    small.flush(LIMIT)
    with pytest.raises(StreamError, match=f"2000001 bytes .* {setting} in extra"):
        usual.send([Message(b"k", b"x" * 2_000_000)])


def test_what_was_left_over_at_a_pause_comes_after_it_though_nothing_new_does(
    topic: TopicFactory, source: Opened, sink: SinkFactory
) -> None:
    names = [topic(2), topic(2)]
    for name in names:
        write(sink(name), 200)
    both = source(*names)
    begun = both.poll(30, LIMIT)  # the rest of this fetch waits in the client
    paused = begun[0].stream
    both.pause([paused])
    others = read(both, 200)
    assert paused not in {record.stream for record in others}
    both.resume([paused])
    assert len(read(both, 200 - len(begun))) == 200 - len(begun)


def test_a_member_that_was_killed_gets_its_partitions_back_at_once_and_one_that_leaves_is_not_waited_for(
    topic: TopicFactory, settings: KafkaSettings, sink: SinkFactory
) -> None:
    name, group = topic(2), fresh_group()
    write(sink(name), 10)
    slow = with_extra(settings, session_timeout_ms=45000, heartbeat_interval_ms=300)

    def opened(member: str, keeper: Keeper) -> AnySource:
        made = source_of([name], slow, group=group, assignment="group", member=member)
        made.open(keeper)
        return made

    dead, again, other = Keeper(), Keeper(), Keeper()
    killed = opened("a", dead)
    read(killed, 10)
    started = time.monotonic()
    back = opened("a", again)
    poll_until([back], lambda: len(again.owned) == 2)
    killed.commit({(name, 0): 1})
    with pytest.raises(StreamError, match=f"another process reads as member a of group {group}"):
        poll_until([killed], lambda: False)
    back.close()
    third = opened("b", other)
    poll_until([third], lambda: len(other.owned) == 2)
    assert time.monotonic() - started < LIMIT
    third.close()
    killed.close()


def test_where_another_member_has_worked_reading_starts_where_it_stopped(
    topic: TopicFactory, settings: KafkaSettings, sink: SinkFactory
) -> None:
    name, group = topic(), fresh_group()
    write(sink(name), 10)
    for member, reached, given in (("a", 4, None), ("b", 7, 0), ("b", 8, 2), ("a", 9, 4)):
        keeper = Keeper({} if given is None else {(name, 0): given})
        reader = source_of([name], settings, group=group, assignment="group", member=member)
        reader.open(keeper)
        first = read(reader, 1)[0].offset
        reader.commit({(name, 0): reached})
        reader.close()
        assert first == {("a", 4): 0, ("b", 7): 4, ("b", 8): 2, ("a", 9): 8}[member, reached]
