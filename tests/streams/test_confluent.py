from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka import Message as Fetched
from pydantic import ValidationError

from streams import confluent_sink, group_commits
from streams.base import Found, Message, Partition, Positions, Record, StreamError, StreamUnavailableError
from streams.clients import client_of, sink_of, source_of
from streams.columns import Records
from streams.confluent_client import Watch, as_stream_error, as_uuid, make
from streams.confluent_commits import Commits
from streams.confluent_config import admin_config, consumer_config, producer_config
from streams.confluent_fetch import HELD_RECORDS, Flow, records
from streams.confluent_sink import ConfluentClient, ConfluentSink
from streams.confluent_source import ConfluentSource
from streams.kafka_settings import KafkaSettings

P = ("t", 0)


def settings(**given: Any) -> KafkaSettings:
    return KafkaSettings.model_validate({"bootstrap_servers": "localhost:1", "client": "confluent"} | given)


SETTINGS = settings(timeout=0.3)


class Nobody:
    def assigned(self, found: Mapping[Partition, Found]) -> Positions:
        return {}

    def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> None:
        pass


def test_one_line_chooses_the_client() -> None:
    assert isinstance(source_of(["t"], SETTINGS), ConfluentSource)
    assert isinstance(sink_of("t", client_of(SETTINGS)), ConfluentSink)
    python = SETTINGS.model_copy(update={"client": "kafka-python"})
    assert type(source_of(["t"], python)).__name__ == "KafkaSource"
    assert type(sink_of("t", client_of(python))).__name__ == "KafkaSink"
    assert KafkaSettings(bootstrap_servers=("localhost:1",)).client == "kafka-python"


