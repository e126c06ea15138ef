from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine import __version__
from engine import admin as module
from engine.admin import STUCK_SECONDS, Admin, bind
from engine.daemon import Daemon
from engine.errors import PolicyFileError
from engine.policy import Metrics as MetricsSection
from streams.join import KINDS
from streams.memory import MemorySource
from tests.engine.parts import daemon_on, fill, memory, resting, run, until

Get = Callable[..., Awaitable[tuple[int, dict[str, str], bytes]]]

STATUS_KEYS = {
    "version",
    "policy",
    "state",
    "waiting_for",
    "uptime_seconds",
    "processor",
    "events",
    "dead_letters",
    "labels",
    "model",
    "accuracy",
    "audited",
    "counts",
    "joins",
    "waiting",
    "positions",
    "partitions",
    "lag",
    "replaying",
    "rebuilding",
    "retention",
    "replayed",
    "checkpoint",
    "background_job",
}
"""What others may rely on; a key may be added, none may go."""


async def served(directory: Path, source: MemorySource, test: Callable[[Daemon, Admin, Get], Awaitable[None]]) -> None:
    """Run a daemon with its pages and ``test`` beside it."""
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]

    async def get(path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, body

    with daemon_on(directory, source) as daemon:
        admin = Admin(daemon, {"path": "policy.yaml", "digest": "0" * 64})

        async def beside(daemon: Daemon) -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(admin.serve, sock)
                await until(lambda: daemon.state == "waiting for records")
                await test(daemon, admin, get)
                daemon.stop()
                await until(lambda: daemon.state == "stopped")
                tasks.cancel_scope.cancel()

        await run(daemon, beside)


async def learned(daemon: Daemon, labels: int) -> None:
    """Wait until labels are taken in, not only counted, and what they lead to is done."""
    await until(lambda: daemon.core.counts["feedback"] == labels and resting(daemon))


async def test_every_page_answers(tmp_path: Path) -> None:
    async def look(daemon: Daemon, admin: Admin, get: Get) -> None:
        await learned(daemon, 20)
        code, headers, body = await get("/metrics")
        assert code == 200
        assert headers["content-type"].startswith("text/plain; version=")
        values = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }
        assert values["adaptd_events_total",] == 20
        assert values["adaptd_records_in_total", "feedback"] == 20
        for page in ("/livez", "/readyz"):
            code, headers, body = await get(page)
            assert (code, headers["content-type"]) == (200, "application/json")
            assert json.loads(body)["ok"] is True

    await served(tmp_path, memory(20, bounded=False), look)


async def test_the_status_says_what_the_daemon_is_doing(tmp_path: Path) -> None:
    async def look(daemon: Daemon, admin: Admin, get: Get) -> None:
        await learned(daemon, 20)
        code, headers, body = await get("/status")
        found: dict[str, Any] = json.loads(body)
        assert (code, headers["content-type"]) == (200, "application/json")
        assert found.keys() == STATUS_KEYS
        assert found["version"] == __version__
        assert found["policy"] == {"path": "policy.yaml", "digest": "0" * 64}
        assert (found["events"], found["labels"]) == (20, 20)
        assert found["positions"] == {"data-0": 20, "feedback-0": 20}
        assert found["joins"]["joined"] == 20
        assert found["waiting"] == {"events": 0, "feedback": 0, "bytes": daemon.core.joins.bytes, "disk_bytes": 0}
        assert found["checkpoint"]["step"] == 0
        assert found["checkpoint"]["age_seconds"] >= 0
        assert found["model"].keys() == {"release", "step", "alpha", "frozen"}
        assert found["accuracy"].keys() <= {"source", "live", "release"}

    await served(tmp_path, memory(20, bounded=False), look)


def test_every_key_of_the_status_and_every_kind_of_feedback_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "pages.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == STATUS_KEYS
    (joins,) = re.findall(r"^\| `joins` \|.*$", page, re.MULTILINE)
    assert set(KINDS) <= set(re.findall(r"`(\w+)`", joins))


async def test_nothing_can_be_done_but_reading(tmp_path: Path) -> None:
    async def look(daemon: Daemon, admin: Admin, get: Get) -> None:
        for page in ("/metrics", "/livez", "/readyz", "/status"):
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                code, _, _ = await get(page, method)
                assert code == 405
        code, _, _ = await get("/")
        assert code == 404
        code, _, body = await get("/status", "HEAD")
        assert (code, body) == (200, b"")

    await served(tmp_path, memory(1, bounded=False), look)


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now


async def test_it_counts_as_alive_while_it_makes_progress_and_not_by_a_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon_on(tmp_path, fill(MemorySource({"data": 1, "feedback": 1}), 0, 20)) as daemon:
        await run(daemon)
        clock = Clock(1e6)
        monkeypatch.setattr(module, "CLOCK", clock)
        admin, (reader,) = Admin(daemon, {}), daemon.readers
        daemon.state = "waiting for records"
        daemon.last_progress = reader.last_poll = clock.now
        assert admin.alive() == (True, "waiting for records")
        clock.now += STUCK_SECONDS + 1
        reader.last_poll = clock.now
        assert admin.alive()[0], "nothing waits, so nothing need be done"
        reader._given["data"] += 7
        assert admin.alive() == (False, "7 records wait and no batch was applied for 61 s")
        daemon.last_progress = clock.now - STUCK_SECONDS
        assert admin.alive()[0]
        reader._given["data"] -= 7
        clock.now += STUCK_SECONDS + 1
        assert admin.alive() == (False, "no poll of the streams for 61 s")
        daemon.state = "starting: no broker answers; retrying"
        assert admin.alive()[0]


