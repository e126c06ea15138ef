"""Gathers why streams cannot be used, so that all of it is told at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from streams.base import RefusedStreamError


class Refusals:
    """Refusals met one after another.

    ```
    refusals = Refusals()
    for sink in sinks:
        with refusals.gather():
            sink.open()
    refusals.tell()
    ```
    """

    def __init__(self) -> None:
        self._found: list[RefusedStreamError] = []

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep the refusal of a stream for `tell`. What would meet the next stream as well is raised as ever."""
        try:
            yield
        except RefusedStreamError as error:
            self._found.append(error)

    def tell(self) -> None:
        """Raise what was gathered, if anything was.

        Raises:
            RefusedStreamError: With every sentence, once.
        """
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise RefusedStreamError("; ".join(dict.fromkeys(map(str, self._found)))) from self._found[0]
