"""What the client libraries say among the logs of the daemon."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import structlog
from kafka.errors import KafkaConnectionError
from kafka.net.selector import NetworkSelector
from kafka.net.transport import KafkaTCPTransport

from engine.logs import configure_logs
from engine.policy import Log

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    configured = structlog.get_config()
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.configure(**configured)


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def say(name: str, error: Exception | None = None) -> None:
    """Log as a library does that has met an error, or that only tells of one."""
    if error is None:
        logging.getLogger(name).error("Connection failed: %s", "ECONNREFUSED")
        return
    try:
        raise error
    except Exception:
        logging.getLogger(name).exception("Error receiving network data")


@pytest.mark.parametrize("name", ["kafka.net.transport", "kafka.cluster", "librdkafka"])
@pytest.mark.parametrize("error", [None, ConnectionResetError(104, "reset"), KafkaConnectionError("lost")])
def test_what_clients_say_of_brokers_that_are_away_is_a_detail(
    lines: Lines, name: str, error: Exception | None
) -> None:
    configure_logs(Log(format="json"))
    say(name, error)
    assert lines() == []
    configure_logs(Log(format="json", level="debug"))
    say(name, error)
    (line,) = lines()
    assert line["level"] == "debug"
    assert line.keys() == {"event", "level", "timestamp"}
    assert error is None or repr(error) in line["event"]


@pytest.mark.parametrize("closed", [True, False])
def test_a_read_from_a_connection_just_closed_is_a_detail(lines: Lines, closed: bool) -> None:
    configure_logs(Log(format="json"))
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(NetworkSelector()) as net:
        transport = KafkaTCPTransport(net, ours)
        if closed:
            transport.close()
        else:
            transport._sock = None  # what no closing brings about stays a bug of the client
        _, error = transport._sock_recv()
    assert error is not None, "kafka-python reads from no socket without an error by now: the filter can go"
    assert [line["level"] for line in lines()] == ([] if closed else ["error"])


def test_a_bug_of_a_client_and_what_other_libraries_say_is_written_as_it_is(lines: Lines) -> None:
    configure_logs(Log(format="json"))
    say("kafka.net.selector", ValueError("negative count"))
    say("asyncio")
    bug, other = lines()
    assert (bug["level"], other["level"]) == ("error", "error")
    assert "exc_info" not in bug
    assert bug["exception"].startswith("Traceback (most recent call last)")
    assert bug["exception"].endswith("ValueError: negative count")
    assert other["event"] == "Connection failed: ECONNREFUSED"
