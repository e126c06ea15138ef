"""Weights by loss: linupper, quadratic, extremes."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from policies.interfaces import Context, LabelledBatch, MethodParams, Reweighting, State

WARM_UP_TEMPERATURE = 100.0
"""Temperature of the warm-up: weights differ by at most one hundredth."""

LEAST_RANGE = 1e-6
"""A smaller spread of losses is none: all rows weigh the same."""

QUANTILES = (0.05, 0.95)
"""Stand for least and largest loss where they come from a window: single outliers must not set the scale."""


class Loss(Reweighting):
    """Weighs rows by where their loss lies among the others.

    Reference: Sow et al., "Dynamic loss-based sample reweighting for improved large language model pretraining"
    (ICLR 2025).

    Equations, with losses ``l`` between ``lo`` and ``hi`` and the temperature ``r``:

        h = (2 l - lo - hi) / (hi - lo) in [-1, 1];   w = exp(f / r), divided by its mean over the batch

    - ``strategy: linupper``: ``f = min(h + 1, 1)``; leaves out easy rows, treats the harder half alike.
    - ``strategy: quadratic``: ``f = 1 - h^2``; favours the middle, for labels with noise.
    - ``strategy: extremes``: ``f = |h|``; favours the easiest and the hardest.

    Shapes: losses ``(N,)`` to weights ``(N,)``.
    State: the newest losses ``(window,)``, how many were seen, and how many batches.
    Deviations: batches of fewer than ``min_batch`` rows take ``lo`` and ``hi`` from the 5 % and 95 % quantiles of the
    newest ``window`` losses, this batch's included, and ``h`` is clamped: least and largest of a few rows say nothing.
    Losses that do not differ give equal weights.
    Cost: elementwise over ``N`` numbers; for small batches two quantiles of the window.
    """

    name = "loss"

    class Params(MethodParams):
        """Parameters of weighting by loss.

        Attributes:
            strategy: Which rows are favoured.
            temperature: ``r`` after the warm-up; large is uniform, small is extreme.
            warmup: For this many batches the weights are all but uniform (``r`` is 100).
            min_batch: Batches with fewer rows compare with the window.
            window: How many of the newest losses are kept.
        """

        strategy: Literal["linupper", "quadratic", "extremes"] = "linupper"
        temperature: float = Field(default=0.4, gt=0)
        warmup: int = Field(default=100, ge=0)
        min_batch: int = Field(default=32, ge=0)
        window: int = Field(default=256, ge=8, le=1_000_000)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._recent = torch.zeros(params.window, device=context.device)
        self._seen = 0
        self._batches = 0

    def _weigh(self, batch: LabelledBatch, losses: Tensor) -> Tensor:
        self._remember(losses)
        warm = self._batches >= self.params.warmup
        self._batches += 1
        scores = self._scores(self._position(losses)) / (self.params.temperature if warm else WARM_UP_TEMPERATURE)
        weights = torch.exp(scores - scores.max())
        return weights / weights.mean()

    def _remember(self, losses: Tensor) -> None:
        """Overwrite the oldest losses with the newest."""
        newest = losses[-self.params.window :]
        first = self._seen + len(losses) - len(newest)
        slots = torch.arange(first, first + len(newest), device=self._recent.device) % self.params.window
        self._recent[slots] = newest.to(self._recent)
        self._seen += len(losses)

    def _position(self, losses: Tensor) -> Tensor:
        """Where each loss lies between the bounds, in [-1, 1]; -1 for all where they do not differ."""
        if len(losses) >= self.params.min_batch:
            low, high = losses.aminmax()
        else:
            known = self._recent[: min(self._seen, self.params.window)]
            low, high = torch.quantile(known, known.new_tensor(QUANTILES)).to(losses)
        spread = high - low
        place = ((losses - low) / spread * 2 - 1).clamp(-1, 1)
        return torch.where(spread > LEAST_RANGE, place, torch.full_like(place, -1.0))

    def _scores(self, place: Tensor) -> Tensor:
        if self.params.strategy == "linupper":
            return (place + 1).clamp_max(1)
        return 1 - place.square() if self.params.strategy == "quadratic" else place.abs()

    def state_dict(self) -> State:
        """The newest losses and the two counts."""
        return {"recent": self._recent, "seen": self._seen, "batches": self._batches}

    def load_state_dict(self, state: State) -> None:
        """Take over losses and counts; a window of another size keeps the newest that fit."""
        old, seen = state["recent"].to(self._recent).clone(), int(state["seen"])
        known = min(seen, len(old), self.params.window)
        order = torch.arange(seen - known, seen, device=old.device)
        self._recent.zero_()
        self._recent[order % self.params.window] = old[order % len(old)]
        self._seen, self._batches = seen, int(state["batches"])
