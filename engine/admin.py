"""HTTP pages for people and probes: ``/metrics``, ``/livez``, ``/readyz``, ``/status``. Reading only."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine import __version__
from engine.daemon import Daemon
from engine.errors import PolicyFileError
from engine.status import outage, status
from streams.seams import CLOCK

STUCK_SECONDS = 60.0
"""Without progress for so long while work waits, the daemon counts as stuck."""

CONNECTION_SECONDS = 30.0
"""Time after which a connection is cut, whatever it is at: a client that sends nothing would hold it for ever."""
MAX_CONNECTIONS = 256
"""Connections that are kept; of more the oldest are cut, so that files and streams find descriptors left."""
MAX_HEADERS = 64
"""Lines that the head of a request may have."""
MAX_HEAD_BYTES = 16_384
"""Bytes that they may have."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything else starts, so that a busy port is found out first.

    Raises:
        PolicyFileError: If the address is taken or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise PolicyFileError(
            f"metrics.port: cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0 for any"
        ) from error
    return sock


class Admin:
    """Serves the pages of one daemon.

    Args:
        daemon: Whose pages.
        policy: Path and digest of the policy in force, for ``/status``.
    """

    def __init__(self, daemon: Daemon, policy: dict[str, Any]) -> None:
        self._daemon = daemon
        self._policy = policy

    async def serve(self, sock: socket.socket) -> None:
        """Serve on ``sock`` until cancelled."""
        routes = [
            Route("/metrics", self._metrics),
            Route("/livez", self._livez),
            Route("/readyz", self._readyz),
            Route("/status", self._status),
        ]
        application = Starlette(routes=routes)
        application.router.redirect_slashes = False
        config = uvicorn.Config(
            _guarded(application),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        server = _Server(config)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_hang_up, server)
                await server.serve(sockets=[sock])
                tasks.cancel_scope.cancel()
        finally:
            server.should_exit = True
            sock.close()

    def alive(self) -> tuple[bool, str]:
        """Whether the daemon makes progress, and if not, what stands still. A timer alone never keeps it alive."""
        now, daemon = CLOCK.monotonic(), self._daemon
        if daemon.state.startswith("starting"):
            return True, daemon.state
        for reader in daemon.readers:
            if reader.last_poll and now - reader.last_poll > STUCK_SECONDS:
                return False, f"no poll of the streams for {now - reader.last_poll:.0f} s"
        waiting = sum(reader.waiting(daemon.cutter.taken) for reader in daemon.readers)
        outage = daemon.writer.waiting_for or daemon.runner.keeper.trouble
        if outage:  # the daemon sits it out; a restart would not help
            return True, f"waiting for {outage}"
        if waiting and now - daemon.last_progress > STUCK_SECONDS:
            return False, f"{waiting} records wait and no batch was applied for {now - daemon.last_progress:.0f} s"
        return True, daemon.state

    def ready(self) -> tuple[bool, str]:
        """Whether the daemon answers events now, or would if any came; and if not, what it is at or waits for."""
        state = self._daemon.state
        if state.startswith(("starting", "replaying", "draining", "stopped")):
            return False, state
        away = outage(self._daemon)
        return not away, f"waiting for {away}" if away else state

    async def _metrics(self, request: Request) -> Response:
        self._daemon.export()
        return Response(self._daemon.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def _livez(self, request: Request) -> Response:
        return _verdict(*self.alive())

    async def _readyz(self, request: Request) -> Response:
        return _verdict(*self.ready())

    async def _status(self, request: Request) -> Response:
        body = {"version": __version__, "policy": self._policy, **status(self._daemon)}
        return Response(json.dumps(body, indent=2) + "\n", media_type="application/json")


class _Server(uvicorn.Server):
    """A server that leaves signals to the daemon."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _guarded(application: Starlette) -> Any:
    """The pages for requests that an honest client would make; a refusal for others."""

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        head = scope["headers"]
        small = len(head) <= MAX_HEADERS and sum(len(name) + len(value) for name, value in head) <= MAX_HEAD_BYTES
        honest = small and scope["http_version"] in ("1.0", "1.1")
        await (application if honest else Response(status_code=400))(scope, receive, send)

    return guard


async def _hang_up(server: uvicorn.Server) -> None:
    """Cut connections that have lasted too long, and the oldest where there are too many; runs until cancelled."""
    since: dict[Any, float] = {}
    while True:
        await anyio.sleep(min(1.0, CONNECTION_SECONDS / 4))
        now = CLOCK.monotonic()
        since = {each: since.get(each, now) for each in server.server_state.connections}
        oldest = sorted(since, key=since.__getitem__)
        for place, connection in enumerate(oldest):
            if now - since[connection] > CONNECTION_SECONDS or place < len(oldest) - MAX_CONNECTIONS:
                connection.transport.abort()


def _verdict(good: bool, why: str) -> JSONResponse:
    return JSONResponse({"ok": good, "state": why}, status_code=200 if good else 503)
