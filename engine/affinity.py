"""Which processor threads run on: those that run Python share one, since they take turns at the interpreter anyway.

Where they run on several, each turn wakes another processor up, and what a thread hands to the next one has to move
from cache to cache: the same work takes a fifth more processor time, and half as many records again come through
without (docs/throughput.md). Threads that run no Python, of PyTorch and of librdkafka, are free to run anywhere.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import anyio
import structlog

from streams.seams import CLOCK

__all__ = ["Affinity", "busy_seconds"]

LOOK_SECONDS = 1.0
BUSY = 0.25
"""Share of a processor that others may take before we look for another one."""
BETTER = 0.1
"""By how much less of the other processor has to be taken than of ours."""
LOOKS = 2
"""Looks in a row that must find it so."""

T = TypeVar("T")

log = structlog.get_logger("adaptd")


def busy_seconds() -> dict[int, float]:
    """Seconds that each processor has not been idle since the machine started; empty where that is not told."""
    found = {}
    with suppress(OSError):
        tick = os.sysconf("SC_CLK_TCK")
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name.startswith("cpu") and name != "cpu":
                used = [int(value) for value in values[:8]]
                found[int(name[3:])] = (sum(used) - used[3] - used[4]) / tick  # all but idle and waiting for disks
    return found


class Affinity:
    """Keeps the threads of this process that run Python on one processor, and moves them where others need that one.

    Used by one thread, but for `apart`. Does nothing where it is not wanted, or where the system has no such thing.

    Args:
        wanted: Whether to do anything.
        busy: See `busy_seconds`.

    Attributes:
        processor: Where these threads are now; None where they are free.
    """

    def __init__(self, *, wanted: bool, busy: Callable[[], Mapping[int, float]] = busy_seconds) -> None:
        self._allowed = os.sched_getaffinity(0) if wanted and hasattr(os, "sched_setaffinity") else set[int]()
        self._busy = busy
        self._apart: set[int] = set()
        self._before: tuple[float, Mapping[int, float], Mapping[int, float]] | None = None
        self._crowded = 0
        self._keeping: anyio.CancelScope | None = None
        self.processor: int | None = None

    async def keep(self) -> None:
        """Look now and each second, until `release`."""
        with anyio.CancelScope() as self._keeping:
            while len(self._allowed) > 1:
                self.look()
                await anyio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Choose a processor, and put all threads in their place, also those that are new."""
        if len(self._allowed) < 2:
            return
        if self.processor is None:
            self.processor = _processor(self._allowed)
        taken = self._taken()
        best = min(taken, key=taken.__getitem__, default=self.processor)
        ours = taken.get(self.processor, 0.0)
        self._crowded = self._crowded + 1 if ours > BUSY and taken[best] < ours - BETTER else 0
        if self._crowded >= LOOKS + os.getpid() % 2:  # two processes on one processor shall not move in step
            log.debug("processor_changed", before=self.processor, after=best, taken=round(ours, 2))
            self.processor, self._crowded = best, 0
        self._place({self.processor})

    def release(self) -> None:
        """Let all threads run anywhere again. Called where `keep` runs."""
        if self._keeping is not None:
            self._keeping.cancel()
        if self.processor is not None:
            self.processor = None
            self._place(self._allowed)

    def apart(self, function: Callable[..., T], *args: object) -> T:
        """Call a function that computes for long, on the thread that calls this; it may run anywhere meanwhile."""
        own = threading.get_native_id()
        self._apart.add(own)
        try:
            if self.processor is not None:
                _run_on(own, self._allowed)
            return function(*args)
        finally:
            self._apart.discard(own)
            if self.processor is not None:
                _run_on(own, {self.processor})

    def _taken(self) -> dict[int, float]:
        """The share of each processor that others took since the last look; empty at the first one."""
        now, busy = CLOCK.monotonic(), self._busy()
        own = {thread: _spent(thread) for thread in _of_python()}
        before, self._before = self._before, (now, busy, own)
        if before is None or now <= before[0]:
            return {}
        seconds = now - before[0]
        taken = {p: (busy[p] - before[1].get(p, 0.0)) / seconds for p in self._allowed & busy.keys()}
        if self.processor in taken:
            since = sum(spent - before[2].get(thread, 0.0) for thread, spent in own.items())
            taken[self.processor] = max(0.0, taken[self.processor] - since / seconds)
        return taken

    def _place(self, where: Collection[int]) -> None:
        python = _of_python()
        with suppress(OSError):
            for name in os.listdir("/proc/self/task"):
                thread = int(name)
                _run_on(thread, where if thread in python and thread not in self._apart else self._allowed)


def _processor(allowed: Collection[int]) -> int:
    """The processor that we run on now."""
    with suppress(OSError, ValueError, IndexError):
        current = int(_stat("thread-self")[36])
        if current in allowed:
            return current
    return min(allowed)


def _run_on(thread: int, where: Collection[int]) -> None:
    with suppress(OSError):  # it has ended
        os.sched_setaffinity(thread, where)


def _of_python() -> set[int]:
    """The threads that run Python, by the numbers that the system gives them."""
    return {thread.native_id for thread in threading.enumerate() if thread.native_id is not None}


def _spent(thread: int) -> float:
    """Seconds of a processor that a thread of this process has taken."""
    with suppress(OSError, ValueError, IndexError):
        fields = _stat(f"self/task/{thread}")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _stat(thread: str) -> list[str]:
    """What the system tells of a thread, from its state on."""
    return Path(f"/proc/{thread}/stat").read_text().rpartition(")")[2].split()
