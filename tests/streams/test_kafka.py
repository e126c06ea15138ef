from __future__ import annotations

import logging
import math
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition, errors
from kafka.cluster import ClusterMetadata

from streams.base import Found, Message, Partition, Positions, StreamError, StreamUnavailableError
from streams.kafka import KafkaSettings, KafkaSink, KafkaSource
from streams.kafka_client import as_stream_error, check_topics, connect, shut_out
from streams.kafka_commits import Commits
from streams.kafka_fetch import free_slot, records
from streams.kafka_rebalance import HandoverError, HandoverListener, check_together
from streams.kafka_sink import KafkaClient

SETTINGS = KafkaSettings(bootstrap_servers=("localhost:1",), timeout=0.3)
TP = TopicPartition("t", 0)


class Nobody:
    def assigned(self, partitions: Mapping[Partition, Found]) -> Positions:
        return {}

    def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> None:
        pass


@pytest.mark.parametrize(
    "attempt", [lambda: KafkaSource(["t"], SETTINGS).open(Nobody()), lambda: KafkaSink("t", SETTINGS).open()]
)
def test_a_broker_that_does_not_answer_is_unavailable_and_leaves_no_thread(
    attempt: Callable[[], None],
) -> None:
    before = set(threading.enumerate())
    with pytest.raises(StreamUnavailableError, match=r"no broker at localhost:1 answers .*ECONNREFUSED"):
        attempt()
    assert set(threading.enumerate()) == before


def test_topics_and_group_must_make_sense() -> None:
    for topics in ([], ["t", "t"]):
        with pytest.raises(StreamError, match="topics must be named, each once"):
            KafkaSource(topics, SETTINGS)
    with pytest.raises(StreamError, match="shared only in a group"):
        KafkaSource(["t"], SETTINGS, assignment="group")


def test_a_source_that_is_not_open_says_so_and_closes_quietly() -> None:
    source = KafkaSource(["a", "b"], SETTINGS, group="g")
    with pytest.raises(StreamError, match="source of a, b is not open"):
        source.poll(1, 0.0)
    source.pause(["a"])
    source.commit({("a", 0): 1})
    source.close()
    assert (source.streams, source.bounded, source.ended()) == (("a", "b"), False, frozenset())
    assert (source.committed(), source.lag()) == ({}, {})


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (errors.TopicAuthorizationFailedError({"t"}), StreamError, "does not permit it"),
        (errors.SaslAuthenticationFailedError("bad"), StreamError, "does not permit it"),
        (errors.KafkaTimeoutError("slow"), StreamUnavailableError, "no answer from the cluster"),
        (errors.CorruptRecordError(), StreamError, "reading: CorruptRecordError"),
    ],
)
def test_errors_of_the_client_become_ours(error: Exception, kind: type[StreamError], sentence: str) -> None:
    made = as_stream_error(error, "reading")
    assert type(made) is kind
    assert sentence in str(made)


def raw(**changed: Any) -> Any:
    fields = {"offset": 7, "timestamp": 1500, "key": b"k", "value": b"v", "headers": []}
    return SimpleNamespace(**(fields | changed))


def test_records_keep_what_kafka_has_and_fill_what_it_lacks() -> None:
    full, bare = records({TP: [raw(headers=[("h", None)]), raw(offset=9, timestamp=-1, key=None, value=None)]})
    assert full.id == "t-0-7"
    assert full == ("t", 0, 7, 8, 1.5, b"k", b"v", (("h", b""),))
    assert bare._replace(timestamp=0.0) == ("t", 0, 9, 10, 0.0, None, b"", ())
    assert math.isnan(bare.timestamp)


def test_the_listener_raises_only_while_there_is_something_to_finish() -> None:
    listener = HandoverListener()
    listener.on_partitions_revoked({TP})
    listener.on_partitions_lost({TP})
    listener.holding = True
    for kind in ("revoked", "lost", "assigned"):
        with pytest.raises(HandoverError) as raised:
            getattr(listener, f"on_partitions_{kind}")({TopicPartition("t", 1), TP})
        assert (raised.value.kind, raised.value.partitions) == (kind, [TP, TopicPartition("t", 1)])


