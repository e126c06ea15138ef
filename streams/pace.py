"""Long work beside threads that must not wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Hurry", "Pace"]

T = TypeVar("T")

_WORK_SECONDS = 0.001
"""Work between two rests: as long as another thread may have to wait for the interpreter."""
_REST = 2.0
"""Length of a rest, in that of the work before it."""


class Hurry:
    """Whether anybody waits for long work, which rests no more then. Changed by one thread alone."""

    def __init__(self) -> None:
        self._waiting = 0
        self._some = threading.Event()

    def pause(self, seconds: float) -> bool:
        """Wait so many seconds, at most until somebody waits for the work; whether somebody does."""
        return self._some.wait(seconds)

    @contextmanager
    def while_waiting(self) -> Iterator[None]:
        """Have no rests made inside."""
        self.begin()
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._some.clear()

    def begin(self) -> None:
        """Have no rests made from now on."""
        self._waiting += 1
        self._some.set()


class Pace:
    """Rests between pieces of work, so that it takes a third of a processor, and the interpreter not for long.

    A thread that computes gives the interpreter away only every few milliseconds, and another one that calls into
    tensors or files asks for it many times a batch.

    Args:
        pause: Waits so many seconds, or less where there is a hurry; without it nothing rests.
    """

    def __init__(self, pause: Callable[[float], object] | None) -> None:
        self._pause = pause
        self._since = time.thread_time()

    def rest(self) -> None:
        """Rest, if there was work enough since the last time. Called on the thread that works."""
        if self._pause is None:
            return
        worked = time.thread_time() - self._since
        if worked >= _WORK_SECONDS:
            self._pause(_REST * worked)
            self._since = time.thread_time()

    def over(self, parts: Iterable[T], each: int = 1) -> Iterator[T]:
        """Yield parts of the work, with a rest where it is time for one after every so many of them."""
        for number, part in enumerate(parts, 1):
            yield part
            if not number % each:
                self.rest()
