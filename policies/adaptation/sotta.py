"""SoTTA: sure inputs alone, spread over classes, and steps where the loss is flat."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.banked import OneModelBanked
from policies.iabn import TrackingBatchNorm
from policies.interfaces import Context
from policies.memory import KeptInputs
from policies.norm import Blending, NormSelection
from policies.reservoirs import Reservoir
from policies.sharpness import sharp


class SoTTA(OneModelBanked):
    """Adapts on a bank of sure inputs, so that rows of no class at all do no harm.

    Reference: Gong et al., "SoTTA: robust test-time adaptation on noisy data streams" (NeurIPS 2023).

    Equations: inputs whose confidence ``max_k p_k`` reaches ``confidence`` are offered to the bank,
    `policies.reservoirs.Reservoir` in its form that always takes the newcomer. After every ``interval`` inputs, with
    batch statistics on the bank and the mean entropy ``L``: ``phi' = phi + rho g / ||g||`` with ``g = dL/dphi``, and
    one Adam step from ``phi`` along the gradient at ``phi'``. Stored statistics move by ``momentum`` towards the bank's
    at the first of the two forwards.

    Shapes: inputs ``(B, *shape)``, of one shape throughout, to logits ``(B, K)``, those of before the step.

    State: the bank's inputs and generator, Adam's moments, the number of inputs seen, and rows answered but not yet
    offered to the bank. The bank holds raw inputs, so a checkpoint does too.

    Deviations: rows are offered to the bank when `update` runs. A step that is not finite empties the bank. The outcome
    depends on the order of rows.

    Cost: one forward a batch; per ``interval`` inputs two forwards and two backwards on at most ``capacity`` rows.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected, or inputs change their shape.
    """

    name = "sotta"

    class Params(NormSelection):
        """Parameters of SoTTA.

        Attributes:
            confidence: From which confidence on an input is offered to the bank: 0.99 suits 10 classes, 0.66 a
                hundred, 0.33 a thousand.
            capacity: Inputs that the bank holds.
            interval: Inputs between two steps.
            momentum: Share of the bank's statistics in the stored ones at a step.
            rho: How far to climb.
            lr: Adam's learning rate.
        """

        confidence: float = Field(default=0.99, ge=0, le=1)
        capacity: int = Field(default=64, ge=1)
        interval: int = Field(default=64, ge=1)
        momentum: float = Field(default=0.2, ge=0, le=1)
        rho: float = Field(default=0.05, ge=0)
        lr: float = Field(default=1e-3, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        bank = KeptInputs(Reservoir(params.capacity, fair=False, seed=context.seed))
        blending = Blending(context.model, share=params.momentum, unbiased=True, store=True, kind=TrackingBatchNorm)
        super().__init__(params, context, bank, interval=params.interval, blending=blending, lr=params.lr)
        self.params = params
        self.gauges["rows_unsure"] = 0

    def _judged(self, logits: Tensor) -> Tensor:
        _, confidence, label = softmax_entropy(logits)
        return torch.stack([label.double(), confidence.double()])

    def _insert(self, inputs: Tensor, rows: list[tuple[int, float]]) -> None:
        sure = [row for row, (_, confidence) in enumerate(rows) if confidence >= self.params.confidence]
        self.gauges["rows_unsure"] += len(rows) - len(sure)
        if len(sure) < len(rows):
            inputs, rows = inputs[sure], [rows[row] for row in sure]
        self._bank.insert(inputs, rows)

    def _loss(self) -> Tensor:
        loss = softmax_entropy(self._forward()).entropy.mean()

        def again() -> Tensor:
            with self._blending.still():
                return softmax_entropy(self._forward()).entropy.mean()

        top = sharp(list(self._named.values()), loss, self.params.rho, again)
        assert top is not None, "there is always a loss on top"
        return top
