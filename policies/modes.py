"""What is on changes only where the evidence stays: switches with hysteresis, and trials of two ways to answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping

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
    """Whether answering in one way is worse than in another, by the entropy of both on the same rows.

    Of two ways to use the same weights, the one whose answers are surer is the better one far more often than not;
    averages of late trials are compared. Trials are dense while they speak against the way that is in force, and grow
    rare, up to every ``SPARSE``-th batch, while they speak for it.

    Args:
        limit: The way in force is worse where its entropy is more than this times the other's.
        patience: Trials that it takes to say so.
    """

    SPARSE = 16
    SMOOTHING = 0.3

    def __init__(self, limit: float, patience: int) -> None:
        self._limit, self._patience = limit, patience
        self.reset()

    def reset(self) -> None:
        """Forget all trials."""
        self.count = 0
        self._spacing = self._wait = 1
        self._ours = self._other = 0.0

    def due(self) -> bool:
        """Whether to try with this batch."""
        self._wait -= 1
        return self._wait <= 0

    @property
    def ratio(self) -> float:
        """Entropy of the way in force in units of the other's; 1 without trials."""
        return self._ours / self._other if self._other > 0 else 1.0

    @property
    def worse(self) -> bool:
        """Whether the way in force is worse."""
        return self.count >= self._patience and self.ratio > self._limit

    def see(self, ours: float, other: float) -> None:
        """Take in a trial: mean entropies of the way in force and of the other."""
        self.count += 1
        share = max(self.SMOOTHING, 1 / self.count)
        self._ours += share * (ours - self._ours)
        self._other += share * (other - self._other)
        self._spacing = 1 if self.ratio > self._limit else min(2 * self._spacing, self.SPARSE)
        self._wait = self._spacing

    def state_dict(self) -> dict[str, float]:
        """All numbers."""
        return {"count": self.count, "spacing": self._spacing, "wait": self._wait} | {
            "ours": self._ours,
            "other": self._other,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a state."""
        self.count, self._spacing, self._wait = int(state["count"]), int(state["spacing"]), int(state["wait"])
        self._ours, self._other = float(state["ours"]), float(state["other"])


class Calm:
    """Watches a stream that needs no adapting, by the entropy of the answers alone.

    Adapting is worth another try where the entropy of late is more than ``limit`` times the usual one, and after
    ``first`` windows in any case, twice as many each time that trying was in vain, up to ``64 * first``.

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

    def over(self, entropy: float) -> bool:
        """Take in the mean entropy of a window; whether the calm is over."""
        self._windows += 1
        self._late += max(self.FAST, 1 / self._windows) * (entropy - self._late)
        self._usual += max(self.SLOW, 1 / self._windows) * (entropy - self._usual)
        risen = self._windows > 3 and self._late > self._limit * self._usual
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
