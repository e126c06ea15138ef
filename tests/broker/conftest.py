"""A real Kafka for the tests in this folder; they are skipped, with the reason, where none can be had."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from kafka.net.inet import KafkaNetSocket

from streams.clients import source_of
from streams.kafka import KafkaSettings
from tests.broker.helpers import (
    CLIENTS,
    AnySink,
    AnySource,
    Keeper,
    Opened,
    SinkFactory,
    TopicFactory,
    made,
    named_for,
    patiently,
    sink_on,
)
from tests.broker.node import GUEST, GUEST_PASSWORD, BrokerMissingError, Node, jars

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.broker)
            item.add_marker(pytest.mark.timeout(400))  # several waits of a test may be long on a slow disk
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, bool]:
    """Brokers are killed first, since one that has many topics takes long to come back; tests without daemons are last.

    Those are short, so that workers end together.
    """
    here = item.path.is_relative_to(HERE)
    kills = "broker" in getattr(item, "fixturenames", ())
    return here and not kills, here and item.path.stem.startswith("test_kafka")


class Left(socket.socket):
    """A socket that ends without a warning where nobody closes it."""

    def __del__(self) -> None:
        self.close()


@pytest.fixture(scope="session", autouse=True)
def sockets_of_kafka_python() -> Iterator[None]:
    """Let kafka-python leave sockets to the collector, as it does now and then when it is closed.

    The warning would come in whichever test the collector runs in. Sockets of anybody else have theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KafkaNetSocket, "socket", lambda _, *kind: Left(*kind))
        yield


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node | None]:
    """The node that this run has started; None where it uses a broker that runs already."""
    if os.environ.get("ADAPTD_TEST_BOOTSTRAP"):
        yield None
        return
    try:
        started = Node(jars(), tmp_path_factory.mktemp("kafka"))
        started.format()
        started.start()
    except BrokerMissingError as error:
        if os.environ.get("ADAPTD_REQUIRE_BROKER"):
            raise
        pytest.skip(f"no Kafka: {error}")
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def bootstrap(node: Node | None) -> str:
    return os.environ["ADAPTD_TEST_BOOTSTRAP"] if node is None else node.bootstrap


@pytest.fixture(scope="session")
def admin(bootstrap: str) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=bootstrap, reconnect_backoff_max_ms=1000)
    try:
        client.list_topics()
        yield client
    finally:
        client.close()


@pytest.fixture
def broker(node: Node | None) -> Node:
    """A broker that may be killed, and whose users and certificate are known."""
    if node is None:
        pytest.skip("ADAPTD_TEST_BOOTSTRAP names a broker that is not ours")
    return node


@pytest.fixture
def topic(admin: KafkaAdminClient, node: Node | None) -> Iterator[TopicFactory]:
    """Make a topic of its own name: `topic(partitions=1, name="t", **configs)`; on a broker of others none stays."""
    names: list[str] = []

    def make(partitions: int = 1, name: str = "t", **configs: str) -> str:
        unique = f"{name}-{uuid.uuid4().hex[:12]}"
        settings = {key.replace("_", "."): value for key, value in configs.items()}
        made(admin, NewTopic(unique, partitions, 1, topic_configs=settings))
        names.append(unique)
        return unique

    yield make
    if node is None and names:
        admin.delete_topics(names)


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    """The library that a test runs on: every test runs on each."""
    return str(request.param)


@pytest.fixture
def settings(bootstrap: str, client: str) -> KafkaSettings:
    # A member hears of a rebalance with its next heartbeat; the default of three seconds would be waited for.
    extra = named_for(client, {"heartbeat_interval_ms": 300})
    given = {"bootstrap_servers": bootstrap, "client": client, "allow_insecure": True, "extra": extra}
    return KafkaSettings.model_validate(given)


@pytest.fixture
def source(settings: KafkaSettings) -> Iterator[Opened]:
    opened: list[AnySource] = []

    def make(*topics: str, keeper: Keeper | None = None, group: str | None = None, shared: bool = False) -> AnySource:
        opened.append(source_of(topics, settings, group=group, assignment="group" if shared else "static"))
        patiently(lambda: opened[-1].open(keeper or Keeper()))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def sink(settings: KafkaSettings) -> Iterator[SinkFactory]:
    opened: list[AnySink] = []

    def make(topic: str, **options: Any) -> AnySink:
        opened.append(sink_on(topic, settings, **options))
        patiently(opened[-1].open)
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def as_guest(broker: Node, tmp_path: Path) -> list[str]:
    (tmp_path / "guest").write_text(GUEST_PASSWORD)
    section = {
        "bootstrap_servers": f"localhost:{broker.secure_port}",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_plain_username": GUEST,
        "sasl_plain_password_file": tmp_path / "guest",
        "ssl_cafile": broker.authority,
    }
    return [f"streams.kafka.{key}={value}" for key, value in section.items()]
