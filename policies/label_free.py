"""How often answers are wrong, estimated without labels from how they change under dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

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
"""Rows of a window that are looked at, at most; 4 at least."""

LARGE_HEAD = 2**22
"""Weights of a head from which on fewer rows are looked at, as its passes are no longer cheap."""

DROPPED = 2**21
"""Features, over rows and passes, that are dropped or kept at a time; where rows are wider, fewer are looked at."""

CHEAP = 0.25
"""What the passes of a window may cost beside the forwards that answer it; where it is more, windows are left out."""

BESIDE = 8
"""What to drop a feature costs, in multiplications: it is read and written, not only computed with."""

SPARSEST = 4
"""Windows to one that is looked at, at most."""

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


def windows_apart(head: nn.Linear, model: nn.Module) -> int:
    """Every how many windows to look at one: the fewest, up to 4, that keep the passes below a quarter of the forwards.

    Counted, not timed: each of the eleven passes takes ``(K + 8) d`` operations for a row, the forward as many as the
    model has parameters, or more.
    """
    forward = sum(parameter.numel() for parameter in model.parameters())
    passes = (DRAWS + 1) * (head.out_features + BESIDE) * head.in_features
    return min(math.ceil(passes / (CHEAP * max(forward, 1))), SPARSEST)


@lru_cache(maxsize=8)
def dropout_masks(
    seed: int, rows: int, width: int, rate: float, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """``m_ij / (1 - r)`` ``(10, rows, width)``, not to be changed: who asks for the same again gets the same tensor.

    Each ``m`` is 1 with probability ``1 - r``, else 0; the seed gives the same ones for every device.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(DRAWS, rows, width, generator=generator) >= rate
    return (kept.to(dtype) / (1 - rate)).to(device)


