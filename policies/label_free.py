"""How often answers are wrong, estimated without labels from how they change under dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.features import found_linear_head, pooled
from policies.interfaces import Context, State

DRAWS = 10
"""Passes through the head with dropout."""

TOGETHER = 2**20
"""Answers that are held at a time, at most or those of one pass."""

ROWS = 64
"""Rows of a window that are looked at, about; 4 at least."""

LARGE_HEAD = 2**22
"""Weights of a head from which on fewer rows are looked at, as its passes are no longer cheap."""

PART = 16
"""Rows from which on they go through the head; fewer wait."""

NEW = 0.4
"""Share of a window in the estimate."""

LEAST_ENTROPY = 1e-6
"""Floor of the entropy of the mean answer under dropout, in nats."""

SLOW = 0.02
"""Share of a window in what is usual, once there were more of them than its inverse."""

ENTRIES = 10
"""Estimates whose newer half is compared with the older."""

FALL = 0.02
"""By how much the newer half has to be less accurate."""

CHANCE = 1.5
"""Accuracy that answers must have, in units of that of guessing."""

FOREIGN = 0.02
"""Share of rows beyond which, if the model's class is not the head's, the head is not what answers: rounding has less,
the mean of several heads more."""


def dropout_rate(classes: int) -> float:
    """The rate of dropout before a head of ``classes`` outputs: 0.4 up to 10 of them, 0.3 up to 200, else 0.2."""
    return 0.4 if classes <= 10 else 0.3 if classes <= 200 else 0.2


@torch.no_grad()
def under_dropout(head: nn.Linear, features: Tensor, classes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What a head answers where features are dropped: ``p_ij = softmax(W (h_i m_ij / (1 - r)) + b)``, ten passes ``j``.

    Args:
        head: Its weights are used; its hooks do not run.
        features: ``h (n, d)``, finite. Each is kept, ``m = 1``, with probability ``1 - r`` of `dropout_rate`.
        classes: ``(n,)`` that it answers without dropout.
        seed: Of what is dropped: the same on every device.

    Returns:
        ``1 - mean_j [argmax p_ij = class_i]`` ``(n,)``, and ``mean_j p_ij`` ``(n, K)``, in single precision.
    """
    weight, rate = head.weight, dropout_rate(head.out_features)
    rows = features.to(weight.dtype) / (1 - rate)
    generator = torch.Generator().manual_seed(seed)
    same = torch.zeros(len(rows), device=rows.device)
    answers = torch.zeros(len(rows), len(weight), device=rows.device)
    together = min(max(TOGETHER // max(answers.numel(), 1), 1), DRAWS)
    for first in range(0, DRAWS, together):
        draws = min(together, DRAWS - first)
        kept = torch.rand(draws, *rows.shape, generator=generator) >= rate
        logits = F.linear(rows * kept.to(rows), weight, head.bias).float()
        same += (logits.argmax(2) == classes).sum(0)
        answers += logits.softmax(2).sum(0)
    return 1 - same / DRAWS, answers / DRAWS


def corrected_error(differing: float, entropy: float, usual: float, classes: int) -> float:
    """``u = clip(e / (H / H_0)^3, 0, 1 - 1 / K)``: a collapsed model agrees with itself, but on few classes.

    Args:
        differing: ``e``, share of answers that change under dropout.
        entropy: ``H`` of the mean answer under dropout, in nats; 1e-6 at least.
        usual: ``H_0``, that of answers that have not collapsed, in nats.
        classes: ``K``.
    """
    ratio = max(entropy, LEAST_ENTROPY) / max(usual, LEAST_ENTROPY)
    return min(max(differing / ratio**3, 0.0), 1 - 1 / classes)


def smoothed_error(before: float | None, differing: float, corrected: float) -> float:
    """``E <- 0.6 E + 0.4 u``; the first value is ``e``."""
    return differing if before is None else before + NEW * (corrected - before)


def accuracy_floor(classes: int, usual: float | None) -> float:
    """``max(1.5 / K, usual / 2)``: the accuracy below which answers are of no use, beside what is usual.

    Where what is usual is below ``2 / K`` itself, which for two classes it always is, halfway between it and guessing
    stands for ``1.5 / K``.
    """
    least = CHANCE / classes
    return least if usual is None else max(min(least, (1 / classes + usual) / 2), usual / 2)


def has_fallen(accuracies: Sequence[float]) -> bool:
    """Whether the last five of ten accuracies or more are lower in the mean than the five before by over 0.02."""
    if len(accuracies) < ENTRIES:
        return False
    half = ENTRIES // 2
    newer, older = accuracies[-half:], accuracies[-ENTRIES:-half]
    return math.fsum(newer) / half + FALL < math.fsum(older) / half - 1e-12  # what rounding does to it is no fall


class LabelFreeError:
    """Estimates the error of a model's answers from windows of them, and tells where it has grown.

    Reference: Lee et al., "AETTA: Label-free accuracy estimation for test-time adaptation" (CVPR 2024).

    Equations: `under_dropout`, `corrected_error`, `smoothed_error`; `has_fallen` and `accuracy_floor` for its two
    reasons to reset a model. Features come from the forward that answers, so that nothing but the head is passed again.

    Deviations: dropout is before the head alone, on some 64 rows of a window (fewer for a large head). Where the
    classes of a window are correlated, the entropy of its mean answer is low because of the stream: ``H_0`` is then the
    mean entropy of the windows so far instead of ``ln K``. The floor is relative to what is usual, where the original
    has 20 %, which means nothing for few classes.

    State: rows that wait, sums over the window, the ten estimates, means over windows, and what seeds the next draws.

    Args:
        context: Of the method. The model gets a hook on its classifier; where this is not linear with K outputs, there
            is never an estimate.
        window: Rows between two looks, about.

    Attributes:
        error: Estimated share of wrong answers; None before the first window, and where the head is not what answers.
        usual: Mean of the estimated accuracies of windows that were ``usual``; None before the first.
        falls: How often the estimated accuracy had fallen.
        low: Windows in a row that were not ``usual``, with an estimated accuracy below `accuracy_floor`.
    """

    def __init__(self, context: Context, window: int) -> None:
        self._classes, self._seed, self._window = context.num_classes, context.seed, window
        self._head = found_linear_head(context.model, context.num_classes)
        self._hook = None if self._head is None else self._head.register_forward_pre_hook(self._catch)
        weights = 0 if self._head is None else self._head.weight.numel()
        self._rows = max(4, ROWS * LARGE_HEAD // max(weights, LARGE_HEAD))
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.error: float | None = None
        self.usual: float | None = None
        self.falls = self.low = 0
        self._entropy = self._foreign = 0.0
        self._windows = self._usual_windows = self._parts = self._passed = 0
        self._accuracies: list[float] = []
        self._features: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._forget_window()
        self._armed = False
        self._caught: Tensor | None = None

    def _forget_window(self) -> None:
        device = None if self._head is None else self._head.weight.device
        self._sums = torch.zeros(self._classes + 3, device=device)
        """Of the window: rows, those whose class is not the head's, shares that differ, and answers under dropout."""

    def begin(self) -> None:
        """The next forward is the one that answers a batch."""
        self._armed, self._caught = True, None

    def _catch(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._armed:
            self._armed, self._caught = False, args[0].detach()

    @torch.no_grad()
    def add(self, answers: Tensor) -> None:
        """Take in what went into the head since `begin`, of rows that the model answers with ``(B, K)``."""
        caught, self._caught, self._armed = self._caught, None, False
        if caught is None or len(caught) != len(answers):
            return
        stride = -(-max(self._window, len(answers)) // self._rows)
        chosen = slice(-self._passed % stride, None, stride)
        self._passed = (self._passed + len(answers)) % stride
        self._features.append(pooled(caught[chosen], self._head).clone())
        self._answers.append(answers[chosen].argmax(1))
        if sum(map(len, self._features)) >= PART:
            self._pass()

    def _pass(self) -> None:
        """Have the rows that wait go through the head."""
        assert self._head is not None
        features, classes = torch.cat(self._features), torch.cat(self._answers)
        self._features, self._answers = [], []
        good = features.isfinite().all(1)
        features, classes = features[good], classes[good]
        own = F.linear(features.to(self._head.weight.dtype), self._head.weight, self._head.bias).argmax(1)
        differing, answers = under_dropout(self._head, features, classes, self._seed + self._parts)
        foreign = (own != classes).float()
        columns = [torch.ones_like(foreign), foreign, differing]
        self._sums += torch.cat([torch.stack(columns, 1), answers], 1).sum(0)
        self._parts += 1

    @torch.no_grad()
    def look(self, *, correlated: bool, usual: bool) -> None:
        """Estimate from the window just over.

        Args:
            correlated: Whether its classes are.
            usual: Whether it was answered in the way that others are to be compared with.
        """
        if sum(map(len, self._features)):
            self._pass()
        rows, foreign, differing, *answers = self._sums.tolist()
        self._forget_window()
        if not rows:
            return
        entropy = -math.fsum(chance / rows * math.log(chance / rows) for chance in answers if chance > 0)
        self._windows += 1
        share = max(SLOW, 1 / self._windows)
        self._foreign += share * (foreign / rows - self._foreign)
        if not usual and self._windows > 1:
            share = SLOW  # a collapse is not soon usual
        self._entropy += share * (entropy - self._entropy)
        if self._foreign > FOREIGN:
            self.error, self.low, self._accuracies = None, 0, []
            return
        level = self._entropy if correlated else math.log(self._classes)
        differing /= rows
        self.error = smoothed_error(self.error, differing, corrected_error(differing, entropy, level, self._classes))
        self._judge(1 - self.error, usual)

    def _judge(self, accuracy: float, usual: bool) -> None:
        """Compare with the windows before, and with what is usual."""
        self._accuracies = [*self._accuracies, accuracy][-ENTRIES:]
        if has_fallen(self._accuracies):
            self.falls += 1
            self._accuracies = []
        if usual:
            self._usual_windows += 1
            before = accuracy if self.usual is None else self.usual
            self.usual = before + max(SLOW, 1 / self._usual_windows) * (accuracy - before)
        low = not usual and accuracy < accuracy_floor(self._classes, self.usual)
        self.low = self.low + 1 if low else 0

    @property
    def gauges(self) -> dict[str, float]:
        """The estimate, NaN where there is none, and its falls."""
        return {"estimated_error": math.nan if self.error is None else self.error, "accuracy_falls": self.falls}

    def detach(self) -> None:
        """Remove the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> State:
        """All of it, not copied."""
        return {
            "features": list(self._features),
            "answers": list(self._answers),
            "sums": self._sums,
            "seed": self._seed,
            "counts": [self.falls, self.low, self._windows, self._usual_windows, self._parts, self._passed],
            "means": [self.error, self.usual, self._entropy, self._foreign],
            "accuracies": list(self._accuracies),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        device = self._sums.device
        self._features = [part.to(device, copy=True) for part in state["features"]]
        self._answers = [part.to(device, copy=True) for part in state["answers"]]
        self._sums.copy_(state["sums"])
        self._seed, counts = int(state["seed"]), map(int, state["counts"])
        self.falls, self.low, self._windows, self._usual_windows, self._parts, self._passed = counts
        self.error, self.usual, self._entropy, self._foreign = state["means"]
        self._accuracies = list(state["accuracies"])
