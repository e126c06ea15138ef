"""From where the records of a partition make up what waits for feedback: its floor.

Whoever is given a partition reads it from its floor on, and what lies before the committed position makes up what
waited at its former owner. A floor is found from marks, each a first offset with the newest time of the records from
there to the next mark. Marks are a function of what was applied, so they are the same after a restart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from streams.base import Partition, Positions
from streams.journal import Kind

STEPS = 256
"""Marks that a window is divided into."""

_SPANS = {Kind.DATA: 1, Kind.FEEDBACK: 2}
"""Windows that are kept. Feedback may be older than its event by a window, and settles it all the same."""


class Floors:
    """The marks of all partitions. Used by the thread that owns the model.

    A mark ``(first, opened)`` says that the records from ``first`` to the next mark are of times before
    ``opened + step``, so a partition has some hundred of them at most, however fast it is.

    Args:
        kinds: What each stream carries.
        window: How long an event waits for its feedback, seconds; None where nothing ever waits.
    """

    def __init__(self, kinds: Mapping[str, Kind], window: float | None) -> None:
        self._kinds = dict(kinds)
        self._window = window
        self._step = (window or 0.0) / STEPS
        self._marks: dict[Partition, deque[tuple[int, float]]] = {}

    def resize(self, window: float) -> None:
        """Keep marks for another window from now on; those that a smaller one let go do not come back."""
        if self._window is not None:
            self._window, self._step = window, max(self._step, window / STEPS)

    @property
    def kept(self) -> bool:
        """Whether anything is to be noted at all."""
        return self._window is not None

    def carries(self, stream: str) -> Kind | None:
        """What a stream carries."""
        return self._kinds.get(stream)

    def mark(self, partition: Partition, first: int, newest: float, watermark: float) -> None:
        """Note records that were applied.

        Args:
            partition: Where they are from.
            first: Offset of the first of them.
            newest: The newest time among them, seconds.
            watermark: The watermark behind them; a time beyond it counts as this.
        """
        assert self._window is not None
        time = min(newest, watermark)
        marks = self._marks.setdefault(partition, deque())
        if not marks or time >= marks[-1][1] + self._step:
            marks.append((first, time))
        limit = watermark - _SPANS[self._kinds[partition[0]]] * self._window
        while marks and marks[0][1] + self._step < limit:
            marks.popleft()

    def of(self, positions: Mapping[Partition, int], *, waiting: bool) -> Positions:
        """Return the floors of partitions at these positions.

        Args:
            positions: Behind what was applied.
            waiting: Whether anything waits at all. If not, no event needs to be made again; feedback is all the same,
                because the floor of its events may have been noted before.
        """
        if self._window is None:
            return dict(positions)
        kept = {p: marks for p in positions if (marks := self._marks.get(p)) and (waiting or self._is_feedback(p))}
        return {p: kept[p][0][0] if p in kept else at for p, at in positions.items()}

    def _is_feedback(self, partition: Partition) -> bool:
        return self._kinds[partition[0]] is Kind.FEEDBACK

    def forget(self, partitions: Iterable[Partition]) -> None:
        """Forget partitions that somebody else reads now."""
        for partition in partitions:
            self._marks.pop(partition, None)

    def state_dict(self) -> list[list[Any]]:
        """The marks as JSON values: per partition stream, number, first offsets, times."""
        return [
            [*partition, [first for first, _ in marks], [opened.hex() for _, opened in marks]]
            for partition, marks in sorted(self._marks.items())
        ]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Take over what `state_dict` gave."""
        self._marks = {
            (stream, number): deque(zip(firsts, map(float.fromhex, times), strict=True))
            for stream, number, firsts, times in state
        }
