"""What is on changes only where the evidence stays: switches with hysteresis, and trials of two ways to answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from policies.interfaces import State

_log = logging.getLogger(__name__)


class Switch:
    """Something that is on or off.

    It goes on after `patience` measurements in a row of at least ``limit``, and off after as many below half of it.

    Args:
        name: For the log.
        limit: From which measurement on it should be on.
        patience: Measurements in a row that it takes to change.
    """

    def __init__(self, name: str, limit: float, patience: int) -> None:
        self.name, self._limit, self._patience = name, limit, patience
        self.reset()

    def reset(self) -> None:
        """Off, with no evidence."""
        self.on = False
        self.changes = 0
        self._streak = 0

    def see(self, value: float) -> bool:
        """Take in a measurement; whether it is on now."""
        against = value < self._limit / 2 if self.on else value >= self._limit
        self._streak = self._streak + 1 if against else 0
        if self._streak >= self._patience:
            self.set(not self.on, f"measured {value:.3g}, limit {self._limit:g}")
        return self.on

    def set(self, on: bool, why: str) -> None:
        """Change at once, and say why."""
        self._streak = 0
        if on != self.on:
            self.on = on
            self.changes += 1
            _log.info("adaptation 'auto': %s %s (%s)", self.name, "on" if on else "off", why)

    def state_dict(self) -> dict[str, int]:
        """Whether it is on, how often it changed, and the evidence for a change."""
        return {"on": int(self.on), "changes": self.changes, "streak": self._streak}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over a state."""
        self.on, self.changes, self._streak = bool(state["on"]), int(state["changes"]), int(state["streak"])


class Trials:
    """Whether answering in one way is worse than in another, by what both tell of the same rows.

    The information of answers ``p`` about their rows, ``I = H(mean p) - mean H(p)``, is high where rows are answered
    surely and differently. Of two ways to use the same weights, the one with more of it is the better one far more
    often than not; surety alone would praise a model that puts all rows into a few classes. A trial is ``window`` rows
    answered both ways; trials are averaged, the late ones most. They follow one another while they speak against the
    way in force, and grow rare, up to one window in ``SPARSE``, while they speak for it.

    Args:
        num_classes: ``K``.
        window: Rows of a trial.
        limit: The way in force is worse where it lacks information by more than this share of the other's mean entropy.
        patience: Trials that it takes to say so.
    """

    SPARSE = 16
    SMOOTHING = 0.2

    def __init__(self, num_classes: int, window: int, limit: float, patience: int) -> None:
        self._classes, self._window, self._limit, self._patience = num_classes, window, limit, patience
        self.reset()

    def reset(self) -> None:
        """Forget all trials."""
        self.count = 0
        self._spacing, self._wait, self._rows = 1, 0, 0
        self._sums = torch.zeros(2, self._classes + 1, dtype=torch.float64)
        """Of the rows of the trial under way, in force and otherwise: probabilities, and their entropies."""
        self._means = torch.zeros_like(self._sums)

    def due(self, rows: int) -> bool:
        """Whether to try with this batch of so many rows."""
        self._wait -= rows
        return self._wait <= 0

    @property
    def loss(self) -> float:
        """Information that the way in force lacks, in units of the other's mean entropy; negative where it has more."""
        if not self.count:
            return 0.0
        entropy = self._means[:, -1]
        information = torch.special.entr(self._means[:, :-1]).sum(1) - entropy
        return float((information[1] - information[0]) / entropy[1].clamp_min(1e-9))

    @property
    def worse(self) -> bool:
        """Whether the way in force is worse."""
        return self.count >= self._patience and self.loss > self._limit

    def see(self, ours: Tensor, other: Tensor) -> None:
        """Take in logits ``(n, K)``, all finite, of the same rows: of the way in force, and of the other."""
        for side, logits in enumerate((ours, other)):
            chances = logits.double().softmax(1)
            self._sums[side, :-1] += chances.sum(0).cpu()
            self._sums[side, -1] += float(torch.special.entr(chances).sum())
        self._rows += len(ours)
        if self._rows < self._window:
            return
        self.count += 1
        self._means += max(self.SMOOTHING, 1 / self.count) * (self._sums / self._rows - self._means)
        self._spacing = 1 if self.loss > self._limit else min(2 * self._spacing, self.SPARSE)
        self._wait = (self._spacing - 1) * self._window + 1
        self._sums.zero_()
        self._rows = 0

    def state_dict(self) -> State:
        """All numbers."""
        counts = [self.count, self._spacing, self._wait, self._rows]
        return {"counts": counts, "sums": self._sums, "means": self._means}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self.count, self._spacing, self._wait, self._rows = map(int, state["counts"])
        self._sums.copy_(state["sums"])
        self._means.copy_(state["means"])


class Calm:
    """Watches a stream that needs no adapting, by the entropy of the answers and by what the first layer sees.

    Adapting is worth another try where inputs have moved, where the entropy of late is more than ``limit`` times the
    usual one, and after ``first`` windows in any case, twice as many each time that trying was in vain, up to
    ``64 * first``.

    Args:
        limit: Rise of the entropy that counts.
        first: Windows until the first try that nothing calls for.
    """

    FAST, SLOW = 0.3, 0.03

    def __init__(self, limit: float, first: int) -> None:
        self._limit, self._first = limit, first
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self._vain = 0
        self.begin()

    def begin(self) -> None:
        """A calm stretch begins."""
        self._windows, self._late, self._usual = 0, 0.0, 0.0

    def over(self, entropy: float, moved: bool) -> bool:
        """Take in the mean entropy of a window, and whether its inputs have moved; whether the calm is over."""
        self._windows += 1
        self._late += max(self.FAST, 1 / self._windows) * (entropy - self._late)
        self._usual += max(self.SLOW, 1 / self._windows) * (entropy - self._usual)
        risen = moved or (self._windows > 3 and self._late > self._limit * self._usual)
        if not risen and self._windows < self._first << min(self._vain, 6):
            return False
        self._vain = 0 if risen else self._vain + 1
        return True

    def state_dict(self) -> dict[str, float]:
        """All numbers."""
        return {"vain": self._vain, "windows": self._windows, "late": self._late, "usual": self._usual}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a state."""
        self._vain, self._windows = int(state["vain"]), int(state["windows"])
        self._late, self._usual = float(state["late"]), float(state["usual"])