async def test_a_daemon_that_is_stuck_answers_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def look(daemon: Daemon, admin: Admin, get: Get) -> None:
        await learned(daemon, 1)
        daemon.readers[0]._given["data"] += 1
        daemon.last_progress = -2 * STUCK_SECONDS
        code, _, body = await get("/livez")
        assert code == 503
        assert json.loads(body)["ok"] is False
        assert "1 records wait" in json.loads(body)["state"]
        daemon.readers[0]._given["data"] -= 1

    await served(tmp_path, memory(1, bounded=False), look)


async def test_of_too_many_connections_the_oldest_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    class Counting(Clock):
        def monotonic(self) -> float:
            looks.append(self.now)
            self.now += 1e-3
            return self.now

    async def crowd(daemon: Daemon, admin: Admin, get: Get) -> None:
        first = [await asyncio.open_connection("127.0.0.1", ports[0]) for _ in range(4)]
        seen = len(looks)
        await until(lambda: len(looks) > seen + 1)
        later = [await asyncio.open_connection("127.0.0.1", ports[0]) for _ in range(3)]
        ends = [asyncio.ensure_future(reader.read()) for reader, _ in first]
        await until(lambda: sum(end.done() for end in ends) == 3)
        for reader, writer in later:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
        for _, writer in (*first, *later):
            writer.transport.abort()
        assert set(await asyncio.gather(*ends)) == {b""}

    ports: list[int] = []

    def noting(host: str, port: int) -> socket.socket:
        sock = module.bind(host, port)
        ports.append(sock.getsockname()[1])
        return sock

    monkeypatch.setattr(module, "MAX_CONNECTIONS", 4)
    monkeypatch.setattr(module, "CLOCK", Counting(1.0))
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "bind", noting)
        await served(tmp_path, memory(1, bounded=False), crowd)


@pytest.mark.parametrize(
    ("state", "ready"),
    [
        ("starting", False),
        ("starting: no broker answers; retrying", False),
        ("replaying, 7 batches left", False),
        ("serving", True),
        ("waiting for records", True),
        ("draining", False),
        ("stopped", False),
    ],
)
def test_it_is_ready_while_it_answers_events(state: str, ready: bool) -> None:
    assert Admin(daemon_in(state), {}).ready() == (ready, state)


@pytest.mark.parametrize("what", ["reader", "writer", "keeper"])
def test_it_is_not_ready_while_something_is_away_that_it_cannot_mend_and_says_what(what: str) -> None:
    daemon = daemon_in("waiting for a broker", **{what: "no broker answers"})
    assert Admin(daemon, {}).ready() == (False, "waiting for no broker answers")


def daemon_in(state: str, reader: str = "", writer: str = "", keeper: str = "") -> Daemon:
    found = SimpleNamespace(
        state=state,
        readers=[SimpleNamespace(trouble=""), SimpleNamespace(trouble=reader)],
        writer=SimpleNamespace(waiting_for=writer),
        runner=SimpleNamespace(keeper=SimpleNamespace(trouble=keeper)),
    )
    return cast("Daemon", found)


class Away(MemorySource):
    """A source that nobody answers while it has a trouble."""

    words = ""

    @property
    def trouble(self) -> str:
        return self.words


async def test_while_nobody_answers_the_pages_say_so_and_the_daemon_counts_as_alive(tmp_path: Path) -> None:
    source = Away({"data": 1, "feedback": 1}, bounded=False)
    fill(source, 0, 20)

    async def seen(get: Get, state: str) -> dict[str, Any]:
        while True:
            found: dict[str, Any] = json.loads((await get("/status"))[2])
            if found["state"] == state:
                return found
            await anyio.sleep(0.01)

    async def look(daemon: Daemon, admin: Admin, get: Get) -> None:
        await learned(daemon, 20)
        assert b'adaptd_stream_available{stream="data"} 1.0' in (await get("/metrics"))[2]
        source.words = "no broker at host:9092 answers"
        found = await seen(get, "waiting for a broker")
        assert found["waiting_for"] == source.words
        assert (await get("/livez"))[0] == 200
        code, _, body = await get("/readyz")
        assert (code, json.loads(body)["state"]) == (503, f"waiting for {source.words}")
        metrics = (await get("/metrics"))[2]
        for stream in (b"data", b"feedback"):
            assert b'adaptd_stream_available{stream="%s"} 0.0' % stream in metrics
            assert b'adaptd_lag_records{partition="0",stream="%s"} NaN' % stream in metrics
        source.words = ""
        assert (await seen(get, "waiting for records"))["waiting_for"] == "waiting for records"
        assert (await get("/readyz"))[0] == 200

    await served(tmp_path, source, look)


def test_a_port_that_is_taken_is_a_mistake_in_the_policy() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(PolicyFileError, match=f"^metrics.port: cannot listen on 127.0.0.1:{port}: .*another port"):
            bind("127.0.0.1", port)
    assert PolicyFileError.exit_code == 78


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(PolicyFileError, match=r"cannot listen on 192\.0\.2\.1"):
        bind("192.0.2.1", 0)


def test_only_this_machine_sees_the_pages_unless_the_policy_says_otherwise() -> None:
    assert MetricsSection().host == "127.0.0.1"


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_address_of_version_6_is_bound() -> None:
    with bind("::1", 0) as sock:
        assert sock.family == socket.AF_INET6
