"""ETA and EATA: entropy minimisation on reliable, non-redundant rows; EATA adds a pull towards the source."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.gradient import Anchor, Anchored, GradientAdaptation, GradientParams
from policies.interfaces import Context, State
from policies.norm import all_finite


class ETA(GradientAdaptation):
    """Minimises the entropy of confident rows that differ from what was learned from before.

    Reference: Niu et al., "Efficient test-time model adaptation without forgetting" (ICML 2022), without its Fisher
    term; `EATA` has it.

    Equations, with ``E0 = margin ln K`` and the running mean ``m`` of the probabilities of chosen rows:

    - reliable: ``H_i < E0``; not redundant: ``|cos(m, p_i)| < similarity`` (all reliable rows while there is no ``m``);
    - ``L = (1 / |S|) sum_{i in S} w_i H_i`` over the rows ``S`` that are both, ``w_i = exp(E0 - H_i)`` without
      gradient;
    - ``m <- 0.9 m + 0.1 mean_{i in S} p_i``, the plain mean at first.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step; the same forward answers and adapts.

    State: ``m (K,)``, the optimizer's moments, and the inputs of batches answered but not yet adapted to.

    Deviations: as of `policies.adaptation.tent.Tent`. Where ``S`` is empty there is no step and ``m`` stays.
    ``kept_ratio`` tells the share of rows chosen: ``similarity`` depends on the number of classes, and a wrong one
    chooses all rows or none (0.4 suits 10 classes, 0.1 a hundred, 0.05 a thousand).

    Cost: one forward; one backward if any row is chosen.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "eta"

    class Params(GradientParams):
        """Parameters of ETA.

        Attributes:
            margin: Entropy in units of ``ln K`` below which a row is reliable.
            similarity: Cosine with the running mean from which on a row is redundant.
        """

        margin: float = Field(default=0.4, gt=0, le=1)
        similarity: float = Field(default=0.4, gt=0, le=1)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._limit = params.margin * math.log(context.num_classes)
        self._mean: Tensor | None = None
        self.gauges["kept_ratio"] = 0.0

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        entropy = softmax_entropy(logits).entropy
        with torch.no_grad():
            probabilities = logits.softmax(1)
            keep = entropy < self._limit
            if self._mean is not None:
                keep &= F.cosine_similarity(probabilities, self._mean[None]).abs() < self.params.similarity
            kept = int(keep.sum())
            self.gauges["kept_ratio"] = kept / len(logits)
            if kept == 0:
                return None
            mean = (probabilities * keep[:, None]).sum(0) / kept
            self._mean = mean if self._mean is None else torch.lerp(self._mean, mean, 0.1)
            weights = torch.exp(self._limit - entropy) * keep / kept
        return (weights * entropy).sum()

    def reset(self) -> None:
        """Return to the source model and forget the running mean."""
        super().reset()
        self._mean = None

    def state_dict(self) -> State:
        """The running mean beside what every gradient method holds."""
        return super().state_dict() | {"mean": self._mean}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        held: Tensor | None = state["mean"]
        self._mean = None if held is None else held.to(self.context.device, copy=True)


class EATA(Anchored, ETA):
    """ETA with a pull towards the source weights, the stronger the more a weight matters to its predictions.

    Reference: Niu et al., "Efficient test-time model adaptation without forgetting" (ICML 2022).

    Equations: those of `ETA`, and ``L += beta sum_j F_j (phi_j - phi_0,j)^2`` (no factor 1/2) with
    ``F_j = (1 / n) sum_b g_bj^2``, ``g_b`` the gradient of the mean of ``CE(argmax p_i, p_i)`` over batch ``b``.

    Shapes: as of `ETA`.

    State: that of `ETA`, and for every adapted parameter ``F`` and ``phi_0``.

    Deviations: those of `ETA`. The original takes ``F`` from 2000 unlabelled rows like those the model was trained on,
    before it starts. Here it comes from the first ``fisher_rows`` rows of the stream, batch by batch as they are
    adapted to, at the weights of the moment; ``F`` is in force from the first batch on. ``phi_0`` is the source model's
    weights, moved along by labelled learning.

    Cost: as of `ETA`, and one more backward for each batch of the first ``fisher_rows`` rows.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "eata"

    class Params(ETA.Params):
        """Parameters of EATA.

        Attributes:
            beta: Weight of the pull; 1 suits ten classes, 2000 a thousand.
            fisher_rows: Rows of the stream to measure ``F`` on.
        """

        beta: float = Field(default=1.0, ge=0)
        fisher_rows: int = Field(default=2000, ge=1)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._anchor = Anchor(context, self.adapted)
        self._fisher = {name: torch.zeros_like(value) for name, value in self._anchor.values.items()}
        self._batches = 0
        self._rows = 0
        self.gauges["fisher_rows"] = 0

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        if self._rows < self.params.fisher_rows:
            self._measure(logits)
        loss = super()._loss(inputs, logits)
        if loss is None or not self.params.beta:
            return loss
        pulls = [
            (self._fisher[name] * (self._named[name] - value).square()).sum()
            for name, value in self._anchor.values.items()
        ]
        return loss + self.params.beta * torch.stack(pulls).sum()

    def _measure(self, logits: Tensor) -> None:
        """Fold a batch's squared gradient into ``F``; one that is not finite is left out."""
        loss = F.cross_entropy(logits, logits.detach().argmax(1))
        parameters = [self._named[name] for name in self._fisher]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        squares = [gradient.square() for gradient in gradients]
        if not all_finite(squares):
            return
        self._batches += 1
        self._rows += len(logits)
        torch._foreach_lerp_(list(self._fisher.values()), squares, 1 / self._batches)
        self.gauges["fisher_rows"] = self._rows

    def reset(self) -> None:
        """Return to the source model and measure ``F`` anew."""
        super().reset()
        torch._foreach_zero_(list(self._fisher.values()))
        self._batches = self._rows = 0
        self.gauges["fisher_rows"] = 0

    def state_dict(self) -> State:
        """Anchor and Fisher beside what `ETA` holds."""
        return super().state_dict() | {"fisher": dict(self._fisher), "batches": self._batches, "rows": self._rows}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        for name in self._fisher.keys() & state["fisher"].keys():
            self._fisher[name].copy_(state["fisher"][name])
        self._batches, self._rows = int(state["batches"]), int(state["rows"])
        self.gauges["fisher_rows"] = self._rows
