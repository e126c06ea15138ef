"""Ends a process that stands still, so that whoever runs it starts another; what it hangs on is written down first."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

LOOK_SECONDS = 5.0
LOOKS = 48
"""Looks in a row that must find no life before the process is ended: four minutes.

Counted, not timed: a process that was stopped and goes on is given all of them once more.
"""
EXIT_CODE = 70

log = structlog.get_logger("adaptd")


class Watchdog:
    """Looks from a thread of its own whether there is life, for as long as the block lasts.

    It sees whatever stands still in Python or in calls that let other threads run. A library that keeps the
    interpreter's lock for ever stops the watchdog too; then ``/livez`` does not answer any more.

    Args:
        alive: Whether there is life, and what stands still where there is none; called on the watchdog's thread.
        end: What ends the process.
    """

    def __init__(self, alive: Callable[[], tuple[bool, str]], end: Callable[[str], object] | None = None) -> None:
        self._alive = alive
        self._end = end or _end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        lifeless = 0
        while not self._over.wait(LOOK_SECONDS):
            good, why = self._alive()
            lifeless = 0 if good else lifeless + 1
            if lifeless >= LOOKS:
                self._end(why)
                return


def _end(why: str) -> None:
    """Write the stacks of all threads to standard error and leave at once; nobody can be waited for."""
    log.critical("stuck", why=why, exit_code=EXIT_CODE)
    sys.stderr.flush()
    faulthandler.dump_traceback(sys.stderr.fileno(), all_threads=True)
    os._exit(EXIT_CODE)
