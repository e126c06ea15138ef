"""Which processor threads run on: those that run Python share one, since they take turns at the interpreter anyway.

Where they run on several, each turn wakes another processor up, and what a thread hands to the next one has to move
from cache to cache: the same work took three tenths more processor time, and a quarter fewer records came through
(docs/throughput.md). Threads that run no Python, of PyTorch and of librdkafka, are free to run anywhere.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from itertools import islice
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
"""Looks in a row that must find it so; by chance one more, so that two processes do not move in step for ever."""

T = TypeVar("T")

log = structlog.get_logger("adaptd")


def busy_seconds() -> dict[int, float]:
    """Seconds that each processor has not been idle since the machine started; empty where that is not told."""
    found = {}
    with suppress(OSError, ValueError, IndexError), Path("/proc/stat").open() as file:
        tick = os.sysconf("SC_CLK_TCK")
        for line in islice(file, 1, None):
            if not line.startswith("cpu"):
                break
            name, *values = line.split()
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
        able = wanted and hasattr(os, "sched_setaffinity") and Path("/proc/self/task").is_dir()
        self._allowed = os.sched_getaffinity(0) if able else set[int]()
        self._busy = busy
        self._apart: set[int] = set()
        self._before: tuple[float, Mapping[int, float], Mapping[int, float]] | None = None
        self._crowded, self._patience = 0, LOOKS
        self._keeping: anyio.CancelScope | None = None
        self.processor: int | None = None

    async def keep(self) -> None:
        """Look now and each second, until `release`."""
        with anyio.CancelScope() as self._keeping:
            # Released in the moment in which the sleep ended, it is not interrupted there.
            while len(self._allowed) > 1 and not self._keeping.cancel_called:
                self.look()
                await anyio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        """Choose a processor, and put all threads in their place, also those that are new."""
        if len(self._allowed) < 2:
            return
        before = self.processor = _processor(self._allowed) if self.processor is None else self.processor
        self._choose(self.processor)
        self._place(self.processor, before)
        if threading.get_native_id() not in self._apart and os.sched_getaffinity(0) != {self.processor}:
            log.warning("processor_refused", processor=self.processor)
            self.release()
            self._allowed = set()

    def _choose(self, own: int) -> None:
        """Move on where others have taken our processor for some looks, and another one is less taken."""
        taken = self._taken()
        best = min(taken, key=taken.__getitem__, default=own)
        ours = taken.get(own, 0.0)
        self._crowded = self._crowded + 1 if ours > BUSY and taken[best] < ours - BETTER else 0
        if self._crowded >= self._patience:
            log.debug("processor_changed", before=own, after=best, taken=round(ours, 2))
            self.processor, self._crowded, self._patience = best, 0, LOOKS + os.urandom(1)[0] % 2

    def release(self) -> None:
        """Let all threads run anywhere again. Called where `keep` runs."""
        if self._keeping is not None:
            self._keeping.cancel()
        before, self.processor = self.processor, None
        self._place(None, before)

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
            where = self.processor
            if where is not None:
                _run_on(own, {where})
                if self.processor is None:  # released meanwhile
                    _run_on(own, self._allowed)

    def _taken(self) -> dict[int, float]:
        """The share of each processor that others took since the last look; empty at the first one."""
        now, busy = CLOCK.monotonic(), self._busy()
        own = {thread: _spent(thread) for thread in _of_python() - self._apart}
        before, self._before = self._before, (now, busy, own)
        if before is None or now <= before[0]:
            return {}
        seconds = now - before[0]
        taken = {p: (busy[p] - before[1].get(p, 0.0)) / seconds for p in self._allowed & busy.keys()}
        if self.processor in taken:
            since = sum(spent - before[2][thread] for thread, spent in own.items() if thread in before[2])
            taken[self.processor] = max(0.0, taken[self.processor] - since / seconds)
        return taken

    def _place(self, where: int | None, before: int | None) -> None:
        """Put threads of Python on a processor, or let them go; others that have inherited their place are let go."""
        if before is None:
            return
        here = self._allowed if where is None else {where}
        python = _of_python() - self._apart
        with suppress(OSError):
            for thread in map(int, os.listdir("/proc/self/task")):
                if thread in python:
                    _run_on(thread, here)
                elif _place_of(thread) in ({before}, {where}):
                    _run_on(thread, self._allowed)


def _processor(allowed: Collection[int]) -> int:
    """The processor that we run on now."""
    with suppress(OSError, ValueError, IndexError):
        current = int(_stat("thread-self")[36])
        if current in allowed:
            return current
    return min(allowed)


def _place_of(thread: int) -> set[int]:
    with suppress(OSError):  # it has ended
        return os.sched_getaffinity(thread)
    return set()


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