def test_a_handover_is_not_logged_as_an_error_and_others_are(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("kafka.coordinator.consumer")
    for error in (HandoverError("revoked", []), ValueError("real")):
        try:
            raise error
        except (HandoverError, ValueError):
            log.exception("listener failed with %s", error)
    assert [record.getMessage() for record in caplog.records] == ["listener failed with real"]


def test_partitions_that_do_not_meet_are_refused() -> None:
    check_together(["a", "b"], [])
    check_together(["a", "b"], [TopicPartition(topic, number) for topic in "ba" for number in (1, 0)])
    with pytest.raises(StreamError, match="different partitions of its topics"):
        check_together(["a", "b"], [TopicPartition("a", 0), TopicPartition("b", 1)])


class FakeConsumer:
    """Keeps commits until the test answers them."""

    def __init__(self) -> None:
        self.sent: list[dict[Partition, int]] = []
        self.callbacks: list[Callable[[Any, object], None]] = []
        self.refuse = False

    def commit_async(self, offsets: Mapping[TopicPartition, Any], callback: Callable[[Any, object], None]) -> None:
        self.sent.append({tuple(tp): offset.offset for tp, offset in offsets.items()})
        self.callbacks.append(lambda _, outcome: callback(offsets, outcome))

    def commit(self, offsets: Mapping[TopicPartition, Any], timeout_ms: int) -> None:
        if self.refuse:
            raise errors.KafkaTimeoutError("late")
        self.sent.append({tuple(tp): offset.offset for tp, offset in offsets.items()})

    def answer(self, outcome: object = None) -> None:
        self.callbacks.pop(0)(None, outcome)


class FalsyRecords:
    def __bool__(self) -> bool:
        return False


def owned() -> tuple[Commits, FakeConsumer]:
    commits = Commits(timeout=60.0)
    commits.own({("t", 0), ("t", 1)}, {("t", 0): 3})
    return commits, FakeConsumer()


def test_one_commit_is_under_way_and_the_rest_goes_out_together_after_it() -> None:
    commits, consumer = owned()
    for end in (4, 5, 6):
        commits.want({("t", 0): end, ("t", 1): end + 10})
        commits.send(consumer)
    assert consumer.sent == [{("t", 0): 4, ("t", 1): 14}]
    consumer.answer()
    assert commits.stored == {("t", 0): 4, ("t", 1): 14}
    commits.send(consumer)
    assert consumer.sent[1:] == [{("t", 0): 6, ("t", 1): 16}]
    consumer.answer()
    commits.send(consumer)
    assert len(consumer.sent) == 2


def test_offsets_of_partitions_that_are_not_ours_are_never_committed() -> None:
    commits, consumer = owned()
    commits.want({("t", 9): 1, ("t", 0): 3})
    commits.send(consumer)
    commits.finish(consumer, 1.0)
    assert consumer.sent == []
    commits.want({("t", 0): 8})
    commits.send(consumer)
    commits.disown()
    consumer.answer()
    assert commits.stored == {}
    commits.want({("t", 0): 9})
    commits.finish(consumer, 1.0)
    assert consumer.sent == [{("t", 0): 8}]


def test_a_failed_commit_is_counted_and_made_up_for() -> None:
    commits, consumer = owned()
    commits.want({("t", 0): 8})
    commits.send(consumer)
    consumer.answer(errors.NotCoordinatorError())
    commits.send(consumer)  # too soon after the failure
    assert (len(consumer.sent), commits.failures) == (1, 1)
    assert commits.last_error is not None
    assert commits.last_error.startswith("NotCoordinatorError")
    consumer.refuse = True
    commits.finish(consumer, 1.0)
    assert (commits.failures, commits.last_error, commits.stored) == (2, "KafkaTimeoutError: late", {("t", 0): 3})
    consumer.refuse = False
    commits.finish(consumer, 1.0)
    assert commits.stored == {("t", 0): 8}


def test_offsets_are_never_taken_back() -> None:
    commits, consumer = owned()
    commits.want({("t", 0): 2, ("t", 1): 5})
    commits.send(consumer)
    assert consumer.sent == [{("t", 1): 5}]


def test_trouble_with_commits_lasts_until_one_succeeds_and_a_lost_name_for_good() -> None:
    commits, consumer = owned()
    commits.want({("t", 0): 8})
    commits.send(consumer)
    consumer.answer(errors.FencedInstanceIdError())
    assert commits.trouble.startswith("offsets cannot be committed (FencedInstanceIdError")
    assert commits.fenced
    commits.finish(consumer, 1.0)
    assert (commits.trouble, commits.fenced) == ("", True)


@pytest.mark.parametrize(
    ("slot", "after"),
    [(FalsyRecords(), None), (waiting := [1], waiting), (None, None)],
    ids=["used up", "in use", "free"],
)
def test_only_a_slot_of_used_up_records_is_freed(slot: object, after: object) -> None:
    consumer = SimpleNamespace(_fetcher=SimpleNamespace(_next_partition_records=slot))
    free_slot(consumer)
    assert consumer._fetcher._next_partition_records is after
    free_slot(SimpleNamespace())  # another version of kafka-python


class FakeFuture:
    def __init__(self) -> None:
        self.is_done = False
        self.exception: Exception | None = None

    def failed(self) -> bool:
        return self.exception is not None

    def get(self, timeout: float) -> None:
        if not self.is_done:
            raise errors.KafkaTimeoutError("Timeout")
        if self.exception is not None:
            raise self.exception


class FakeProducer:
    config: Mapping[str, int] = {"max_request_size": 1000}

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, FakeFuture]] = []

    def partitions_for(self, topic: str) -> set[int]:
        return {0}

    def send(self, topic: str, value: bytes, key: bytes | None, headers: object, partition: int | None) -> FakeFuture:
        self.sent.append((value, FakeFuture()))
        return self.sent[-1][1]

    def confirm(self, count: int, error: Exception | None = None) -> None:
        for _, future in [one for one in self.sent if not one[1].is_done][:count]:
            future.is_done, future.exception = True, error


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
def sink(producer: FakeProducer) -> KafkaSink:
    made = KafkaSink("out", SETTINGS, client=KafkaClient(SETTINGS), max_pending=4, send_timeout=0.0)
    made._producer = producer
    made._limit = 900
    return made


