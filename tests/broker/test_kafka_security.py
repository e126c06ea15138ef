from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streams.base import Message, StreamError, StreamUnavailableError
from streams.kafka import KafkaSettings, KafkaSink, KafkaSource
from tests.broker.helpers import Keeper, TopicFactory
from tests.broker.node import PASSWORD, USER, Node

Secure = Callable[..., KafkaSettings]


@pytest.fixture
def secure(broker: Node, tmp_path: Path) -> Secure:
    def make(password: str = PASSWORD, host: str = "localhost", **changed: Any) -> KafkaSettings:
        (tmp_path / "password").write_text(password + "\n")
        given: dict[str, Any] = {
            "bootstrap_servers": f"{host}:{broker.secure_port}",
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": USER,
            "sasl_plain_password_file": tmp_path / "password",
            "ssl_cafile": broker.authority,
            "timeout": 2.0,
        }
        return KafkaSettings.model_validate(given | changed)

    return make


def test_records_travel_encrypted_under_a_password(secure: Secure, topic: TopicFactory) -> None:
    name = topic()
    sink, source = KafkaSink(name, secure()), KafkaSource([name], secure(), group=f"g-{name}")
    try:
        sink.open()
        sink.send([Message(b"k", b"v")])
        sink.flush(10.0)
        source.open(Keeper())
        assert [record.value for record in source.poll(1, 10.0)] == [b"v"]
    finally:
        source.close()
        sink.close()


def test_a_wrong_password_is_told(secure: Secure, topic: TopicFactory) -> None:
    with pytest.raises(StreamError, match=r"check the user and its ACLs|refusing the user or its password"):
        KafkaSource([topic()], secure(password="wrong")).open(Keeper())


def test_a_certificate_for_another_name_is_not_trusted(secure: Secure, topic: TopicFactory) -> None:
    with pytest.raises(StreamUnavailableError, match="IP address mismatch"):
        KafkaSink(topic(), secure(host="127.0.0.1", timeout=0.5)).open()


def test_a_certificate_of_an_unknown_authority_is_not_trusted(secure: Secure, topic: TopicFactory) -> None:
    with pytest.raises(StreamUnavailableError, match="self-signed certificate"):
        KafkaSink(topic(), secure(ssl_cafile=None, timeout=0.5)).open()
