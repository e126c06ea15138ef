"""SAR: sharpness-aware entropy minimisation on reliable rows, with recovery."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.gradient import Anchor, Anchored, GradientAdaptation, GradientParams
from policies.interfaces import Context, State
from policies.sharpness import sharp


class SAR(Anchored, GradientAdaptation):
    """Minimises the entropy of reliable rows where the loss is flat, and returns to the source before it collapses.

    Reference: Niu et al., "Towards stable test-time adaptation in dynamic wild world" (ICLR 2023).

    Equations, with ``E0 = margin ln K``:

    - ``R1 = {i: H_i(phi) < E0}``, ``g`` the gradient of the mean entropy over ``R1``;
    - ``phi' = phi + rho g / (||g|| + 1e-12)``, the norm over all adapted parameters;
    - ``R2 = {i in R1: H_i(phi') < E0}``, ``L = mean_{R2} H(phi')``; the optimizer steps from ``phi`` along its
      gradient;
    - ``e <- 0.9 e + 0.1 L`` (``L`` at first). Where ``e < recovery ln K``: adapted parameters return to the source's,
      the optimizer is cleared and so is ``e``.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step.

    State: ``e``, the anchor that recovery returns to, the optimizer's moments, and the inputs of batches answered but
    not yet adapted to.

    Deviations: as of `policies.adaptation.tent.Tent`. The original steps though no row is reliable, which momentum
    turns into a move; here there is no step. Its recovery is undone by the line after it; here ``e`` starts anew. Its
    limit is 0.2 nats for any number of classes; ``recovery`` is that of a thousand classes in units of ``ln K``. Late
    layers, which the original leaves out by names of its own networks, are left out by ``exclude``. The anchor is the
    source model's weights, moved along by labelled learning.

    Cost: two forwards and two backwards, one of each where no row is reliable.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "sar"

    class Params(GradientParams):
        """Parameters of SAR.

        Attributes:
            margin: Entropy in units of ``ln K`` below which a row is reliable.
            rho: How far to climb before the second gradient.
            recovery: Running loss in units of ``ln K`` below which to return to the source; 0 never does.
        """

        margin: float = Field(default=0.4, gt=0, le=1)
        rho: float = Field(default=0.05, ge=0)
        recovery: float = Field(default=0.029, ge=0)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._limit = params.margin * math.log(context.num_classes)
        self._floor = params.recovery * math.log(context.num_classes)
        self._anchor = Anchor(context, self.adapted)
        self._running: float | None = None
        self.gauges |= {"kept_ratio": 0.0, "recoveries": 0}

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        entropy = softmax_entropy(logits).entropy
        keep = entropy.detach() < self._limit
        kept = int(keep.sum())
        self.gauges["kept_ratio"] = kept / len(logits)
        if kept == 0:
            return None

        def again() -> Tensor | None:
            higher = softmax_entropy(self._forward(inputs)).entropy
            chosen = higher[keep & (higher.detach() < self._limit)]
            return chosen.mean() if len(chosen) else None

        return sharp(list(self._named.values()), entropy[keep].mean(), self.params.rho, again)

    def _stepped(self) -> None:
        loss = self.gauges["loss"]
        self._running = loss if self._running is None else 0.9 * self._running + 0.1 * loss
        if self._running < self._floor:
            self._anchor.restore(self._named)
            self._optimizer.state.clear()
            self._running = None
            self.gauges["recoveries"] += 1

    def reset(self) -> None:
        """Return to the source model and forget the running loss."""
        super().reset()
        self._running = None

    def state_dict(self) -> State:
        """Anchor and running loss beside what every gradient method holds."""
        return super().state_dict() | {"running": self._running}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._running = state["running"]
