"""How far what a restart would read lies from what its stream has already deleted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import structlog

from streams.base import Partition, Positions, Source

log = structlog.get_logger("adaptd")

LOOK_SECONDS: Final = 30.0
"""Time between two looks; each asks the other side."""
WINDOW_SECONDS: Final = 3600.0
"""Time over which is counted how much retention takes."""


class Margin(NamedTuple):
    """Of one partition."""

    records: int
    """Offsets between the first one that is still there and the one from which a restart would read on.

    That is where the newest checkpoint ends; for a partition that came since, where reading it began.
    """
    seconds: float
    """How long retention needs to get there if it goes on as in the last hour; NaN where it took nothing or a restart
    would find nothing to read."""

    @property
    def near(self) -> bool:
        """Whether retention, taking as much in the next hour as in the last, would take what a restart reads."""
        return self.seconds < WINDOW_SECONDS


class Retention:
    """The margins of one source, used by the thread that polls it; `margins` is read by others.

    Attributes:
        margins: As they were when they were looked at last.
        covered: Gives the positions in the newest checkpoint.
    """

    def __init__(self, source: Source) -> None:
        self.margins: dict[Partition, Margin] = {}
        self.covered: Callable[[], Positions] = dict
        self._source = source
        self._first: Positions = {}
        self._next = 0.0
        self._seen: dict[Partition, deque[tuple[float, int]]] = {}

    def look(self, now: float, lag: Mapping[Partition, int]) -> None:
        """Measure the margins if that is due, and warn where one has become small.

        Args:
            now: Seconds by the monotonic clock.
            lag: Records that wait in each partition.
        """
        if now < self._next or self._source.trouble:
            return
        self._next = now + LOOK_SECONDS
        committed, covered = self._source.committed(), self.covered()
        for partition, begin in self._source.beginnings().items():
            reached = self._source.position(partition)
            if reached is not None:
                out = min(reached, committed.get(partition, reached))
                at = min(out, covered.get(partition, self._first.setdefault(partition, out)))
                waits = reached - at + lag.get(partition, 0)
                self._set(partition, self._margin(partition, now, begin, at, waits=waits > 0))

    def forget(self, partition: Partition) -> None:
        """Hear that a partition is somebody else's."""
        self.margins.pop(partition, None)
        self._first.pop(partition, None)
        self._seen.pop(partition, None)

    def _margin(self, partition: Partition, now: float, begin: int, at: int, *, waits: bool) -> Margin:
        seen = self._seen.setdefault(partition, deque())
        seen.append((now, begin))
        while seen[0][0] < now - WINDOW_SECONDS:
            seen.popleft()
        taken, left = begin - seen[0][1], max(0, at - begin)
        return Margin(left, left * WINDOW_SECONDS / taken if waits and taken > 0 else math.nan)

    def _set(self, partition: Partition, margin: Margin) -> None:
        before = self.margins.get(partition)
        self.margins[partition] = margin
        if margin.near and not (before is not None and before.near):
            log.warning(
                "retention_near",
                partition=f"{partition[0]}-{partition[1]}",
                records=margin.records,
                seconds=round(margin.seconds),
                advice="keep records longer, or look for what holds reading up",
            )
