"""Flips between two models' answers, and how sure a sample of them makes us.

A flip is negative where the old model was right and the new one is wrong, positive the other way round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

UNKNOWN = -1
"""Stands for no answer among the classes of an `AuditWindow`."""
BISECTIONS = 60
"""Halvings of [0, 1] for a confidence bound: below the resolution of a double."""


@dataclass(frozen=True, slots=True)
class FlipCounts:
    """The four outcomes of paired predictions.

    Reference: Yan et al., "Positive-congruent training: towards regression-free model updates" (CVPR 2021); backward
    trust and error compatibility as in Srivastava et al., "An empirical analysis of backward compatibility in machine
    learning systems" (KDD 2020).

    Attributes:
        both_right: Rows on which both are right.
        negative: Rows on which the old is right and the new is wrong.
        positive: Rows on which the old is wrong and the new is right.
        both_wrong: Rows on which both are wrong.
    """

    both_right: int
    negative: int
    positive: int
    both_wrong: int

    @property
    def rows(self) -> int:
        """All rows, ``N``."""
        return self.both_right + self.negative + self.positive + self.both_wrong

    @property
    def nfr(self) -> float:
        """Negative flip rate: negative flips over all rows."""
        return _ratio(self.negative, self.rows)

    @property
    def pfr(self) -> float:
        """Positive flip rate: positive flips over all rows. Errors of new less old are ``nfr - pfr``."""
        return _ratio(self.positive, self.rows)

    @property
    def nfi(self) -> float:
        """Negative flip impact: the share of the new model's errors that are negative flips."""
        return _ratio(self.negative, self.negative + self.both_wrong)

    @property
    def relative_nfr(self) -> float:
        """NFR over what independent errors would give; below 1 is better than independent."""
        wrong = _ratio(self.negative + self.both_wrong, self.rows)
        return _ratio(self.nfr, self.old_accuracy * wrong)

    @property
    def btc(self) -> float:
        """Backward trust compatibility: the share of what the old model got right that the new one does too."""
        return _ratio(self.both_right, self.both_right + self.negative)

    @property
    def bec(self) -> float:
        """Backward error compatibility: the share of the new model's errors that the old one made too."""
        return _ratio(self.both_wrong, self.negative + self.both_wrong)

    @property
    def old_accuracy(self) -> float:
        """Accuracy of the old model."""
        return _ratio(self.both_right + self.negative, self.rows)

    @property
    def new_accuracy(self) -> float:
        """Accuracy of the new model."""
        return _ratio(self.both_right + self.positive, self.rows)


def count_flips(old: Tensor, new: Tensor, labels: Tensor) -> FlipCounts:
    """Count the outcomes of paired predictions; ``old``, ``new``, ``labels`` are classes ``(N,)``."""
    before, after = old == labels, new == labels
    right, negative = int((before & after).sum()), int((before & ~after).sum())
    positive = int((~before & after).sum())
    return FlipCounts(right, negative, positive, len(labels) - right - negative - positive)


def rate_upper_bound(count: int, rows: int, confidence: float = 0.95) -> float:
    """The Clopper-Pearson upper bound of a rate: the largest one under which so few are not yet surprising.

    It solves ``P[Bin(rows, u) <= count] = 1 - confidence`` for ``u`` by bisection on the exact tail.

    Args:
        count: How many of the rows had it, in [0, rows].
        rows: How many rows were seen.
        confidence: One-sided, in (0, 1).

    Returns:
        The bound; 1 where nothing can be said.
    """
    if count >= rows:
        return 1.0
    low, high = count / rows, 1.0
    tail = _log_choose(rows, count)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(tail, rows, middle) > 1 - confidence else (low, middle)
    return high


def rows_needed(budget: float, confidence: float = 0.95) -> int:
    """The least rows on which no flip at all keeps the upper bound within ``budget``, in (0, 1)."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-budget))


def accuracy_gain_lower_bound(flips: FlipCounts, z: float = 1.645) -> float:
    """The lower confidence bound of new accuracy less old, from the normal approximation for paired rows.

    Args:
        flips: At least one row.
        z: Standard errors below the estimate; 1.645 is one-sided 95 %.
    """
    gain = flips.positive - flips.negative
    variance = (flips.positive + flips.negative) - gain * gain / flips.rows
    return (gain - z * math.sqrt(max(variance, 0.0))) / flips.rows


def worse_e_value(flips: FlipCounts) -> float:
    """Evidence that the new model is worse, as an e-value: at least ``1 / a`` has a chance of at most ``a`` if not.

    Given that a row flips at all, the hypothesis is that at most half of the flips are negative. With ``b`` negative
    and ``c`` positive flips and a uniform prior on (1/2, 1]:

        E = 2^(b+c+1) B(b+1, c+1) P[Bin(b+c+1, 1/2) <= b]
    """
    b, c = flips.negative, flips.positive
    whole = b + c + 1
    beta = math.lgamma(b + 1) + math.lgamma(c + 1) - math.lgamma(whole + 1)
    tail = _at_most(_log_choose(whole, b), whole, 0.5)
    return math.exp(min(whole * math.log(2) + beta + math.log(tail), 700.0)) if tail > 0 else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _log_choose(rows: int, upto: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Logarithms of the binomial coefficients of ``rows`` over 0 to ``upto``."""
    steps = np.arange(1, upto + 1, dtype=np.float64)
    return np.concatenate([np.zeros(1), np.cumsum(np.log((rows - steps + 1) / steps))])


def _at_most(coefficients: np.ndarray[tuple[int], np.dtype[np.float64]], rows: int, rate: float) -> float:
    """``P[Bin(rows, rate) <= k]`` for ``k + 1`` coefficients and a rate in (0, 1)."""
    if rate >= 1.0:
        return 0.0
    if rate <= 0.0:
        return 1.0
    counts = np.arange(len(coefficients))
    logs = coefficients + counts * math.log(rate) + (rows - counts) * math.log1p(-rate)
    top = float(logs.max())
    return min(1.0, math.exp(top) * float(np.exp(logs - top).sum()))
