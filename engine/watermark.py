"""The watermark: how far event time has come, told by the records themselves and by no clock.

It follows the newest time seen. A time further ahead than everything may wait (``join.window``) would expire all of it,
so one such record alone does not move it: a clock set wrong somewhere must not cost everybody's labels. Where time has
really moved on, after a weekend without traffic say, every record is that far ahead, and the watermark follows once
`CONFIRMED_BY` of them have come in a row, to the oldest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from policies.interfaces import State

CONFIRMED_BY: Final = 32
"""Rows in a row, all too far ahead, that move the watermark after all."""


class Watermark:
    """Follows the times of rows. The same rows always give the same watermark.

    Before the first rows there is nothing to compare with; it begins at the oldest of them.

    Args:
        window: How far ahead of it a time may move it, in seconds; infinite for any.

    Attributes:
        value: The watermark in seconds; minus infinity before the first row.
        ahead: Rows seen that were too far ahead.
    """

    def __init__(self, window: float) -> None:
        self.value = -math.inf
        self.ahead = 0
        self._window = window
        self._run = 0
        self._oldest = math.inf

    def advance(self, times: Sequence[float]) -> float:
        """Take in the times of rows, in order and in seconds; the watermark after them."""
        newest = max(times)
        if newest <= self.value + self._window:  # mostly none is ahead, and their order is all the same
            self._settle(newest)
            return self.value
        if self.value == -math.inf:
            self.value = min(times)
        for time in times:
            if time <= self.value + self._window:
                self._settle(time)
            else:
                self._ahead(time)
        return self.value

    def _settle(self, time: float) -> None:
        self.value = max(self.value, time)
        self._run, self._oldest = 0, math.inf

    def _ahead(self, time: float) -> None:
        self.ahead += 1
        self._run += 1
        self._oldest = min(self._oldest, time)
        if self._run >= CONFIRMED_BY:
            self._settle(self._oldest)

    def state_dict(self) -> State:
        """The watermark, and the rows ahead of it that came last."""
        oldest = self._oldest if self._run else None
        return {"value": self.value, "ahead": self.ahead, "run": self._run, "oldest": oldest}

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        self.value, self.ahead, self._run = state["value"], state["ahead"], state["run"]
        self._oldest = math.inf if state["oldest"] is None else state["oldest"]
