"""DELTA: batch renormalisation, and losses that weigh rare classes as much as frequent ones."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.gradient import GradientAdaptation, GradientParams
from policies.interfaces import Context, Outcome, State, Weights
from policies.norm import BlendedBatchNorm
from policies.renorm import RenormBatchNorm, Renorms


class DELTA(GradientAdaptation):
    """Entropy or pseudo-label loss with running statistics in BatchNorm (TBR) and weights by class frequency (DOT).

    Reference: Zhao et al., "DELTA: degradation-free fully test-time adaptation" (ICLR 2023).

    Equations, with the running class frequency ``q`` (uniform at first):

    - TBR: see `policies.renorm.RenormBatchNorm`.
    - DOT: ``c_k = q_k ** -tempering``, ``w_i = n c_y(i) / sum_j c_y(j)`` over the ``n`` rows with ``y = argmax p``;
      after the batch ``q <- momentum q + (1 - momentum) mean_i p_i``.
    - ``L`` is the mean over chosen rows of ``w_i l_i``: ``entropy`` takes all rows and ``l = H``; ``reliable`` rows
      with ``e_i = exp(margin ln K - H_i) > 1`` and ``l = e_i H_i`` (``e`` without gradient); ``pseudo_label`` rows of a
      confidence above ``confidence`` and ``l = CE(y_i, p_i)``.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step.

    State: ``q (K,)``, running mean and deviation of every BatchNorm layer, the optimizer's moments, and the inputs of
    batches answered but not yet adapted to.

    Deviations: as of `policies.adaptation.tent.Tent`. ``q_k`` counts as at least ``floor / K`` in the weights, so that
    a class that is never predicted does not take all weight. Statistics move once for every batch, when `update` runs.

    Cost: one forward and one backward; without BatchNorm layers DOT alone remains.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "delta"

    class Params(GradientParams):
        """Parameters of DELTA.

        Attributes:
            loss: ``entropy``, ``reliable`` or ``pseudo_label``.
            renormalise: Whether BatchNorm layers use TBR; else they use the statistics of the batch.
            momentum: Share that statistics and class frequencies keep of themselves.
            tempering: Power of the class frequency; 0 weighs all rows alike.
            floor: Least class frequency in units of ``1 / K``.
            margin: Entropy in units of ``ln K`` below which a row is ``reliable``.
            confidence: Limit of ``pseudo_label``.
        """

        loss: Literal["entropy", "reliable", "pseudo_label"] = "entropy"
        renormalise: bool = True
        momentum: float = Field(default=0.95, ge=0, lt=1)
        tempering: float = Field(default=1.0, ge=0, le=1)
        floor: float = Field(default=0.1, ge=0, le=1)
        margin: float = Field(default=0.5, gt=0, le=1)
        confidence: float = Field(default=0.4, ge=0, lt=1)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        self._kind: type[BlendedBatchNorm] = RenormBatchNorm if params.renormalise else BlendedBatchNorm
        super().__init__(params, context)
        layers = self._blending.layers if params.renormalise else []
        self._renorms = Renorms(cast("list[RenormBatchNorm]", layers))
        self._frequency = torch.full((context.num_classes,), 1 / context.num_classes, device=context.device)
        self.gauges["kept_ratio"] = 0.0

    def _layers(self) -> type[BlendedBatchNorm]:
        return self._kind

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        entropy, confidence, label = softmax_entropy(logits)
        with torch.no_grad():
            frequency = self._frequency.clamp(min=self.params.floor / len(self._frequency))
            weights = class_weights(frequency, label, self.params.tempering)
            mean = logits.softmax(1).mean(0).to(self._frequency.dtype)
            self._frequency = torch.lerp(mean, self._frequency, self.params.momentum)
        losses = entropy
        if self.params.loss == "pseudo_label":
            losses, chosen = F.cross_entropy(logits, label, reduction="none"), confidence > self.params.confidence
        elif self.params.loss == "reliable":
            surety = torch.exp(self.params.margin * math.log(logits.shape[1]) - entropy.detach())
            weights, chosen = weights * surety, surety > 1
        else:
            chosen = torch.ones_like(label, dtype=torch.bool)
        kept = int(chosen.sum())
        self.gauges["kept_ratio"] = kept / len(logits)
        return (weights * losses)[chosen].mean() if kept else None

    def update(self) -> Outcome | None:
        """Step on the rows answered since the last call, then move the statistics."""
        if len(self._graphs) < len(self._waiting):
            self._renorms.drop()
        outcome = super().update()
        self._renorms.settle(self.params.momentum)
        return outcome

    def learned(self, before: Weights, after: Weights) -> None:
        """Drop what waiting forwards saw: it belongs to weights that are no more."""
        super().learned(before, after)
        self._renorms.drop()

    def reset(self) -> None:
        """Return to the source model and forget statistics and class frequencies."""
        super().reset()
        self._renorms.reset()
        self._frequency = torch.full_like(self._frequency, 1 / len(self._frequency))

    def state_dict(self) -> State:
        """Class frequencies and statistics beside what every gradient method holds."""
        return super().state_dict() | {"frequency": self._frequency, "renorm": self._renorms.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._frequency = state["frequency"].to(self.context.device, copy=True)
        self._renorms.load_state_dict(state["renorm"])


def class_weights(frequency: Tensor, labels: Tensor, tempering: float = 1.0) -> Tensor:
    """Weights ``(n,)`` of mean 1 for rows of predicted classes ``labels (n,)``, given ``frequency (K,)``."""
    rarity = frequency.clamp(min=1e-12).pow(-tempering)[labels]
    return rarity * (len(labels) / rarity.sum())
