"""TENT: entropy minimisation over normalisation layers."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.interfaces import Adaptation, Batch, Context, Outcome, State, StepKind, Weights
from policies.norm import Blending, NormSelection, only_require_grad
from policies.optimizers import load_optimizer_state, optimizer_state

_log = logging.getLogger(__name__)


class Tent(Adaptation):
    """Minimises the entropy of its own predictions, one step per batch, over normalisation layers' affine parameters.

    Reference: Wang et al., "Tent: Fully test-time adaptation by entropy minimization" (ICLR 2021).

    Equations: ``p = softmax(f(x))``, ``H(p) = -sum_k p_k ln p_k``, ``L = mean_i H(p_i)``,
    ``phi <- Optimizer(phi, dL/dphi)``. The gradient of one row is ``dH/dz_k = -p_k (ln p_k + H)``. BatchNorm layers
    normalise with the statistics of the batch (BN-1).

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step; the same forward answers and adapts.

    State: the optimizer's moments, and the inputs of batches answered but not yet adapted to.

    Deviations: layers are chosen by type and name (the original takes BatchNorm2d alone). The model stays in eval
    mode, so dropout never runs. Batches answered between two calls of `update` make one step, on the mean over all
    their rows. Rows without finite logits are left out; nothing left means no step at all. BatchNorm layers use batch
    statistics only while this method answers or adapts, not in labelled learning.

    Cost: one forward, one backward.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "tent"

    class Params(NormSelection):
        """Parameters of TENT.

        Attributes:
            optimizer: ``adam`` (betas 0.9 and 0.999) or ``sgd`` (momentum 0.9).
            lr: Learning rate; 1e-3 suits Adam and batches of 200, 2.5e-4 SGD and batches of 64.
        """

        optimizer: Literal["adam", "sgd"] = "adam"
        lr: float = Field(default=1e-3, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._named = params.parameters(context.model)
        self.adapted = frozenset(self._named)
        self._blending = Blending(context.model, share=1.0, unbiased=False, store=False)
        chosen = list(self._named.values())
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(chosen, lr=params.lr)
            if params.optimizer == "adam"
            else torch.optim.SGD(chosen, lr=params.lr, momentum=0.9)
        )
        self._waiting: list[Tensor] = []
        self._entropies: list[Tensor] = []
        counts = sum(p.numel() for p in chosen), len(chosen)
        _log.info("tent adapts %d values in %d parameters", *counts)
        self.gauges |= {"adapted_values": counts[0], "rows_rejected": 0, "entropy": 0.0}

    def _adapt(self, batch: Batch) -> Tensor:
        logits, entropy = self._forward(batch.inputs)
        self._waiting.append(batch.inputs)
        self._entropies.append(entropy)
        return logits.detach()

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the entropy ``(n,)`` of the rows whose logits are finite, both with gradients."""
        with torch.enable_grad(), self._blending.active(), only_require_grad(self.context.model, self.adapted):
            logits: Tensor = self.context.model(inputs)
            finite = logits.detach().isfinite().all(1)
            good = logits if bool(finite.all()) else logits[finite]
            entropy: Tensor = softmax_entropy(good)[0]
        self.gauges["rows_rejected"] += len(logits) - len(good)
        return logits, entropy

    def update(self) -> Outcome | None:
        """Step on the mean entropy of the rows answered since the last call."""
        if not self._waiting:
            return None
        if len(self._entropies) < len(self._waiting):
            # The forward that answered is stale: weights have moved since, or this is a restart.
            self._entropies = [self._forward(inputs)[1] for inputs in self._waiting]
        entropy = torch.cat(self._entropies)
        self._forget()
        if len(entropy) == 0:
            return Outcome(applied=False, reason="empty")
        loss = entropy.mean()
        outcome = self.context.stepper.step(self.context.model, self._optimizer, loss, StepKind.ADAPTATION)
        self.gauges["entropy"] = float(loss.detach())
        return outcome

    def _forget(self) -> None:
        self._waiting, self._entropies = [], []

    def learned(self, before: Weights, after: Weights) -> None:
        """Drop the graphs of waiting batches: they belong to weights that are no more."""
        self._entropies = []

    def reset(self) -> None:
        """Return to the source model's weights; clear the optimizer and what waits."""
        super().reset()
        self._optimizer.state.clear()
        self._forget()

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._forget()
        self._blending.undo()

    def state_dict(self) -> State:
        """The optimizer's moments and the waiting inputs."""
        return {"optimizer": optimizer_state(self._optimizer, self._named), "waiting": list(self._waiting)}

    def load_state_dict(self, state: State) -> None:
        """Take over a state; waiting inputs go through the model again at the next update."""
        load_optimizer_state(self._optimizer, self._named, state["optimizer"])
        self._waiting = [inputs.to(self.context.device) for inputs in state["waiting"]]
        self._entropies = []
