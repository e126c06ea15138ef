"""What the answers of late tell of a stream: measures of whole windows of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from policies.auto_params import PRIOR_ROWS, SLOWEST, AutoParams
from policies.chain import Array
from policies.detectors import (
    Adwin,
    FeatureShift,
    Kswin,
    PageHinkley,
    autocorrelation,
    disagreement,
    effective_classes,
    entropy_ratio,
    neighbour_distances,
    simpson_excess,
    squared_distance,
)
from policies.features import Features
from policies.interfaces import Context, PolicyError, State
from policies.label_free import LabelFreeError

SMOOTHING = 0.3
"""Share of a new window in the imbalance of late."""

SLOW = 0.05
"""Share of a new window in the bunching of late, which is a difference of figures that are nearly alike."""

RECENT = 16
"""Windows before the last one that its classes are compared with."""

LOOKED_AT = 256
"""Values of a row that its neighbour is compared in, spread evenly over it."""

REMEMBERED = 0.9
"""What distances of neighbours keep of their weight from window to window."""

SETTLING = 6
"""Windows after features moved whose classes are compared with none: answers are still about to settle. Features that
move again sooner have not come to another place; they move with the classes."""


class StreamView:
    """Gathers rows until they make a window, then measures it.

    Args:
        context: Of the method.
        params: Their ``window`` (a batch with more rows is one window), ``reference``, ``alike``, and ``moved``: the
            distance from which on features given to `add` have moved, and are compared with rows from then on.
        own: Whether to look at the features of the model's classifier, with a reference that stays.

    Attributes:
        imbalance: Excess of pairs of one class of late; 1 before the first window, so that caution comes first.
        bunching: How much classes of late change from window to window: the squared distance of their frequencies in a
            window from those in the windows before it; 0 for rows that could as well have come in another order.
        likeness: How much nearer to one another rows of one class are of late that follow one another than any two rows
            of it: 0 where rows are independent given their class, 1 where they are copies.
        entropy: Mean entropy of the last window in units of ``ln K``.
        compared: Windows that the bunching is measured over.
        feature_distance: How far features have moved from the reference.
        moved: Whether features had moved when the last window was looked at.
        steady: Windows since features moved, or since the start.
        estimate: Of the error of the model's answers.
        gauges: The last measures by name.
    """

    def __init__(self, context: Context, params: AutoParams, *, own: bool) -> None:
        self._params, self._classes = params, context.num_classes
        self._features = _features(context) if own else None
        self._series: dict[str, PageHinkley | Adwin | Kswin] = {}
        self.estimate = LabelFreeError(context, params.window)
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.imbalance = 1.0
        self.steady = 0
        self._settling = SETTLING
        self.moved = False
        self.compare_anew()
        self.entropy = 0.0
        self._windows = 0
        self.feature_distance = 0.0
        self._shift: FeatureShift | None = None
        self._series = {"entropy_rises": PageHinkley(), "entropy_cuts": Adwin(), "entropy_shifts": Kswin()}
        self._near = self._apart = 0.0
        self.estimate.reset()
        self._with_source, self._differing = 0, 0.0
        self._disagreement: float | None = None
        self._probabilities: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self.gauges: dict[str, float] = {"imbalance": 1.0, "bunching": 0.0, "likeness": 0.0, "feature_distance": 0.0}
        self.gauges |= dict.fromkeys(self._series, 0.0)
        self._show_errors()

    def compare_anew(self) -> None:
        """Measure the bunching over windows from now on alone."""
        self.bunching, self.compared = 0.0, 0
        self._recent: list[Tensor] = []

    @property
    def likeness(self) -> float:
        """See the attributes."""
        return 1 - self._near / self._apart if self._apart else 0.0

    @property
    def alike(self) -> bool:
        """Whether rows are so alike that their errors are too."""
        return self.likeness >= self._params.alike

    @property
    def slowness(self) -> float:
        """By how much to learn statistics slower, which is the more the longer nothing has moved."""
        return min(max(1.0, self.steady * self._params.common_rate), SLOWEST)

    def share(self, rows: int) -> float:
        """The share of a batch of so many rows in the statistics to normalise with."""
        balance = max(0.0, 1 - self.imbalance / self._params.imbalance)
        return self._params.share * balance * rows / (rows + PRIOR_ROWS)

    @property
    def full(self) -> bool:
        """Whether there is a window to look at."""
        return sum(map(len, self._answers)) >= self._params.window

    def begin(self) -> None:
        """The next forward is the one that answers a batch."""
        self.estimate.begin()

    def add(self, probabilities: Tensor, classes: Tensor, inputs: Tensor, features: Tensor | None) -> None:
        """Take in the model's probabilities ``(B, K)``, the classes ``(B,)`` that were answered, and any features."""
        self.estimate.add(probabilities)
        self._probabilities.append(probabilities.float().cpu())
        self._answers.append(classes.cpu())
        values = inputs.flatten(1)
        self._inputs.append(values[:, :: -(-values.shape[1] // LOOKED_AT)].float().cpu())
        if self._features is not None:
            features = self._features.of(inputs, len(classes))
        if features is not None:
            self._shift = self._shift or self._new_shift(features.shape[1])
            self._shift.add(features)

    def compare(self, answered: Tensor, source: Tensor) -> None:
        """Take in what rows were answered with, and what by the source model, logits ``(n, K)`` both."""
        if answered is not source:
            good = source.isfinite().all(1)
            answered, source = answered[good], source[good]
            self._differing += len(source) * disagreement(answered, source)
        self._with_source += len(source)

    def _see_disagreement(self) -> None:
        if self._with_source:
            self._disagreement = self._differing / self._with_source
        self._with_source, self._differing = 0, 0.0

    def _show_errors(self) -> None:
        """What is known of errors; NaN where nothing is."""
        differing = math.nan if self._disagreement is None else self._disagreement
        self.gauges |= self.estimate.gauges | {"disagreement": differing}

    def count_falls(self, falls: int) -> None:
        """Go on counting falls of the estimated accuracy from there, after a reset."""
        self.estimate.falls = falls
        self._show_errors()

    def _new_shift(self, width: int) -> FeatureShift:
        return FeatureShift(width, reference=self._params.reference, memory=self._params.reference // 2)

    def look(self, frequencies: Array, *, usual: bool = True) -> None:
        """Measure the window, and start the next.

        Args:
            frequencies: Of classes in the long run ``(K,)``.
            usual: Whether the model answers as the source model does.
        """
        probabilities, classes, inputs = map(torch.cat, (self._probabilities, self._answers, self._inputs))
        self._probabilities, self._answers, self._inputs = [], [], []
        long_run = torch.from_numpy(frequencies)
        excess = simpson_excess(classes, long_run)
        self._windows += 1
        share = max(SMOOTHING, 1 / self._windows)
        self.imbalance += share * (min(max(excess, 0.0), 1.0) - self.imbalance)
        self._see_features()
        near, apart = neighbour_distances(inputs, classes)
        self._near, self._apart = REMEMBERED * self._near + near, REMEMBERED * self._apart + apart
        self._compare(torch.bincount(classes, minlength=self._classes).double())
        rho = autocorrelation(classes, long_run)
        correlated = self.imbalance >= self._params.imbalance or rho >= self._params.persistence
        self.estimate.look(correlated=correlated, usual=usual)
        self._see_disagreement()
        self.entropy = entropy = entropy_ratio(probabilities)
        for detector in self._series.values():
            detector.add(entropy)
        self.gauges |= {name: detector.alarms for name, detector in self._series.items()}
        self.gauges |= {
            "imbalance": self.imbalance,
            "bunching": self.bunching,
            "likeness": self.likeness,
            "feature_distance": self.feature_distance,
            "effective_classes": effective_classes(probabilities),
            "entropy_ratio": entropy,
            "autocorrelation": rho,
        }
        self._show_errors()

    def _see_features(self) -> None:
        """Measure how far features have moved; features from elsewhere get a new reference where they have."""
        self.steady += 1
        if self._shift is None:
            return
        self.feature_distance = self._shift.distance()
        self.moved = self._features is None and self.feature_distance >= self._params.moved
        if not self.moved:
            return
        if self.steady > SETTLING:
            self._settling, self._recent = SETTLING, []
        self._shift, self.steady = None, 0

    def _compare(self, counts: Tensor) -> None:
        """Compare the counts of classes ``(K,)`` in a window with those of the windows before it."""
        if self._settling:
            self._settling -= 1
            return
        if self._recent:
            distance = squared_distance(counts, torch.stack(self._recent).sum(0))
            self.compared += 1
            self.bunching += max(SLOW, 1 / self.compared) * (distance - self.bunching)
        self._recent = [*self._recent, counts][-RECENT:]

    def detach(self) -> None:
        """Remove hooks."""
        self.estimate.detach()
        if self._features is not None:
            self._features.remove()

    def state_dict(self) -> State:
        """Rows that wait for a window, and all detectors."""
        return {
            "imbalance": self.imbalance,
            "bunching": self.bunching,
            "recent": list(self._recent),
            "counts": [self.compared, self.steady, self._settling, int(self.moved)],
            "windows": self._windows,
            "feature_distance": self.feature_distance,
            "shift": None if self._shift is None else self._shift.state_dict(),
            "series": {name: detector.state_dict() for name, detector in self._series.items()},
            "distances": [self._near, self._apart],
            "probabilities": list(self._probabilities),
            "answers": list(self._answers),
            "inputs": list(self._inputs),
            "estimate": self.estimate.state_dict(),
            "disagreement": [self._disagreement, self._differing, self._with_source],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self.imbalance, self.feature_distance = float(state["imbalance"]), float(state["feature_distance"])
        self._windows = int(state["windows"])
        self.bunching = float(state["bunching"])
        self.compared, self.steady, self._settling, moved = map(int, state["counts"])
        self.moved = bool(moved)
        self._recent = [counts.clone() for counts in state["recent"]]
        self._shift = None
        if state["shift"] is not None:
            self._shift = self._new_shift(state["shift"]["values"].shape[1])
            self._shift.load_state_dict(state["shift"])
        for name, detector in self._series.items():
            detector.load_state_dict(state["series"][name])
        self._probabilities = [part.clone() for part in state["probabilities"]]
        self._answers = [part.clone() for part in state["answers"]]
        self._inputs = [part.clone() for part in state["inputs"]]
        self._near, self._apart = map(float, state["distances"])
        if "estimate" in state:  # came later than the others
            self.estimate.load_state_dict(state["estimate"])
            self._disagreement, self._differing, self._with_source = state["disagreement"]
        else:
            self.estimate.reset()
        self._show_errors()


def _features(context: Context) -> Features | None:
    """The features of the live model, where it offers any."""
    try:
        return Features(context.model, "", context.num_classes, "auto")
    except PolicyError:
        return None
