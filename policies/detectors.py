"""What a stream of answers tells without labels: measures of a window, and detectors of change of one series.

All are deterministic, bounded in memory, and give their state as plain values.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.interfaces import State


def effective_classes(probabilities: Tensor) -> float:
    """``exp(H(mean_i p_i))`` of probabilities ``(n, K)``, in [1, K]: among how many classes the rows spread."""
    return float(torch.special.entr(probabilities.double().mean(0)).sum().exp())


def entropy_ratio(probabilities: Tensor) -> float:
    """Mean entropy of the rows ``(n, K)`` in units of ``ln K``, in [0, 1]; 0 for one class."""
    classes = probabilities.shape[1]
    entropy = float(torch.special.entr(probabilities.double()).sum(1).mean())
    return entropy / math.log(classes) if classes > 1 else 0.0


def autocorrelation(classes: Tensor, frequencies: Tensor) -> float:
    """``P(c_t = c_{t-1}) - sum_k pi_k^2`` of classes ``(n,)`` in the order of arrival.

    Args:
        classes: Int64, at least two rows for anything but 0.
        frequencies: Long-run frequencies ``pi (K,)``.

    Returns:
        0 for classes that come independently, up to ``1 - sum_k pi_k^2`` for sorted ones.
    """
    if len(classes) < 2:
        return 0.0
    return float((classes[1:] == classes[:-1]).double().mean() - frequencies.double().square().sum())


def simpson_excess(classes: Tensor, frequencies: Tensor) -> float:
    """How much likelier two rows of a window share a class than two rows of the stream do.

    ``sum_k n_k (n_k - 1) / (n (n - 1)) - sum_k pi_k^2``: Simpson's unbiased index over its expectation for rows that
    come independently, whatever their order within the window.

    Args:
        classes: ``(n,)`` int64; 0 is given for fewer than two.
        frequencies: Long-run frequencies ``pi (K,)``.
    """
    rows = len(classes)
    if rows < 2:
        return 0.0
    counts = torch.bincount(classes, minlength=len(frequencies)).double()
    alike = float((counts * (counts - 1)).sum()) / (rows * (rows - 1))
    return alike - float(frequencies.double().square().sum())


def neighbour_distances(rows: Tensor, classes: Tensor) -> tuple[float, float]:
    """How far rows of one class lie apart that follow one another, and how far any two rows of it do.

    Args:
        rows: ``(n, D)`` in the order of arrival; each of the ``D`` values counts in units of its own deviation.
        classes: ``(n,)`` int64.

    Returns:
        Sums over the pairs that follow one another of their squared distance, and of the mean squared distance in their
        class. For rows that are independent given their class both have the same expectation.
    """
    rows = rows.double() - rows.double().mean(0)
    rows = rows / rows.square().mean(0).sqrt().clamp_min(1e-9)
    same = (classes[1:] == classes[:-1]).nonzero().flatten()
    if not len(same):
        return 0.0, 0.0
    counts = torch.bincount(classes).double()
    sums = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, classes, rows)
    squares = rows.new_zeros(len(counts)).index_add_(0, classes, rows.square().sum(1))
    apart = 2 * (squares - sums.square().sum(1) / counts.clamp_min(1)) / (counts - 1).clamp_min(1)
    near = (rows[same + 1] - rows[same]).square().sum()
    return float(near), float(apart[classes[same]].sum())


def squared_distance(one: Tensor, other: Tensor) -> float:
    """Unbiased estimate of ``sum_k (p_k - r_k)^2`` from counts ``(K,)`` of draws from ``p`` and from ``r``.

    ``|p|^2`` and ``|r|^2`` are estimated from pairs of different draws, so that equal distributions give 0 on average.
    """
    sizes = float(one.sum()), float(other.sum())
    if min(sizes) < 2:
        return 0.0
    alike = sum(float((c * (c - 1)).sum()) / (n * (n - 1)) for c, n in zip((one, other), sizes, strict=True))
    return alike - 2 * float(one @ other) / (sizes[0] * sizes[1])


def disagreement(one: Tensor, other: Tensor) -> float:
    """Share of rows that two models put in different classes, of logits or probabilities ``(n, K)``."""
    return float((one.argmax(1) != other.argmax(1)).double().mean()) if len(one) else 0.0


class FeatureShift:
    """How far the features of late have moved from those at the start.

    ``mean_j |m_j - m0_j| / s0_j``, and ``mean_j |ln(s_j / s0_j)|``, with mean and deviation of the first
    ``reference`` rows (Welford) and decayed ones of the rows since. The larger of both is the distance.

    Args:
        width: Number of features.
        reference: Rows that make the reference.
        memory: Rows over which the late moments are averaged.
    """

    def __init__(self, width: int, *, reference: int = 256, memory: int = 256) -> None:
        self._reference, self._memory = reference, memory
        self._values = torch.zeros(4, width, dtype=torch.float64)
        """Reference mean and sum of squared deviations; late mean and mean square about the reference mean."""
        self._rows = 0

    def add(self, features: Tensor) -> None:
        """Take in features ``(n, width)``; rows that are not finite are left out."""
        rows = features.detach().double().cpu()
        rows = rows[rows.isfinite().all(1)]
        count = len(rows)
        if not count:
            return
        mean, squares, late, late_square = self._values
        if self._rows < self._reference:
            middle = rows.mean(0)
            step, total = middle - mean, self._rows + count
            squares += (rows - middle).square().sum(0) + step.square() * (self._rows * count / total)
            mean += step * (count / total)
        else:
            share = count / (count + self._memory) if self._rows > self._reference + count else 1.0
            late += share * ((rows - mean).mean(0) - late)
            late_square += share * ((rows - mean).square().mean(0) - late_square)
        self._rows += count

    def distance(self) -> float:
        """The distance; 0 while there is no reference, or nothing since."""
        _, squares, late, late_square = self._values
        spread = (squares / max(self._rows if self._rows < self._reference else self._reference, 1)).sqrt()
        if not bool(late_square.any()):
            return 0.0
        used = spread > 0
        if not bool(used.any()):
            return 0.0
        moved = late[used].abs() / spread[used]
        width = (late_square - late.square())[used].clamp_min(1e-12).sqrt() / spread[used]
        return max(float(moved.mean()), float(width.log().abs().mean()))

    def state_dict(self) -> State:
        """Moments and rows."""
        return {"values": self._values, "rows": self._rows}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state of the same width."""
        self._values.copy_(state["values"])
        self._rows = int(state["rows"])


