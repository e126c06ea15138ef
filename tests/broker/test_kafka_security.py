"""Who we are to a cluster, and what it lets us do: every mechanism works, and every refusal is a sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType

from streams.base import Message, StreamError, StreamUnavailableError
from streams.clients import source_of
from streams.kafka import KafkaSettings
from streams.kafka_members import members_named
from tests.broker.helpers import (
    LIMIT,
    AnySink,
    AnySource,
    Keeper,
    TopicFactory,
    fresh_group,
    poll_until,
    read,
    sink_on,
)
from tests.broker.node import GUEST, GUEST_PASSWORD, KEY_PASSWORD, PASSWORD, USER, Node, certify_client

Secure = Callable[..., KafkaSettings]
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
UNTRUSTED = {
    ("kafka-python", "name"): "IP address mismatch",
    ("kafka-python", "authority"): "self-signed certificate",
    ("confluent", "name"): "certificate could not be verified",
    ("confluent", "authority"): "certificate could not be verified",
}
"""What each client says; librdkafka does not tell a foreign name from a foreign authority."""
PATIENCE = (1.5, 6.0, 24.0)
"""Seconds for an answer, tried in turn: some refusals take all of them, and a busy machine shakes hands slowly."""
SECRETS = (PASSWORD, GUEST_PASSWORD, KEY_PASSWORD, "hunter2")


@pytest.fixture
def secure(broker: Node, tmp_path: Path, client: str) -> Secure:
    def make(password: str = PASSWORD, host: str = "localhost", **changed: Any) -> KafkaSettings:
        (tmp_path / "password").write_text(password + "\n")
        given: dict[str, Any] = {
            "bootstrap_servers": f"{host}:{broker.secure_port}",
            "client": client,
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": USER,
            "sasl_plain_password_file": tmp_path / "password",
            "ssl_cafile": broker.authority,
        }
        return KafkaSettings.model_validate(given | changed)

    return make


@pytest.fixture
def mutual(broker: Node, tmp_path: Path, client: str) -> Secure:
    def make(key_password: str = KEY_PASSWORD, **changed: Any) -> KafkaSettings:
        (tmp_path / "key-password").write_text(key_password + "\n")
        given: dict[str, Any] = {
            "bootstrap_servers": f"localhost:{broker.mutual_port}",
            "client": client,
            "security_protocol": "SSL",
            "ssl_cafile": broker.authority,
            "ssl_certfile": broker.certificate,
            "ssl_keyfile": broker.key,
            "ssl_password_file": tmp_path / "key-password",
        }
        return KafkaSettings.model_validate(given | changed)

    return make


def there_and_back(settings: KafkaSettings, name: str, group: str | None = None) -> None:
    """Write a record and read it."""
    sink, source = sink_on(name, settings), source_of([name], settings, group=group)
    try:
        sink.open()
        sink.send([Message(b"k", b"v")])
        sink.flush(LIMIT)
        source.open(Keeper())
        assert [record.value for record in read(source, 1)] == [b"v"]
    finally:
        source.close()
        sink.close()


def use(one: AnySource | AnySink) -> None:
    """Open it and move a record through."""
    if isinstance(one, AnySource):
        one.open(Keeper())
        read(one, 1)
    else:
        one.open()
        one.send([Message(b"k", b"v")])
        one.flush(LIMIT)


def refused(settings: KafkaSettings, name: str, match: str, group: str | None = None) -> None:
    """Reading and writing end with the same sentence, which holds no secret."""
    told(lambda given: source_of([name], given, group=group), settings, match)
    told(lambda given: sink_on(name, given), settings, match)


def told(make: Callable[[KafkaSettings], AnySource | AnySink], settings: KafkaSettings, match: str) -> StreamError:
    """Its use ends with a sentence, unless it was not even connected in time: then it gets more of that."""
    for seconds in PATIENCE:
        one = make(settings.model_copy(update={"timeout": seconds}))
        try:
            with pytest.raises(StreamError) as caught:
                use(one)
        finally:
            one.close()
        words = f"{caught.value!r} {caught.value.__cause__!r}"
        assert not any(secret in words for secret in SECRETS)
        if re.search(match, str(caught.value)) or not isinstance(caught.value, StreamUnavailableError):
            break
    assert re.search(match, str(caught.value)), words
    return caught.value


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_records_travel_encrypted_under_a_password(secure: Secure, topic: TopicFactory, mechanism: str) -> None:
    there_and_back(secure(sasl_mechanism=mechanism), topic(), group=fresh_group())


def test_records_travel_under_a_certificate_of_ones_own(mutual: Secure, topic: TopicFactory) -> None:
    there_and_back(mutual(), topic(), group=fresh_group())


def test_a_password_may_come_from_the_environment(
    secure: Secure, topic: TopicFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_PASSWORD", PASSWORD)
    there_and_back(secure(sasl_plain_password_file=None, sasl_plain_password_env="KAFKA_PASSWORD"), topic())


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_wrong_password_is_told(secure: Secure, topic: TopicFactory, mechanism: str) -> None:
    refused(
        secure(password="hunter2", sasl_mechanism=mechanism),
        topic(),
        r"check the user and its ACLs|refusing the user or its password",
    )


def test_a_certificate_for_another_name_is_not_trusted(secure: Secure, topic: TopicFactory, client: str) -> None:
    name = topic()
    error = told(lambda given: sink_on(name, given), secure(host="127.0.0.1"), UNTRUSTED[client, "name"])
    assert isinstance(error, StreamUnavailableError)


def test_a_certificate_of_an_unknown_authority_is_not_trusted(secure: Secure, topic: TopicFactory, client: str) -> None:
    name = topic()
    error = told(lambda given: sink_on(name, given), secure(ssl_cafile=None), UNTRUSTED[client, "authority"])
    assert isinstance(error, StreamUnavailableError)


def test_without_a_certificate_the_cluster_does_not_let_us_in(mutual: Secure, topic: TopicFactory) -> None:
    bare = mutual(ssl_certfile=None, ssl_keyfile=None, ssl_password_file=None)
    refused(bare, topic(), "no broker at .* answers.*certificate")


def test_a_certificate_that_the_cluster_does_not_know_is_refused(
    mutual: Secure, topic: TopicFactory, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "other.pem", tmp_path / "other.key"
    certify_client(certificate, key, "other")
    refused(mutual(ssl_certfile=certificate, ssl_keyfile=key), topic(), "answers.*certificate")


def test_a_key_that_its_password_does_not_open_is_told(mutual: Secure, topic: TopicFactory) -> None:
    refused(
        mutual(key_password="hunter2"), topic(), "ssl_certfile: .*client.pem and the key in .* cannot be used together"
    )


def test_authorities_that_are_no_certificates_are_told(mutual: Secure, topic: TopicFactory, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    refused(mutual(ssl_cafile=tmp_path / "ca.pem"), topic(), "ssl_cafile: .*ca.pem holds no certificates")


@pytest.fixture
def grant(admin: KafkaAdminClient) -> Callable[..., None]:
    def allow(kind: ResourceType, name: str, *operations: ACLOperation) -> None:
        pattern = ResourcePattern(kind, name)
        acls = [ACL(f"User:{GUEST}", "*", each, ACLPermissionType.ALLOW, pattern) for each in operations]
        assert not admin.create_acls(acls)["failed"]

    return allow


def test_a_topic_that_we_may_not_see_is_refused_by_name(secure: Secure, topic: TopicFactory) -> None:
    name = topic()
    refused(secure(GUEST_PASSWORD, sasl_plain_username=GUEST), name, f"topic {name}.*{GUEST}.*check its ACLs")


def test_a_topic_that_we_may_see_and_not_read_or_write_is_refused(
    secure: Secure, topic: TopicFactory, grant: Callable[..., None]
) -> None:
    name, guest = topic(), secure(GUEST_PASSWORD, sasl_plain_username=GUEST)
    grant(ResourceType.TOPIC, name, ACLOperation.DESCRIBE)
    refused(guest, name, f"{name}.*does not permit it.*check the user and its ACLs")


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "in a group"])
def test_a_group_that_we_may_not_use_is_refused(
    secure: Secure, topic: TopicFactory, grant: Callable[..., None], shared: bool
) -> None:
    name, group, guest = topic(), fresh_group(), secure(GUEST_PASSWORD, sasl_plain_username=GUEST)
    grant(ResourceType.TOPIC, name, ACLOperation.READ, ACLOperation.WRITE)
    there_and_back(guest, name)
    told(
        lambda given: source_of([name], given, group=group, assignment="group" if shared else "static"),
        guest,
        f"does not permit it.*{group}.*check the user and its ACLs",
    )


def test_what_the_least_rights_are_is_what_is_needed(
    secure: Secure, topic: TopicFactory, grant: Callable[..., None]
) -> None:
    name, group = topic(), fresh_group()
    grant(ResourceType.TOPIC, name, ACLOperation.READ, ACLOperation.WRITE)
    grant(ResourceType.GROUP, group, ACLOperation.READ)
    there_and_back(secure(GUEST_PASSWORD, sasl_plain_username=GUEST), name, group)


def test_who_is_in_a_group_is_told_to_those_who_may_know(
    secure: Secure, mutual: Secure, topic: TopicFactory, grant: Callable[..., None]
) -> None:
    name, group, keeper = topic(), fresh_group(), Keeper()
    source = source_of([name], secure(), group=group, assignment="group", member="m")
    try:
        source.open(keeper)
        poll_until([source], lambda: bool(keeper.owned))
        for settings in (secure(), mutual()):
            assert len(members_named(settings, group, "m")) == 1
            assert members_named(settings, group, "other") == set()
        with pytest.raises(StreamError, match=f"{group}.*does not permit it.*check the user and its ACLs"):
            members_named(secure(GUEST_PASSWORD, sasl_plain_username=GUEST), group, "m")
    finally:
        source.close()
