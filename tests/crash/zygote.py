"""A process that has imported everything and forks one child for each life of a daemon.

Importing PyTorch takes seconds, a fork milliseconds. The zygote does nothing but import before it forks: no thread is
started and no tensor computed in it, so a child is what a process of its own would be after its imports. `Zygote`
starts it and speaks with it in lines of JSON; this file run as a program is the zygote.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """What a daemon finds in its environment: all but what is meant for tests, on one thread."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ADAPTD_")} | {
        "OMP_NUM_THREADS": "1"
    }


@dataclass
class Life:
    """One life of a daemon: a child of the zygote."""

    zygote: Zygote
    pid: int
    log: Path

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def ended(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        return self.zygote.poll(self.pid, 0.0)

    def wait(self, seconds: float) -> int | None:
        """Wait for the end; None if it does not come in time."""
        return self.zygote.poll(self.pid, seconds)

    def wait_until(self, holds: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for something that the daemon does; fails if it ends before, or does not do it in time."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.ended is None, self.words
            assert time.monotonic() < deadline, self.words
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens to one that has ended."""
        self.zygote.signal(self.pid, number)


class Zygote:
    """Starts a zygote and asks it for lives; ends it, and what is left of them, with the block."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
        )
        self._buffer = b""
        self._exits: dict[int, int] = {}
        self._born: list[int] = []
        ready = self._read(60.0)
        assert ready == {"threads": 1}, ready

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in self._born:
            self.signal(pid, signal.SIGKILL)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.close()
        self._process.wait(timeout=30)
        stdout.close()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, before: str = "") -> Life:
        """Begin a life with these arguments of the command line, ``before`` run first; ``log`` is appended to."""
        log.touch()
        self._ask({"arguments": list(arguments), "environment": dict(environment), "log": str(log), "before": before})
        while not isinstance(pid := self._read(30.0).get("pid"), int):
            pass
        self._born.append(pid)
        return Life(self, pid, log)

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Have a child signalled. Only its parent knows that it lives: it ends at any moment, and its id is free."""
        self._ask({"signal": [pid, number]})

    def poll(self, pid: int, seconds: float) -> int | None:
        """The exit code of a child; waits for it up to so many seconds."""
        deadline = time.monotonic() + seconds
        while pid not in self._exits:
            left = deadline - time.monotonic()
            if self._read(max(left, 0.0)) is NOTHING and left <= 0:
                return None
        return self._exits[pid]

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line of the zygote; empty if none comes in time."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                return NOTHING
            data = os.read(descriptor, 1 << 16)
            assert data, "the zygote has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        if "exit" in told:
            pid, status = told["exit"]
            self._exits[pid] = os.waitstatus_to_exitcode(status)
        return told


NOTHING: dict[str, Any] = {}
"""Nothing was told."""


IMPORTS = (
    "engine.cli",
    "engine.launch",
    "streams.kafka",
    "streams.kafka_sink",
    "streams.confluent_sink",
    "streams.confluent_source",
    "uvicorn.lifespan.off",  # the server imports these when it starts
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.auto",
)
"""Everything that a daemon imports, so that its life need not."""


def _child(request: dict[str, Any]) -> NoReturn:
    """Become a daemon."""
    code = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 64)
        os.environ.update(request["environment"])
        from engine import cli
        from streams import seams

        seams.arm(os.environ.get("ADAPTD_FAILPOINT", ""))
        sys.argv = ["adaptd", *request["arguments"]]
        try:
            exec(request["before"], {})
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
    except BaseException:  # noqa: BLE001 - whatever it is, the log of this life is to hold it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Fork a child for each line that asks for one, signal those that live, and tell of each that ends."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    wake, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(told)
    tell({"threads": threading.active_count()})
    living: set[int] = set()
    pending = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        reap(living)
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                answer(json.loads(line), living)


def answer(request: dict[str, Any], living: set[int]) -> None:
    """Do what a line asks for."""
    if "signal" in request:
        pid, number = request["signal"]
        if pid in living:
            os.kill(pid, number)
        return
    pid = os.fork()
    if not pid:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _child(request)
    living.add(pid)
    tell({"pid": pid})


def tell(line: dict[str, Any]) -> None:
    os.write(1, json.dumps(line).encode() + b"\n")


def reap(living: set[int]) -> None:
    """Tell of the children that have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        living.discard(pid)
        tell({"exit": [pid, status]})


if __name__ == "__main__":
    main()
    os._exit(0)  # libraries would complain about what was never used
