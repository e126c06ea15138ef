from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from streams.base import StreamError
from streams.kafka_settings import KafkaSettings, host_of, is_loopback


def settings(**given: Any) -> KafkaSettings:
    return KafkaSettings.model_validate({"bootstrap_servers": "localhost:9092"} | given)


SASL: dict[str, Any] = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "SCRAM-SHA-512",
    "sasl_plain_username": "adaptd",
}


def test_servers_come_as_a_list_or_with_commas() -> None:
    assert settings(bootstrap_servers="localhost:1, [::1]:2").bootstrap_servers == ("localhost:1", "[::1]:2")
    assert settings(bootstrap_servers=["localhost:1", "127.0.0.1:2"]).servers == "localhost:1, 127.0.0.1:2"


@pytest.mark.parametrize("server", ["localhost", "localhost:", ":9092", "localhost:0", "localhost:70000", ""])
def test_a_server_without_host_and_port_is_refused(server: str) -> None:
    with pytest.raises(ValidationError, match="is not host:port"):
        settings(bootstrap_servers=server)


@pytest.mark.parametrize(
    ("server", "host", "loopback"),
    [
        ("localhost:9092", "localhost", True),
        ("broker.localhost:1", "broker.localhost", True),
        ("127.3.2.1:9092", "127.3.2.1", True),
        ("[::1]:9092", "::1", True),
        ("[2001:db8::1]:9092", "2001:db8::1", False),
        ("10.0.0.1:9092", "10.0.0.1", False),
        ("localhost.example.org:9092", "localhost.example.org", False),
        ("127.example.org:9092", "127.example.org", False),
    ],
)
def test_only_this_machine_is_loopback(server: str, host: str, loopback: bool) -> None:
    assert host_of(server) == host
    assert is_loopback(host) is loopback


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SASL_PLAINTEXT"])
def test_unencrypted_traffic_leaves_the_machine_only_when_allowed(protocol: str) -> None:
    given = {"bootstrap_servers": ["localhost:9092", "kafka.example.org:9092"], "security_protocol": protocol}
    if protocol == "SASL_PLAINTEXT":
        given |= SASL | {"sasl_plain_password_env": "P", "security_protocol": protocol}
    with pytest.raises(ValidationError, match=r"readable for anyone.*allow_insecure: true"):
        settings(**given)
    assert settings(**given, allow_insecure=True).allow_insecure


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"security_protocol": "SASL_SSL"}, "SASL_SSL needs sasl_mechanism and sasl_plain_username"),
        (SASL, "sasl_plain_password_file or by sasl_plain_password_env"),
        (SASL | {"sasl_plain_password_env": "A", "sasl_plain_password_file": "/b"}, "sasl_plain_password_file or"),
        ({"sasl_plain_username": "me"}, "sasl_plain_username has no effect with security_protocol PLAINTEXT"),
        ({"ssl_cafile": "/ca.pem"}, "ssl_cafile has no effect with security_protocol PLAINTEXT"),
        ({"security_protocol": "SSL", "ssl_keyfile": "/k"}, "ssl_keyfile needs ssl_certfile"),
        (
            {"security_protocol": "SSL", "ssl_password_file": "/p", "ssl_password_env": "P"},
            "ssl_password_file or ssl_password_env, not both",
        ),
        ({"retries": 3}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        settings(**given)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"fetch_max_byte": 1}, "fetch_max_byte is no setting .* did you mean fetch_max_bytes?"),
        ({"zzz": 1}, "zzz is no setting that kafka-python [0-9.]+ takes from a file"),
        ({"ssl_context": "x"}, "ssl_context is no setting"),
        ({"enable_auto_commit": True}, "enable_auto_commit may not be set here: offsets are committed only when"),
        ({"sasl_plain_password": "x"}, "name a file in sasl_plain_password_file"),
        ({"ssl_cafile": "/ca"}, "set ssl_cafile beside extra"),
        ({"proxy_url": "socks5://me:secret@proxy:1080"}, "proxy_url may not hold a password"),
        ({"api_version": None}, "extra"),
    ],
)
def test_extra_settings_are_checked(extra: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        settings(extra=extra)


def test_extra_settings_reach_the_client_that_knows_them() -> None:
    given = settings(extra={"fetch_max_bytes": 7, "batch_size": 9, "api_version": [2, 3], "request_timeout_ms": 5})
    consumer, producer, admin = given.consumer_config(group=None), given.producer_config(), given.admin_config()
    assert (consumer["fetch_max_bytes"], producer["batch_size"]) == (7, 9)
    assert "fetch_max_bytes" not in producer
    assert "batch_size" not in consumer
    assert {config["api_version"] for config in (consumer, producer, admin)} == {(2, 3)}
    assert {config["request_timeout_ms"] for config in (consumer, producer, admin)} == {5}


def test_every_setting_is_one_that_its_client_knows() -> None:
    from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

    given = settings()
    assert given.consumer_config(group="g").keys() <= KafkaConsumer.DEFAULT_CONFIG.keys()
    assert given.producer_config().keys() <= KafkaProducer.DEFAULT_CONFIG.keys()
    assert given.admin_config().keys() <= KafkaAdminClient.DEFAULT_CONFIG.keys()


def test_a_consumer_never_commits_or_resets_by_itself() -> None:
    config = settings().consumer_config(group="g")
    assert (config["group_id"], config["enable_auto_commit"], config["auto_offset_reset"]) == ("g", False, "none")


def test_a_producer_is_idempotent_and_drops_nothing() -> None:
    config = settings(compression="zstd", linger=0.02).producer_config()
    assert (config["acks"], config["enable_idempotence"]) == ("all", True)
    assert (config["compression_type"], config["linger_ms"]) == ("zstd", 20)
    assert config["delivery_timeout_ms"] == 2**31 - 1


def test_the_password_is_read_from_its_file_when_connecting_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("tr\u00e4umerei 7 \n")
    given = settings(**SASL, sasl_plain_password_file=file)
    config = given.consumer_config(group=None)
    assert (config["sasl_plain_password"], config["sasl_plain_username"]) == ("tr\u00e4umerei 7 ", "adaptd")
    assert config["sasl_mechanism"] == "SCRAM-SHA-512"
    assert "umerei" not in f"{given!r}{given}{given.model_dump_json()}"


def test_the_password_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTD_TEST_PASSWORD", "secret")
    given = settings(**SASL, sasl_plain_password_env="ADAPTD_TEST_PASSWORD")
    assert given.producer_config()["sasl_plain_password"] == "secret"
    monkeypatch.delenv("ADAPTD_TEST_PASSWORD")
    with pytest.raises(StreamError, match="the environment has no variable ADAPTD_TEST_PASSWORD"):
        given.producer_config()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(StreamError, match=f"sasl_plain_password_file: cannot read {missing}"):
        settings(**SASL, sasl_plain_password_file=missing).admin_config()
    with pytest.raises(StreamError, match=f"ssl_cafile: there is no file {missing}"):
        settings(security_protocol="SSL", ssl_cafile=missing).admin_config()
    missing.write_bytes(b"x" * 70_000)
    with pytest.raises(StreamError, match="too large for a password"):
        settings(**SASL, sasl_plain_password_file=missing).admin_config()


def test_tls_settings_reach_the_client(tmp_path: Path) -> None:
    pem = tmp_path / "any.pem"
    pem.write_text("x")
    given = settings(
        bootstrap_servers="kafka.example.org:9093",
        security_protocol="SSL",
        ssl_cafile=pem,
        ssl_certfile=pem,
        ssl_keyfile=pem,
        ssl_password_file=pem,
    )
    config = given.consumer_config(group=None)
    assert (config["ssl_cafile"], config["ssl_keyfile"], config["ssl_password"]) == (str(pem), str(pem), "x")
    assert config["ssl_check_hostname"] is True


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings(), "client_id", "other")  # noqa: B010