def messages(*values: str) -> list[Message]:
    return [Message(None, value.encode()) for value in values]


def test_a_full_sink_takes_all_of_its_messages_or_none(sink: KafkaSink, producer: FakeProducer) -> None:
    sink.send(messages("a", "b", "c"))
    with pytest.raises(StreamUnavailableError, match="topic out: 3 messages wait"):
        sink.send(messages("d", "e"))
    assert [value for value, _ in producer.sent] == [b"a", b"b", b"c"]
    producer.confirm(1)
    sink.send(messages("d", "e"))
    assert sink.pending == 4
    producer.confirm(4)
    sink.send(messages(*"fghijk"))
    assert sink.pending == 6


def test_flush_waits_for_every_message_and_may_be_called_again(sink: KafkaSink, producer: FakeProducer) -> None:
    sink.send(messages("a", "b"))
    producer.confirm(1)
    with pytest.raises(StreamUnavailableError, match="1 messages wait"):
        sink.flush(0.0)
    producer.confirm(1)
    sink.flush(0.0)
    assert sink.pending == 0


def test_a_refused_message_is_told_by_the_next_call_with_its_size(sink: KafkaSink, producer: FakeProducer) -> None:
    sink.send(messages("x" * 300))
    producer.confirm(1, errors.MessageSizeTooLargeError())
    with pytest.raises(StreamError, match=r"refuses a message of 300 bytes: raise max\.message\.bytes"):
        sink.send(messages("b"))
    sink.send(messages("b"))
    producer.confirm(1, errors.InvalidProducerEpochError())
    with pytest.raises(StreamError, match="topic out lost a message that was sent: InvalidProducerEpochError"):
        sink.flush(0.0)