def test_a_client_that_is_not_installed_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "confluent_kafka")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"confluent-kafka is not installed: install adaptd\[confluent\]"):
        settings(extra={"fetch.min.bytes": 1})


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"fetch_max_bytes": 1}, "fetch_max_bytes is no setting that librdkafka .* did you mean fetch.max.bytes?"),
        ({"zzz": 1}, "zzz is no setting that librdkafka [0-9.]+ takes from a file; its names are in CONFIGURATION.md"),
        ({"fetch.min.bytes": "many"}, "fetch.min.bytes: librdkafka refuses it: Invalid value"),
        ({"fetch.min.bytes": -5}, "fetch.min.bytes: librdkafka refuses it: .*outside allowed range"),
        ({"enable.auto.commit": True}, "enable.auto.commit may not be set here: offsets are committed only when"),
        ({"sasl.password": "x"}, "sasl.password may not be set here: who we are and our secrets are set beside"),
        ({"ssl.key.pem": "x"}, "ssl.key.pem may not be set here"),
        ({"linger.ms": 3}, "set linger beside extra, not linger.ms in it"),
        ({"error_cb": "x"}, "error_cb is no setting"),
        ({"plugin.library.paths": "x"}, "no code is loaded from a policy"),
    ],
)
def test_extra_settings_are_checked_by_librdkafka(extra: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        settings(extra=extra)


def test_extra_settings_reach_the_client_as_it_reads_them() -> None:
    given = settings(extra={"check.crcs": False, "fetch.min.bytes": 7, "batch.size": 9})
    assert consumer_config(given, group=None, member=None)["check.crcs"] == "false"
    assert consumer_config(given, group=None, member=None)["fetch.min.bytes"] == "7"
    assert producer_config(given)["batch.size"] == "9"


def test_a_consumer_never_commits_or_resets_by_itself() -> None:
    config = consumer_config(settings(), group="g", member="m")
    assert (config["group.id"], config["group.instance.id"]) == ("g", "m")
    assert (config["auto.offset.reset"], config["partition.assignment.strategy"]) == ("error", "range")
    assert {config["enable.auto.commit"], config["enable.auto.offset.store"]} == {"false"}


def test_a_fetch_that_waits_for_an_idle_topic_ends_before_a_full_queue_of_another_is_used_up() -> None:
    config = consumer_config(settings(), group=None, member=None)
    seconds_at_a_hundred_thousand = int(config["queued.min.messages"]) / 100_000
    assert float(config["fetch.wait.max.ms"]) / 1000 < seconds_at_a_hundred_thousand / 2


def test_a_producer_is_idempotent_and_drops_nothing() -> None:
    config = producer_config(settings(compression="zstd", linger=0.02))
    assert (config["acks"], config["enable.idempotence"], config["message.timeout.ms"]) == ("all", "true", "0")
    assert (config["compression.type"], float(config["linger.ms"])) == ("zstd", 20)
    config = producer_config(settings(timeout=2), transactional_id="x")
    assert (config["transactional.id"], config["transaction.timeout.ms"]) == ("x", "3000")


def test_secrets_and_certificates_reach_the_client_and_are_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "any"
    file.write_text("geheim\n")
    given = settings(
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_plain_username="me",
        sasl_plain_password_file=file,
        ssl_cafile=file,
        ssl_certfile=file,
        ssl_keyfile=file,
        ssl_password_file=file,
        ssl_check_hostname=False,
    )
    config = admin_config(given)
    assert (config["sasl.username"], config["sasl.password"], config["ssl.key.password"]) == ("me", "geheim", "geheim")
    assert {config[f"ssl.{name}.location"] for name in ("ca", "certificate", "key")} == {str(file)}
    assert config["ssl.endpoint.identification.algorithm"] == "none"
    assert "geheim" not in f"{given!r}{given}{given.model_dump_json()}"


def test_settings_that_contradict_each_other_are_refused_in_a_sentence() -> None:
    given = settings(extra={"session.timeout.ms": 9000, "max.poll.interval.ms": 10})
    with pytest.raises(StreamError, match=r"librdkafka refuses its settings: .*max\.poll\.interval\.ms"):
        make(Consumer, consumer_config(given, group="g", member=None))


@pytest.mark.parametrize(
    "attempt",
    [lambda: source_of(["t"], SETTINGS).open(Nobody()), lambda: sink_of("t", client_of(SETTINGS)).open()],
)
def test_a_broker_that_does_not_answer_is_unavailable(attempt: Callable[[], None]) -> None:
    with pytest.raises(StreamUnavailableError, match=r"no broker at localhost:1 answers .*Connection refused"):
        attempt()


def test_topics_and_group_must_make_sense() -> None:
    for topics in ([], ["t", "t"]):
        with pytest.raises(StreamError, match="topics must be named, each once"):
            source_of(topics, SETTINGS)
    with pytest.raises(StreamError, match="shared only in a group"):
        source_of(["t"], SETTINGS, assignment="group")


def test_what_is_not_open_says_so_and_closes_quietly() -> None:
    source, sink = source_of(["a", "b"], SETTINGS, group="g"), sink_of("t", client_of(SETTINGS))
    with pytest.raises(StreamError, match="source of a, b is not open"):
        source.poll(1, 0.0)
    with pytest.raises(StreamError, match="sink of topic t is not open"):
        sink.send([Message(None, b"")])
    source.pause(["a"])
    source.commit({("a", 0): 1})
    assert (source.lag(), source.position(("a", 0)), source.trouble) == ({}, None, "")
    source.close()
    sink.close()


def test_errors_become_sentences() -> None:
    told = as_stream_error(KafkaError(KafkaError.GROUP_AUTHORIZATION_FAILED), "reading t")
    assert type(told) is StreamError
    assert "check the user and its ACLs" in str(told)
    assert isinstance(
        as_stream_error(KafkaException(KafkaError(KafkaError.NOT_COORDINATOR)), "x"), StreamUnavailableError
    )
    assert type(as_stream_error(KafkaError(KafkaError._FATAL), "x")) is StreamError


def test_a_refused_password_outlasts_the_closed_connections_behind_it() -> None:
    watch = Watch()
    watch.hear(KafkaError(KafkaError._AUTHENTICATION, "wrong password"))
    watch.hear(KafkaError(KafkaError._TRANSPORT, "closed"))
    watch.hear(KafkaError(KafkaError._ALL_BROKERS_DOWN, "all down"))
    assert watch.down
    assert "wrong password" in watch.told()
    watch.well()
    assert (watch.down, watch.told()) == (False, "")


def fetched(offset: int, topic: str = "t", **given: Any) -> Any:
    return Fetched(topic=topic, partition=0, offset=offset, value=b"v", timestamp=(0, 0), **given)


def test_a_message_without_time_value_or_header_content_is_a_record() -> None:
    (record,) = records([Fetched(topic="t", partition=1, offset=3, headers=[("h", None)], timestamp=(0, -1))])
    assert math.isnan(record.timestamp)
    assert record._replace(timestamp=0) == Record("t", 1, 3, 4, 0, None, b"", (("h", b""),))


class Recorder:
    """A consumer that writes down what is paused and resumed."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def pause(self, partitions: Sequence[Any]) -> None:
        self.calls.append(("pause", len(partitions)))

    def resume(self, partitions: Sequence[Any]) -> None:
        self.calls.append(("resume", len(partitions)))


def test_records_of_a_paused_topic_wait_in_order_and_stop_the_topic_only_when_they_are_many() -> None:
    flow, consumer = Flow(), Recorder()
    flow.paused.add("t")
    came = records([fetched(n) for n in range(HELD_RECORDS)])
    other = records([fetched(0, "u")])
    assert flow.divide(Records.joined([came[:-1], other])) == other
    flow.apply(consumer, [P, ("t", 1), ("u", 0)])  # type: ignore[arg-type]
    assert consumer.calls == []
    assert flow.divide(came[-1:]) == []
    flow.apply(consumer, [P, ("t", 1), ("u", 0)])  # type: ignore[arg-type]
    assert consumer.calls == [("pause", 2)]
    assert (flow.take(10), flow.first(P), flow.first(("t", 1))) == ([], 0, None)
    flow.paused.clear()
    assert [record.offset for record in flow.take(HELD_RECORDS - 2000)] == list(range(HELD_RECORDS - 2000))
    assert flow.first(P) == HELD_RECORDS - 2000
    flow.apply(consumer, [P, ("t", 1)])  # type: ignore[arg-type]
    assert consumer.calls == [("pause", 2), ("resume", 2)]


class Group:
    """A consumer whose cluster takes commits, or says what they are instead."""

    def __init__(self, stored: int | None = None) -> None:
        self.sent: list[list[tuple[int, str | None]]] = []
        self.stored = stored

    def commit(self, *, offsets: Sequence[Any], asynchronous: bool) -> None:
        assert asynchronous
        self.sent.append([(tp.offset, tp.metadata) for tp in offsets])
        self.last = offsets

    def committed(self, partitions: Sequence[Any], timeout: float) -> Sequence[Any]:
        if self.stored is None:
            return list(self.last)
        return [
            SimpleNamespace(topic=tp.topic, partition=tp.partition, offset=self.stored, error=None) for tp in partitions
        ]


def test_commits_go_one_at_a_time_forward_and_with_their_note() -> None:
    commits, group = Commits(1.0, "me"), Group()
    commits.own({P}, {P: 3})
    commits.want({P: 2, ("other", 0): 9}, {})
    commits.want({P: 3}, {P: 1})  # answered nothing yet: the note of whoever was here before stands
    commits.send(group)
    assert group.sent == []
    commits.want({P: 5}, {P: 1})
    commits.send(group)
    commits.want({P: 7}, {P: 2})
    commits.send(group)
    assert group.sent == [[(5, '{"member":"me","floor":1}')]]
    commits.done(None, group.last)
    assert commits.stored == {P: 5}
    commits.send(group)
    commits.done(None, group.last)
    commits.want({P: 7}, {P: 6})  # the same place, but less to read for whoever comes next
    commits.finish(group, 1.0)
    assert [sent[0][0] for sent in group.sent] == [5, 7, 7]
    assert (commits.failures, commits.trouble) == (0, "")


def test_a_commit_that_fails_is_counted_and_told() -> None:
    commits, group = Commits(1.0), Group(stored=1)
    commits.own({P}, {})
    commits.want({P: 5}, {})
    commits.finish(group, 1.0)
    assert (commits.failures, commits.stored) == (1, {})
    assert "the cluster has not taken the last offsets" in commits.trouble
    commits.done(KafkaError(KafkaError.FENCED_INSTANCE_ID), [])
    assert (commits.failures, commits.fenced) == (2, True)


def test_a_commit_that_failed_is_tried_again_a_second_later_and_one_without_a_word_after_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock: Any = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(group_commits, "CLOCK", clock)
    commits, group = Commits(timeout=5.0), Group()
    commits.own({P}, {})
    commits.want({P: 5}, {})

    def sent(now: float) -> int:
        clock.now = now
        commits.send(group)
        return len(group.sent)

    assert [sent(now) for now in (0.0, 9.9, 10.0, 10.5)] == [1, 1, 2, 2]
    commits.done(KafkaError(KafkaError.REBALANCE_IN_PROGRESS), [])
    assert [sent(now) for now in (11.4, 11.5)] == [2, 3]


def test_ids_of_topics_read_the_same_through_either_client() -> None:
    assert as_uuid("zXDEF1e9RAS9jE4MfPw5aQ") == "cd70c417-57bd-4404-bd8c-4e0c7cfc3969"
    assert as_uuid("AAAAAAAAAAAAAAAAAAAAAA") == ""
    assert as_uuid("") == ""
    assert uuid.UUID(as_uuid("+/DEF1e9RAS9jE4MfPw5aQ")).bytes[:2] == b"\xfb\xf0"


class Queue:
    """A producer of librdkafka that refuses as it is told, and writes what it took when it is flushed."""

    def __init__(self, *refusals: KafkaError | None) -> None:
        self.refusals = list(refusals)
        self.waiting: list[bytes] = []
        self.written: list[bytes] = []
        self.flushes: list[float] = []

    def __len__(self) -> int:
        return len(self.waiting)

    def produce(self, topic: str, value: bytes, key: bytes | None, *_: object, **__: object) -> None:
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise KafkaException(refusal)
        self.waiting.append(value)

    def poll(self, timeout: float) -> int:
        return 0

    def flush(self, timeout: float) -> int:
        self.flushes.append(timeout)
        self.written += self.waiting
        self.waiting.clear()
        return 0

    def purge(self) -> None:
        self.waiting.clear()


def sink_into(queue: Queue, *, transactional_id: str | None = None) -> ConfluentSink:
    client = ConfluentClient(SETTINGS, transactional_id=transactional_id)
    client._producer = queue  # type: ignore[assignment]
    client._users = 2
    sink = ConfluentSink("out", SETTINGS, client=client)
    sink._producer = queue  # type: ignore[assignment]
    sink._limit = 900
    return sink


def values(*texts: bytes) -> list[Message]:
    return [Message(None, text) for text in texts]


def test_messages_that_librdkafka_takes_a_part_of_are_all_taken_and_go_out_in_order() -> None:
    passing = KafkaError(KafkaError._UNKNOWN_TOPIC)
    queue = Queue(None, passing, passing, None, passing, passing)
    sink = sink_into(queue)
    sink.send(values(b"a", b"b", b"c"))
    assert (queue.waiting, sink.pending) == ([b"a"], 3)
    with pytest.raises(StreamUnavailableError, match="2 messages wait"):
        sink.flush(0.0)
    with pytest.raises(StreamUnavailableError, match="1 messages wait"):
        sink.flush(0.0)
    sink.send(values(b"d"))
    sink.flush(1.0)
    assert queue.written == [b"a", b"b", b"c", b"d"]


def test_what_librdkafka_never_takes_is_told_at_once() -> None:
    sink = sink_into(Queue(None, KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)))
    with pytest.raises(StreamError, match="the cluster does not permit it"):
        sink.send(values(b"a", b"b"))
    sink = sink_into(Queue(None, KafkaError(KafkaError._STATE)), transactional_id="g-m")
    with pytest.raises(StreamUnavailableError, match="the transaction failed"):
        sink.send(values(b"a", b"b"))


def test_a_sink_waits_at_its_end_for_what_it_sent_unless_that_is_of_a_transaction() -> None:
    alone, together = Queue(), Queue()
    for queue, transactional_id in ((alone, None), (together, "g-m")):
        sink = sink_into(queue, transactional_id=transactional_id)
        sink.send(values(b"a"))
        sink.close()
        sink.close()
    assert (alone.written, len(alone.flushes)) == ([b"a"], 1)
    assert (together.written, together.flushes) == ([], [])


def test_batches_are_as_small_as_the_smallest_topic_of_a_transaction_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make_one(kind: object, config: Mapping[str, Any]) -> Queue:
        made.append(config["batch.size"])
        return Queue()

    monkeypatch.setattr(confluent_sink, "make", make_one)
    alone = ConfluentClient(SETTINGS)
    alone.acquire(70_000)
    with pytest.raises(StreamError, match="a topic takes 60000 bytes at once, but batches have up to 70000"):
        alone.acquire(60_000)
    together = ConfluentClient(SETTINGS, transactional_id="g-m")
    for largest in (None, 70_000, 60_000, 80_000):
        together.acquire(largest)
    together.renew()
    assert made == ["70000", "131072", "60000"]
