"""Secrets stay where they are kept: in no log, page, error, argument, checkpoint or printed policy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker.daemons import Daemon, Process, Topics, send, small_events
from tests.broker.helpers import SinkFactory, TopicFactory
from tests.broker.node import KEY_PASSWORD, PASSWORD, USER, Node

WRONG = "hunter2-is-not-it"


@pytest.fixture
def daemon(tmp_path: Path, bootstrap: str, client: str, topic: TopicFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "daemon", Topics.make(topic), bootstrap, client)
    yield made
    made.end()


def by_password(broker: Node, secret: Path) -> dict[str, object]:
    return {
        "bootstrap_servers": f"localhost:{broker.secure_port}",
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "PLAIN",
        "sasl_plain_username": USER,
        "sasl_plain_password_file": secret,
        "ssl_cafile": broker.authority,
    }


def by_certificate(broker: Node, secret: Path) -> dict[str, object]:
    return {
        "bootstrap_servers": f"localhost:{broker.mutual_port}",
        "security_protocol": "SSL",
        "ssl_cafile": broker.authority,
        "ssl_certfile": broker.certificate,
        "ssl_keyfile": broker.key,
        "ssl_password_file": secret,
    }


def flags(section: dict[str, object]) -> list[str]:
    return [f"streams.kafka.{key}={value}" for key, value in section.items()]


def everything_said(daemon: Daemon, life: Process) -> bytes:
    """Logs, pages, arguments, and every file of the state directory."""
    said = [life.words, life.arguments, *(life.get(page) for page in ("/status", "/metrics", "/livez", "/readyz"))]
    files = [path.read_bytes() for path in (daemon.directory / "state").rglob("*") if path.is_file()]
    return "\n".join(said).encode() + b"\n".join(files)


def validated(daemon: Daemon, chosen: list[str]) -> str:
    """What `adaptd validate --show` prints."""
    arguments = [part for flag in chosen for part in ("--set", flag)]
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "validate", str(daemon.directory / "policy.yaml"), "--show", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(("section", "secret"), [(by_password, PASSWORD), (by_certificate, KEY_PASSWORD)])
def test_a_secret_that_works_is_seen_nowhere_even_at_the_finest_logs(
    daemon: Daemon, sink: SinkFactory, broker: Node, tmp_path: Path, section: object, secret: str
) -> None:
    assert callable(section)
    (tmp_path / "secret").write_text(secret)
    chosen = [*flags(section(broker, tmp_path / "secret")), "log.level=debug"]
    assert secret not in validated(daemon, chosen)
    send(sink(daemon.topics.data), small_events(0, 20))
    life = daemon.start(*chosen)
    life.until(lambda status: status["events"] == 20)
    said = everything_said(daemon, life)
    assert b'"event": "checkpoint"' in said
    assert secret.encode() not in said
    assert life.terminate() == 0, life.words
    assert secret not in life.words


def test_a_secret_from_the_environment_is_seen_nowhere(daemon: Daemon, sink: SinkFactory, broker: Node) -> None:
    section = by_password(broker, Path())
    del section["sasl_plain_password_file"]
    chosen = flags(section | {"sasl_plain_password_env": "KAFKA_PASSWORD"})
    send(sink(daemon.topics.data), small_events(0, 20))
    life = daemon.start(*chosen, variables={"KAFKA_PASSWORD": PASSWORD})
    life.until(lambda status: status["events"] == 20)
    assert PASSWORD.encode() not in everything_said(daemon, life)
    assert life.terminate() == 0, life.words


@pytest.mark.parametrize("section", [by_password, by_certificate])
def test_a_secret_that_is_wrong_ends_the_start_with_a_sentence_that_does_not_hold_it(
    daemon: Daemon, broker: Node, tmp_path: Path, section: object
) -> None:
    assert callable(section)
    (tmp_path / "secret").write_text(WRONG)
    patch = "import engine.daemon; engine.daemon.START_SECONDS = 10.0"
    chosen = [*flags(section(broker, tmp_path / "secret")), "streams.kafka.timeout=2", "log.level=debug"]
    life = daemon.start(*chosen, before=patch)
    assert life.wait() in (69, 78), life.words
    last = life.words.strip().splitlines()[-1]
    assert last.startswith("adaptd: ")
    assert "check the user" in last or "refusing the user or its password" in last or "another password" in last
    assert WRONG not in life.words
    assert "Traceback" not in life.words