def test_messages_that_the_client_takes_a_part_of_are_all_taken_and_go_out_in_order(
    sink: KafkaSink, producer: FakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = [False, True, True, True, False]
    really = producer.send

    def send(*arguments: Any) -> FakeFuture:
        if refusing and refusing.pop(0):
            raise errors.KafkaTimeoutError("no metadata")
        return really(*arguments)

    monkeypatch.setattr(producer, "send", send)
    sink.send(messages("a", "b"))
    assert (len(producer.sent), sink.pending) == (1, 2)
    with pytest.raises(StreamUnavailableError, match="no metadata"):
        sink.send(messages("c"))
    producer.confirm(1)
    with pytest.raises(StreamUnavailableError, match="no metadata"):
        sink.flush(0.0)
    sink.send(messages("c"))
    assert [value for value, _ in producer.sent] == [b"a", b"b", b"c"]
    producer.confirm(2)
    sink.flush(0.0)
    assert sink.pending == 0


def test_what_a_sink_could_not_hand_over_keeps_a_flush_from_returning(
    sink: KafkaSink, producer: FakeProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = [False, True, False, True]
    really = producer.send

    def send(*arguments: Any) -> FakeFuture:
        if refusing and refusing.pop(0):
            raise errors.KafkaTimeoutError("no metadata")
        return really(*arguments)

    monkeypatch.setattr(producer, "send", send)
    sink.send(messages("a", "b", "c"))
    producer.confirm(1)
    with pytest.raises(StreamUnavailableError, match="2 messages wait"):
        sink.flush(0.0)
    assert [value for value, _ in producer.sent] == [b"a", b"b"]
    with pytest.raises(StreamUnavailableError, match="2 messages wait"):
        sink.flush(0.0)
    assert [value for value, _ in producer.sent] == [b"a", b"b", b"c"]
    producer.confirm(2)
    sink.flush(0.0)


def test_a_message_above_the_client_limit_is_refused_before_anything_is_taken(
    sink: KafkaSink, producer: FakeProducer
) -> None:
    with pytest.raises(StreamError, match=r"912 bytes \(a key of 2 bytes\).* 900 are allowed"):
        sink.send([*messages("a"), Message(b"kk", b"x" * 890, (("h", b"123456789"),))])
    assert producer.sent == []


def test_a_sink_that_is_not_open_says_so_and_closes_quietly() -> None:
    sink = KafkaSink("out", SETTINGS)
    with pytest.raises(StreamError, match="sink of topic out is not open"):
        sink.send(messages("a"))
    sink.close()
    assert (sink.name, sink.pending) == ("out", 0)


def test_a_topic_that_is_another_now_or_forbidden_is_told_though_no_fetch_fails() -> None:
    cluster = ClusterMetadata()
    client, before = SimpleNamespace(_client=SimpleNamespace(cluster=cluster)), uuid.uuid4()
    check_topics(client, {"t": str(before)})  # nothing heard of it yet
    cluster._topic_ids = {"t": before}
    check_topics(client, {"t": str(before), "old": ""})
    cluster._topic_ids = {"t": uuid.uuid4()}
    with pytest.raises(StreamError, match=f"topic t was made anew .* it was {before} and is .* fresh state directory"):
        check_topics(client, {"t": str(before)})
    cluster.unauthorized_topics = {"t"}
    with pytest.raises(StreamError, match=r"reading t: .* does not permit it .* check the user and its ACLs"):
        check_topics(client, {})


def test_settings_that_the_client_refuses_are_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for changed, sentence in (
        ({"extra": {"request_timeout_ms": 1}}, "request_timeout_ms"),
        ({"security_protocol": "SSL", "ssl_cafile": tmp_path / "ca.pem"}, "no broker at localhost:1|settings"),
    ):
        settings = KafkaSettings.model_validate({"bootstrap_servers": "localhost:1", "timeout": 0.2} | changed)
        with pytest.raises(StreamError, match=sentence):
            connect(KafkaConsumer, settings.consumer_config(group=None))


@pytest.mark.parametrize(
    ("stable", "rejoins", "beats", "shut"),
    [(True, False, False, True), (True, False, True, False), (True, True, False, False), (False, False, False, False)],
)
def test_a_member_whose_heartbeats_ended_though_it_joins_nowhere_is_shut_out(
    stable: bool, rejoins: bool, beats: bool, shut: bool
) -> None:
    coordinator = SimpleNamespace(
        _lock=threading.RLock(),
        stable=lambda: stable,
        rejoining=rejoins,
        rejoin_needed=rejoins,
        _heartbeat_enabled=beats,
    )
    assert shut_out(SimpleNamespace(_coordinator=coordinator)) is shut
