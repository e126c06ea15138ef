"""Transactions without a broker: deadlines, errors told apart, and who holds our name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import OffsetAndMetadata, TopicPartition, errors

from streams import kafka_members, kafka_sink, kafka_transactions
from streams.base import Message, StreamError, StreamUnavailableError
from streams.kafka_client import Topic
from streams.kafka_settings import KafkaSettings
from streams.kafka_sink import KafkaClient, KafkaSink
from streams.kafka_transactions import KafkaTransactions

SETTINGS = KafkaSettings(bootstrap_servers=("localhost:9092",), timeout=0.3)
DATA = ("data", 0)


class Producer:
    """A producer whose calls do what they are told."""

    def __init__(self, config: dict[str, Any], does: dict[str, Callable[[], object]]) -> None:
        self.config = config
        self.calls: list[Any] = []
        self.does = does
        self._sender = SimpleNamespace(force_close=lambda: self.calls.append("abandoned"))

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            self.calls.append((name, *arguments) if arguments else name)
            self.does.get(name, lambda: None)()

        return call


class Cluster:
    """What the clients are connected to."""

    def __init__(self) -> None:
        self.producers: list[Producer] = []
        self.does: dict[str, Callable[[], object]] = {}
        self.members: list[dict[str, str]] = []
        self.error: str | None = None
        self.offsets: dict[tuple[str, int], int] = {}
        self.me = SimpleNamespace(member_id="m-1")

    def connect(self, factory: Any, config: dict[str, Any]) -> Any:
        if factory.__name__ == "KafkaProducer":
            self.producers.append(Producer(config, self.does))
            return self.producers[-1]
        if factory.__name__ == "KafkaConsumer":
            assert config["isolation_level"] == "read_committed"
            return SimpleNamespace(
                committed=lambda tp, timeout_ms: self.offsets.get(tuple(tp)),
                partitions_for_topic=lambda topic: {0, 1},
                close=lambda **_: None,
            )
        told = {"members": self.members, "error": self.error}
        return SimpleNamespace(describe_groups=lambda groups: {"g": told}, close=lambda: None)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(kafka_sink, "connect", made.connect)
    monkeypatch.setattr(kafka_transactions, "connect", made.connect)
    monkeypatch.setattr(kafka_members, "connect", made.connect)
    return made


@pytest.fixture
def transactions(cluster: Cluster) -> Iterator[KafkaTransactions]:
    client = KafkaClient(SETTINGS, transactional_id="g-m")
    made = KafkaTransactions(client, "g", "m", lambda: cluster.me, ["data"])
    made.open()
    yield made
    made.close()


def test_a_producer_is_made_with_the_id_and_a_timeout_that_calls_fit_into(
    cluster: Cluster, transactions: KafkaTransactions
) -> None:
    config = cluster.producers[-1].config
    assert (config["transactional_id"], config["transaction_timeout_ms"]) == ("g-m", 450)
    assert cluster.producers[-1].calls == ["init_transactions"]


def test_offsets_go_with_the_note_and_the_member_that_began(cluster: Cluster, transactions: KafkaTransactions) -> None:
    began = cluster.me
    transactions.begin()
    cluster.me = SimpleNamespace(member_id="m-2")
    transactions.commit({DATA: 5}, {DATA: 2}, 1)
    note = '{"member":"m","floor":2}'
    sent = ("send_offsets_to_transaction", {TopicPartition(*DATA): OffsetAndMetadata(5, note, -1)}, began)
    assert cluster.producers[-1].calls[1:] == ["begin_transaction", sent, "commit_transaction"]


def test_opening_tells_the_committed_offsets_of_all_partitions(cluster: Cluster) -> None:
    cluster.offsets = {("data", 1): 7}
    made = KafkaTransactions(KafkaClient(SETTINGS, transactional_id="g-m"), "g", "m", lambda: None, ["data"])
    assert made.open() == {("data", 1): 7}
    assert made.open() == {("data", 1): 7}, "it may be called again"
    made.close()
    made.close()


@pytest.mark.parametrize("call", ["send_offsets_to_transaction", "commit_transaction"])
def test_a_call_that_never_returns_is_given_up_with_its_producer(
    call: str, cluster: Cluster, transactions: KafkaTransactions
) -> None:
    ended = threading.Event()
    cluster.does[call] = ended.wait
    transactions.begin()
    with pytest.raises(StreamUnavailableError, match=r"g-m: no answer from the cluster within 0\.05 s"):
        transactions.commit({DATA: 5}, None, 0.05)
    ended.set()
    cluster.offsets = {DATA: 5, ("data", 1): 3}
    expected = {DATA: 5} if call == "commit_transaction" else {}
    assert transactions.recover() == expected, "only what the commit was about"
    assert "abandoned" in cluster.producers[0].calls
    assert cluster.producers[-1].calls == ["init_transactions"]


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (errors.ProducerFencedError(), False),
        (errors.CommitFailedError(), False),
        (errors.KafkaError("in an error state"), False),
        (errors.KafkaError("refused", errors.TopicAuthorizationFailedError("p")), True),
        (errors.GroupAuthorizationFailedError("g"), True),
    ],
)
def test_only_what_no_new_transaction_gets_over_is_final(
    error: Exception, final: bool, cluster: Cluster, transactions: KafkaTransactions
) -> None:
    def fail() -> None:
        raise error

    cluster.does["commit_transaction"] = fail
    transactions.begin()
    with pytest.raises(StreamError) as told:
        transactions.commit({DATA: 5}, None, 1)
    assert isinstance(told.value, StreamUnavailableError) is not final


@pytest.mark.parametrize(
    ("members", "replaced"),
    [
        ([], False),
        ([{"group_instance_id": "m", "member_id": "m-1"}], False),
        ([{"group_instance_id": "other", "member_id": "other-9"}], False),
        ([{"group_instance_id": "m", "member_id": "m-9"}], True),
    ],
)
def test_we_stop_where_another_process_goes_by_our_name_in_the_group(
    members: list[dict[str, str]], replaced: bool, cluster: Cluster, transactions: KafkaTransactions
) -> None:
    cluster.members = members
    before = len(cluster.producers)
    if replaced:
        with pytest.raises(StreamError, match="another process writes as g-m") as told:
            transactions.recover()
        assert "file 'member'" in str(told.value)
        assert len(cluster.producers) == before, "no producer that would end the other's transaction"
    else:
        assert transactions.recover() == {}


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (errors.CoordinatorLoadInProgressError(), False),
        (errors.NotCoordinatorError(), False),
        (errors.GroupAuthorizationFailedError("g"), True),
    ],
)
def test_a_group_that_does_not_tell_its_members_is_not_taken_for_an_empty_one(
    error: Exception, final: bool, cluster: Cluster, transactions: KafkaTransactions
) -> None:
    cluster.error = str(error)
    with pytest.raises(StreamError, match="asking for the members of group g") as told:
        transactions.recover()
    assert isinstance(told.value, StreamUnavailableError) is not final


def test_a_group_that_is_not_there_has_no_members(cluster: Cluster, transactions: KafkaTransactions) -> None:
    cluster.error = str(errors.GroupIdNotFoundError())
    assert transactions.recover() == {}


def test_who_has_not_joined_the_group_begins_nothing(cluster: Cluster, transactions: KafkaTransactions) -> None:
    cluster.me = None  # type: ignore[assignment]
    with pytest.raises(StreamUnavailableError, match="has not joined group g"):
        transactions.begin()


def test_a_sink_forgets_what_was_handed_to_a_producer_that_was_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_sink, "describe", lambda *_, **__: {"out": Topic(1, "")})
    client = KafkaClient(SETTINGS, transactional_id="g-m")
    sink = KafkaSink("out", SETTINGS, client=client)
    client.acquire().config["max_request_size"] = 1000
    sink.open()
    sink.send([Message(None, b"a")])
    assert sink.pending == 1
    client.renew()
    sink.flush(0.1)
    assert sink.pending == 0
    sink.close()
    client.release(0)