@dataclass(slots=True)
class PageHinkley:
    """Page's cumulative test for a rise of the mean, in Hinkley's form (Page 1954; Hinkley 1971).

    ``m_t = m_{t-1} + x_t - mean_t - tolerance``; alarm where ``m_t - min m > threshold``, after which it starts anew.

    Attributes:
        tolerance: Rise that does not count.
        threshold: Sum of rises at which the alarm goes.
        alarms: How often it went.
    """

    tolerance: float = 0.05
    threshold: float = 1.0
    alarms: int = 0
    count: int = 0
    mean: float = 0.0
    total: float = 0.0
    least: float = 0.0

    def add(self, value: float) -> bool:
        """Take in a value; whether the alarm went."""
        self.count += 1
        self.mean += (value - self.mean) / self.count
        self.total += value - self.mean - self.tolerance
        self.least = min(self.least, self.total)
        if self.total - self.least <= self.threshold:
            return False
        self.alarms += 1
        self.count, self.mean, self.total, self.least = 0, 0.0, 0.0, 0.0
        return True

    def state_dict(self) -> State:
        """All numbers."""
        return {name: getattr(self, name) for name in ("alarms", "count", "mean", "total", "least")}

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        for name, value in state.items():
            setattr(self, name, value)


class Adwin:
    """A window that forgets its older part when its mean differs from the newer part's (Bifet and Gavalda, 2007).

    Values are kept in buckets of ``2^i``, at most five a size. The window is cut where two parts of ``n0`` and ``n1``
    values differ by more than ``sqrt(2 v d / m) + 2 d / (3 m)``, with ``1 / m = 1 / n0 + 1 / n1``, ``v`` the variance
    of the whole and ``d = ln(2 ln(n) / delta)``.

    Args:
        delta: Confidence; the smaller, the fewer false alarms.
    """

    SIZE = 5
    LEVELS = 24

    def __init__(self, delta: float = 0.002) -> None:
        self._delta = delta
        self.alarms = 0
        self._levels: list[list[tuple[float, float]]] = [[]]
        """By size, newest last: sum, and sum of squared deviations, of each bucket."""

    def add(self, value: float) -> bool:
        """Take in a value; whether the window was cut."""
        self._levels[0].append((value, 0.0))
        for level in range(self.LEVELS):
            if len(self._levels[level]) <= self.SIZE:
                break
            if level + 1 == len(self._levels):
                self._levels.append([])
            one, two = self._levels[level][:2]
            del self._levels[level][:2]
            size = 2**level
            gap = one[0] / size - two[0] / size
            self._levels[level + 1].append((one[0] + two[0], one[1] + two[1] + gap * gap * size / 2))
        cut = False
        while self._cut():
            cut = True
        self.alarms += cut
        return cut

    def __len__(self) -> int:
        return sum(len(buckets) << level for level, buckets in enumerate(self._levels))

    def mean(self) -> float:
        """Mean of the window; 0 of an empty one."""
        return sum(bucket[0] for buckets in self._levels for bucket in buckets) / max(len(self), 1)

    def _cut(self) -> bool:
        """Drop the oldest bucket if anywhere the window's two parts differ."""
        count, mean = len(self), self.mean()
        if count < 10:
            return False
        buckets = [(s, q, 1 << i) for i, row in reversed(list(enumerate(self._levels))) for s, q in row]
        variance = sum(q + n * (s / n - mean) ** 2 for s, q, n in buckets) / count
        log = math.log(2 * math.log(count) / self._delta)
        old, rows = 0.0, 0
        for total, _, size in buckets[:-1]:
            old, rows = old + total, rows + size
            if min(rows, count - rows) < self.SIZE:
                continue
            harmonic = 1 / rows + 1 / (count - rows)
            bound = math.sqrt(2 * variance * log * harmonic) + 2 / 3 * log * harmonic
            if abs(old / rows - (mean * count - old) / (count - rows)) > bound:
                self._drop()
                return True
        return False

    def _drop(self) -> None:
        oldest = max(level for level, buckets in enumerate(self._levels) if buckets)
        del self._levels[oldest][0]

    def state_dict(self) -> State:
        """Buckets and alarms; of one size whatever came."""
        held = torch.zeros(self.LEVELS + 1, self.SIZE, 2, dtype=torch.float64)
        for level, buckets in enumerate(self._levels):
            held[level, : len(buckets)] = torch.tensor(buckets, dtype=torch.float64).reshape(-1, 2)
        counts = torch.zeros(self.LEVELS + 1, dtype=torch.int64)
        counts[: len(self._levels)] = torch.tensor(list(map(len, self._levels)))
        return {"buckets": held, "counts": counts, "levels": len(self._levels), "alarms": self.alarms}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        counts, held = state["counts"].tolist(), state["buckets"].tolist()
        self._levels = [[(s, q) for s, q in held[i][: counts[i]]] for i in range(int(state["levels"]))]
        self.alarms = int(state["alarms"])


