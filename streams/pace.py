"""Long work beside threads that must not wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["Pace"]

T = TypeVar("T")

_WORK_SECONDS = 0.001
"""Work between two rests: as long as another thread may have to wait for the interpreter."""
_REST = 2.0
"""Length of a rest, in that of the work before it."""


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