@torch.no_grad()
def under_dropout(head: nn.Linear, features: Tensor, classes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """What a head answers where features are dropped: ``p_ij = softmax(W (h_i m_ij / (1 - r)) + b)``, ten passes ``j``.

    Args:
        head: Its weights are used; its hooks do not run.
        features: ``h (n, d)``, finite.
        classes: ``(n,)`` that it answers without dropout.
        masks: ``m_ij / (1 - r)`` of `dropout_masks`, for ``n`` rows or more.

    Returns:
        ``1 - mean_j [argmax p_ij = class_i]`` ``(n,)``, and ``mean_j p_ij`` ``(n, K)``, in single precision.
    """
    rows = features.to(head.weight.dtype)
    differing = torch.zeros(len(rows), device=rows.device)
    answers = torch.zeros(len(rows), head.out_features, device=rows.device)
    together = min(max(TOGETHER // max(answers.numel(), 1), 1), DRAWS)
    for kept in masks[:, : len(rows)].split(together):
        logits = F.linear(rows * kept, head.weight, head.bias)
        differing += (logits.argmax(2) != classes).sum(0)
        answers += logits.softmax(2, dtype=torch.float32).sum(0)
    return differing / DRAWS, answers / DRAWS


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

    Where what is usual is below ``2 / K`` itself, halfway between it and guessing stands for ``1.5 / K``. Two classes
    have no floor, 0: from guessing to no error there is too little room for an estimate this far off.
    """
    if classes <= 2:
        return 0.0
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

    Deviations: dropout is before the head alone, on up to 64 rows of a window (fewer for a large head), and what is
    dropped is drawn once, for each of the 64 rows anew, not again for each window. Where the classes of a window are
    correlated, the entropy of its mean answer is low because of the stream: ``H_0`` is then the mean entropy of the
    windows so far instead of ``ln K``. The floor is relative to what is usual, where the original has 20 %, which means
    nothing for few classes.

    Cost: of each `windows_apart`-th window, once its answers are out, eleven passes of up to 64 rows through the head
    and ten products of their features with masks. No random numbers but the ``640 d`` of the masks, once for all
    estimates with one seed; they stay in memory, 8 MiB at most for features of up to 52,000 values in single precision.

    State: features and classes of the up to 64 rows of this window, the ten estimates, means over windows, and the seed
    of the masks.

    Args:
        context: Of the method. The model gets a hook on its classifier; where this is not linear with K outputs, there
            is never an estimate.
        window: Rows between two looks, about.

    Attributes:
        error: Estimated share of wrong answers; None before the first window, and where the head is not what answers.
        usual: Mean of the estimated accuracies of windows that were ``usual``; None before the first.
        falls: How often the estimated accuracy had fallen.
        low: Windows in a row, of those looked at, that were not ``usual`` and are estimated below `accuracy_floor`.
    """

    def __init__(self, context: Context, window: int) -> None:
        self._classes, self._seed, self._window = context.num_classes, context.seed, window
        self._head = found_linear_head(context.model, context.num_classes)
        self._hook = None if self._head is None else self._head.register_forward_pre_hook(self._catch)
        self._rows = self._every = 1
        if self._head is not None:
            few = ROWS * LARGE_HEAD // max(self._head.weight.numel(), LARGE_HEAD)
            self._rows = max(4, min(few, DROPPED // (DRAWS * self._head.in_features)))
            self._every = windows_apart(self._head, context.model)
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.error: float | None = None
        self.usual: float | None = None
        self.falls = self.low = 0
        self._entropy = self._foreign = 0.0
        self._windows = self._usual_windows = self._seen = self._passed = 0
        self._accuracies: list[float] = []
        self._forget_window()
        self._armed = False
        self._caught: Tensor | None = None

    def _forget_window(self) -> None:
        self._features: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._held = self._moved = 0
        """Rows kept, and the first of them that were answered before the head last learned."""
        self._version = self._head_version

    def begin(self) -> None:
        """The next forward is the one that answers a batch."""
        self._armed, self._caught = self._seen % self._every == 0 and self._held < self._rows, None

    def _catch(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._armed:
            self._armed, self._caught = False, args[0].detach()

    @torch.no_grad()
    def add(self, answers: Tensor) -> None:
        """Keep what went into the head since `begin`, of some of the rows that the model answers with ``(B, K)``."""
        caught, self._caught, self._armed = self._caught, None, False
        if caught is None or len(caught) != len(answers):
            return
        stride = -(-max(self._window, len(answers)) // self._rows)
        first = -self._passed % stride
        chosen = slice(first, min(len(answers), first + stride * (self._rows - self._held)), stride)
        self._passed = (self._passed + len(answers)) % stride
        if first < len(answers):
            self._features.append(pooled(caught[chosen], self._head).clone())
            self._answers.append(answers[chosen].argmax(1))
            if self._version != self._head_version:
                self._version, self._moved = self._head_version, self._held
            self._held += len(self._answers[-1])

    @property
    def _head_version(self) -> int:
        """Another number each time that the head's weights are written to."""
        return 0 if self._head is None else self._head.weight._version  # noqa: SLF001 - told nowhere else

    def _pass(self) -> list[float]:
        """Have the rows kept go through the head.

        Returns:
            The share of them whose class is not the head's (NaN where it has learned since), the share of answers that
            differ, and the mean answer under dropout; nothing without rows.
        """
        if self._head is None or not self._held:
            return []
        features, classes = torch.cat(self._features), torch.cat(self._answers)
        moved = self._moved if self._version == self._head_version else self._held
        classes[:moved] = -1  # what another head has answered tells nothing of this one
        self._forget_window()
        good = features.isfinite().all(1)
        if not bool(good.all()):
            features, classes = features[good], classes[good]
        if not len(features):
            return []
        weight, rate = self._head.weight, dropout_rate(self._classes)
        own = F.linear(features.to(weight.dtype), weight, self._head.bias).argmax(1)
        foreign = torch.where(classes < 0, math.nan, (own != classes).float())
        masks = dropout_masks(self._seed, self._rows, features.shape[1], rate, weight.dtype, weight.device)
        differing, answers = under_dropout(self._head, features, own, masks)
        means = torch.stack([foreign.nanmean(), differing.mean()])
        return torch.cat([means, answers.mean(0)]).tolist()

    @torch.no_grad()
    def look(self, *, correlated: bool, usual: bool) -> None:
        """Estimate from the window just over, if it is one to be looked at.

        Args:
            correlated: Whether its classes are.
            usual: Whether it was answered in the way that others are to be compared with.
        """
        self._seen += 1
        figures = self._pass()
        if not figures:
            return
        foreign, differing, *answers = figures
        entropy = -math.fsum(chance * math.log(chance) for chance in answers if chance > 0)
        self._windows += 1
        share = max(SLOW, 1 / self._windows)
        if not math.isnan(foreign):
            self._foreign += share * (foreign - self._foreign)
        if not usual and self._windows > 1:
            share = SLOW  # a collapse is not soon usual
        self._entropy += share * (entropy - self._entropy)
        if self._foreign > FOREIGN:
            self.error, self.low, self._accuracies = None, 0, []
            return
        level = self._entropy if correlated else math.log(self._classes)
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
            "moved": self._moved if self._version == self._head_version else self._held,
            "seed": self._seed,
            "counts": [self.falls, self.low, self._windows, self._usual_windows, self._seen, self._passed],
            "means": [self.error, self.usual, self._entropy, self._foreign],
            "accuracies": list(self._accuracies),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        device = None if self._head is None else self._head.weight.device
        self._features = [part.to(device, copy=True) for part in state["features"]]
        self._answers = [part.to(device, copy=True) for part in state["answers"]]
        self._held, self._moved = sum(map(len, self._answers)), int(state.get("moved", 0))  # came later
        self._version = self._head_version
        self._seed, counts = int(state["seed"]), map(int, state["counts"])
        self.falls, self.low, self._windows, self._usual_windows, self._seen, self._passed = counts
        self.error, self.usual, self._entropy, self._foreign = state["means"]
        self._accuracies = list(state["accuracies"])