class Kswin:
    """Kolmogorov and Smirnov's two-sample test of the newest values against those before (Raab et al., 2020).

    Over a window of ``window`` values: alarm where the largest distance of the two empirical distributions exceeds
    ``sqrt(-ln(alpha / 2) (1 / n + 1 / m) / 2)`` for the newest ``n`` and the ``m`` others; only the newest stay then.

    Deviation: the others are all of the rest of the window, where the original draws a sample of them.

    Args:
        alpha: Probability of a false alarm of one test.
        window: Values kept.
        newest: Of these, how many are the newest.
    """

    def __init__(self, alpha: float = 0.001, window: int = 100, newest: int = 30) -> None:
        self._alpha, self._window, self._newest = alpha, window, newest
        self.alarms = 0
        self._values: list[float] = []

    def add(self, value: float) -> bool:
        """Take in a value; whether the alarm went."""
        self._values.append(value)
        if len(self._values) <= self._window:
            return False
        del self._values[0]
        old, new = self._values[: -self._newest], self._values[-self._newest :]
        bound = math.sqrt(-math.log(self._alpha / 2) * (1 / len(old) + 1 / len(new)) / 2)
        if ks_distance(old, new) <= bound:
            return False
        self.alarms += 1
        self._values = new
        return True

    def state_dict(self) -> State:
        """Values and alarms; of one size whatever came."""
        held = torch.zeros(self._window, dtype=torch.float64)
        held[: len(self._values)] = torch.tensor(self._values, dtype=torch.float64)
        return {"values": held, "count": len(self._values), "alarms": self.alarms}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self._values = state["values"][: int(state["count"])].tolist()
        self.alarms = int(state["alarms"])


def ks_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest distance of two empirical distribution functions, in [0, 1]."""
    left, right = sorted(one), sorted(other)
    return max(
        abs(bisect.bisect_right(left, value) / len(left) - bisect.bisect_right(right, value) / len(right))
        for value in [*left, *right]
    )
