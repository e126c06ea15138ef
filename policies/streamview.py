"""What the answers of late tell of a stream: measures of whole windows of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.chain import Array
from policies.detectors import (
    Adwin,
    FeatureShift,
    Kswin,
    PageHinkley,
    autocorrelation,
    effective_classes,
    entropy_ratio,
    simpson_excess,
)
from policies.features import Features
from policies.interfaces import Context, PolicyError, State

SMOOTHING = 0.3
"""Share of a new window in the imbalance of late."""


class StreamView:
    """Gathers rows until they make a window, then measures it.

    Args:
        context: Of the method.
        window: Rows of a window; a batch with more of them is one window.
        reference: Rows at the start whose features later ones are compared with; 0 looks at no features.

    Attributes:
        imbalance: Excess of pairs of one class of late; 1 before the first window, so that caution comes first.
        entropy: Mean entropy of the last window in units of ``ln K``.
        feature_distance: How far features have moved from those at the start.
        gauges: The last measures by name.
    """

    def __init__(self, context: Context, window: int, reference: int) -> None:
        self._window, self._classes = window, context.num_classes
        self._reference = reference
        self._features = _features(context) if reference else None
        self._series: dict[str, PageHinkley | Adwin | Kswin] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.imbalance = 1.0
        self.entropy = 0.0
        self._windows = 0
        self.feature_distance = 0.0
        self._shift: FeatureShift | None = None
        self._series = {"entropy_rises": PageHinkley(), "entropy_cuts": Adwin(), "entropy_shifts": Kswin()}
        self._probabilities: list[Tensor] = []
        self._answers: list[Tensor] = []
        self.gauges: dict[str, float] = {"imbalance": 1.0, "feature_distance": 0.0} | dict.fromkeys(self._series, 0.0)

    @property
    def full(self) -> bool:
        """Whether there is a window to look at."""
        return sum(map(len, self._answers)) >= self._window

    def add(self, probabilities: Tensor, classes: Tensor, inputs: Tensor) -> None:
        """Take in the model's probabilities ``(B, K)`` and the classes ``(B,)`` that were answered."""
        self._probabilities.append(probabilities.float().cpu())
        self._answers.append(classes.cpu())
        if self._features is not None:
            features = self._features.of(inputs, len(classes))
            self._shift = self._shift or FeatureShift(features.shape[1], reference=self._reference)
            self._shift.add(features)

    def look(self, frequencies: Array) -> None:
        """Measure the window, against long-run frequencies ``(K,)`` of classes, and start the next."""
        probabilities, classes = torch.cat(self._probabilities), torch.cat(self._answers)
        self._probabilities, self._answers = [], []
        usual = torch.from_numpy(frequencies)
        excess = simpson_excess(classes, usual)
        self._windows += 1
        share = max(SMOOTHING, 1 / self._windows)
        self.imbalance += share * (min(max(excess, 0.0), 1.0) - self.imbalance)
        if self._shift is not None:
            self.feature_distance = self._shift.distance()
        self.entropy = entropy = entropy_ratio(probabilities)
        for detector in self._series.values():
            detector.add(entropy)
        self.gauges |= {name: detector.alarms for name, detector in self._series.items()}
        self.gauges |= {
            "imbalance": self.imbalance,
            "feature_distance": self.feature_distance,
            "effective_classes": effective_classes(probabilities),
            "entropy_ratio": entropy,
            "autocorrelation": autocorrelation(classes, usual),
        }

    def detach(self) -> None:
        """Remove hooks."""
        if self._features is not None:
            self._features.remove()

    def state_dict(self) -> State:
        """Rows that wait for a window, and all detectors."""
        return {
            "imbalance": self.imbalance,
            "windows": self._windows,
            "feature_distance": self.feature_distance,
            "shift": None if self._shift is None else self._shift.state_dict(),
            "series": {name: detector.state_dict() for name, detector in self._series.items()},
            "probabilities": list(self._probabilities),
            "answers": list(self._answers),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self.imbalance, self.feature_distance = float(state["imbalance"]), float(state["feature_distance"])
        self._windows = int(state["windows"])
        self._shift = None
        if state["shift"] is not None:
            self._shift = FeatureShift(state["shift"]["values"].shape[1], reference=self._reference)
            self._shift.load_state_dict(state["shift"])
        for name, detector in self._series.items():
            detector.load_state_dict(state["series"][name])
        self._probabilities = [part.clone() for part in state["probabilities"]]
        self._answers = [part.clone() for part in state["answers"]]


def _features(context: Context) -> Features | None:
    """The features of the live model, where it offers any."""
    try:
        return Features(context.model, "", context.num_classes, "auto")
    except PolicyError:
        return None
