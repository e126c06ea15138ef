"""What is on changes only where the evidence stays: switches with hysteresis, and trials of two ways to answer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from policies.interfaces import State

_log = logging.getLogger(__name__)


class Part(Protocol):
    """A part of a method with a state of its own."""

    def reset(self) -> None:
        """Forget all."""

    def state_dict(self) -> Any:
        """The state, not copied."""

    def load_state_dict(self, state: Any) -> None:
        """Take over a copy of a state."""


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


class Switches(dict[str, Switch]):
    """Switches by name."""

    def reset(self) -> None:
        """All off, with no evidence."""
        for switch in self.values():
            switch.reset()

    @property
    def changes(self) -> dict[str, int]:
        """How often each has changed."""
        return {name: switch.changes for name, switch in self.items()}

    @changes.setter
    def changes(self, changes: Mapping[str, int]) -> None:
        for name, switch in self.items():
            switch.changes = changes[name]

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The state of each."""
        return {name: switch.state_dict() for name, switch in self.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Take over a state."""
        for name, switch in self.items():
            switch.load_state_dict(state[name])


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

    def worse(self, by: float) -> bool:
        """Whether the way in force lacks more than ``by``; where that is negative, whether it fails to gain as much."""
        return self.count >= self._patience and self.loss > by

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


class Probe:
    """Whether a first step to another way pays, asked before anything is changed.

    The statistics of one window are measured, then ``rows`` rows are answered as ever and, beside that, with those
    statistics as well. A row's information is ``d_i = KL(p_i || mean p)``, whose mean is the information of all answers
    (`Trials`). The differences of both ways, row by row, make Student's paired statistic ``t``. Beyond ``sure`` it
    decides; else the rows count in the next probe too, as long as nothing says that the stream has changed.

    Args:
        rows: Rows of a probe.
        sure: ``t`` from which on it decides; a negative one always speaks for the other way.
        gain: Gain, in units of the mean entropy of answers, that it takes; twice as much where caution is called for.

    Attributes:
        gain: Information gained over the rows that count, in those units.
        promising: Whether the last probe was half sure that the other way pays.
    """

    def __init__(self, rows: int, sure: float, gain: float) -> None:
        self._size, self._sure, self._least = rows, sure, gain
        self.reset()

    def reset(self) -> None:
        """Idle, with no evidence."""
        self.gain, self.promising = 0.0, False
        self.idle, self.measuring, self._passed = True, False, 0
        self._evidence = torch.zeros(4, dtype=torch.float64)
        """Rows, sum of their differences and of the squares, and sum of the entropies of answers."""
        self._ours: list[Tensor] = []
        self._other: list[Tensor] = []

    def begin(self, *, anew: bool = False) -> None:
        """Ask for a window to be measured; ``anew`` forgets the rows of probes that were not sure."""
        if anew:
            self._evidence.zero_()
        self.idle, self.measuring, self._passed = False, True, 0

    def measured(self) -> None:
        """A window was measured; rows may be tried."""
        self.measuring = False

    @property
    def wanted(self) -> int:
        """Rows that are still to be tried."""
        return self._size - sum(map(len, self._ours))

    def choose(self, rows: int) -> slice:
        """Which of the next so many rows to try: every other one, since neighbours are often of one class."""
        first = self._passed % 2
        self._passed += rows
        return slice(first, first + 2 * self.wanted, 2)

    @property
    def trying(self) -> bool:
        """Whether to try rows now."""
        return not self.idle and not self.measuring and self.wanted > 0

    @property
    def done(self) -> bool:
        """Whether it can be decided."""
        return not self.idle and not self.measuring and self.wanted <= 0

    def see(self, ours: Tensor, other: Tensor) -> None:
        """Take in logits ``(n, K)``, all finite, of the same rows: of the way in force, and of the other."""
        self._ours.append(ours.detach().double().softmax(1).cpu())
        self._other.append(other.detach().double().softmax(1).cpu())

    def decide(self, *, caution: bool) -> bool | None:
        """Whether the other way pays; None where nothing is sure. The probe is over."""
        ours, other = torch.cat(self._ours), torch.cat(self._other)
        self._ours, self._other, self.idle = [], [], True
        found = _divergences(other) - _divergences(ours)
        entropies = torch.special.entr(ours).sum()
        self._evidence += torch.stack([torch.tensor(float(len(found))), found.sum(), found.square().sum(), entropies])
        rows, total, squares, entropy = self._evidence.tolist()
        self.gain = total / max(entropy, 1e-9)
        spread = math.sqrt(max(squares / rows - (total / rows) ** 2, 1e-18))
        student = total / rows / spread * math.sqrt(rows)
        self.promising = self._sure / 2 < student < self._sure
        if abs(student) < self._sure:
            return None
        self._evidence.zero_()
        return student >= self._sure and self.gain > (2 * self._least if caution else self._least)

    def state_dict(self) -> State:
        """All numbers, and the answers of the probe under way."""
        counts = [int(self.idle), int(self.measuring), int(self.promising), self._passed]
        answers = {"ours": list(self._ours), "other": list(self._other)}
        return {"counts": counts, "gain": self.gain, "evidence": self._evidence} | answers

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self.idle, self.measuring, self.promising = map(bool, state["counts"][:3])
        self._passed = int(state["counts"][3])
        self.gain = float(state["gain"])
        self._evidence.copy_(state["evidence"])
        self._ours = [part.clone() for part in state["ours"]]
        self._other = [part.clone() for part in state["other"]]


def _divergences(answers: Tensor) -> Tensor:
    """``KL(p_i || mean p)`` of answers ``(n, K)``."""
    mean = answers.mean(0).clamp_min(1e-12)
    return (answers * (answers.clamp_min(1e-12) / mean).log()).sum(1)


class Calm:
    """Watches a stream that needs no adapting, by the entropy of the answers and by what the first layer sees.

    Adapting is worth another probe where inputs have moved, where the entropy of late is more than ``limit`` times the
    usual one, and after ``first`` windows in any case, twice as many each time that it was in vain, up to
    ``64 * first``.

    Args:
        limit: Rise of the entropy that counts.
        first: Windows until the first probe that nothing calls for.

    Attributes:
        risen: Whether the last calm was over for a reason.
    """

    FAST, SLOW = 0.3, 0.03

    def __init__(self, limit: float, first: int) -> None:
        self._limit, self._first = limit, first
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self._vain = 0
        self.risen = False
        self.begin()

    def begin(self, *, soon: bool = False) -> None:
        """A calm stretch begins; ``soon`` where the next probe is wanted as soon as if none had been in vain."""
        self._vain = 0 if soon else self._vain
        self._windows, self._late, self._usual = 0, 0.0, 0.0

    def over(self, entropy: float, moved: bool) -> bool:
        """Take in the mean entropy of a window, and whether its inputs have moved; whether the calm is over."""
        self._windows += 1
        self._late += max(self.FAST, 1 / self._windows) * (entropy - self._late)
        self._usual += max(self.SLOW, 1 / self._windows) * (entropy - self._usual)
        self.risen = risen = moved or (self._windows > 3 and self._late > self._limit * self._usual)
        if not risen and self._windows < self._first << min(self._vain, 6):
            return False
        self._vain = 0 if risen else self._vain + 1
        return True

    def state_dict(self) -> dict[str, float]:
        """All numbers."""
        return {
            "vain": self._vain,
            "risen": int(self.risen),
            "windows": self._windows,
            "late": self._late,
            "usual": self._usual,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a state."""
        self._vain, self._windows = int(state["vain"]), int(state["windows"])
        self.risen = bool(state["risen"])
        self._late, self._usual = float(state["late"]), float(state["usual"])
