"""NOTE: instance-aware BatchNorm and a reservoir balanced by predicted class."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from policies.banked import OneModelBanked
from policies.iabn import InstanceAwareBatchNorm, TrackingBatchNorm
from policies.interfaces import Context, PolicyError
from policies.memory import KeptInputs
from policies.norm import Blending, NormSelection
from policies.reservoirs import Reservoir


class NOTE(OneModelBanked):
    """Answers row by row with stored statistics, and adapts on a bank that classes share fairly.

    Reference: Gong et al., "NOTE: robust continual test-time adaptation against temporal correlation" (NeurIPS 2022).

    Equations: BatchNorm layers become `policies.iabn.InstanceAwareBatchNorm`; the bank is
    `policies.reservoirs.Reservoir` in its fair form. After every ``interval`` inputs one Adam step on the bank, with
    batch statistics, of

        L = (1 / (n K)) sum_i sum_k -p_ik ln(p_ik + 1e-6)

    which is ``1 / K`` of the usual mean entropy; stored statistics move by ``momentum`` towards the bank's.

    Shapes: inputs ``(B, *shape)``, of one shape throughout, to logits ``(B, K)``, those of before the step.

    State: the bank's inputs, its counts and generator, Adam's moments, the number of inputs seen, and rows answered but
    not yet offered to the bank. The bank holds raw inputs, so a checkpoint does too.

    Deviations: the source model should have been trained with instance-aware layers; others change their answers where
    rows are far from the stored statistics, so ``instance_aware: false`` keeps BatchNorm as it is. Rows are offered to
    the bank when `update` runs. A step that is not finite empties the bank. The outcome depends on the order of rows.

    Cost: one forward a batch; per ``interval`` inputs one forward and one backward on at most ``capacity`` rows.

    Raises:
        PolicyError: If the model has no BatchNorm layer with running statistics, or inputs change their shape.
    """

    name = "note"

    class Params(NormSelection):
        """Parameters of NOTE.

        Attributes:
            capacity: Inputs that the bank holds.
            interval: Inputs between two steps.
            instance_aware: Whether rows are corrected by their own statistics.
            standard_errors: How far off a row may be before it is corrected.
            momentum: Share of the bank's statistics in the stored ones at a step.
            lr: Adam's learning rate.
        """

        capacity: int = Field(default=64, ge=1)
        interval: int = Field(default=64, ge=1)
        instance_aware: bool = True
        standard_errors: float = Field(default=4.0, ge=0)
        momentum: float = Field(default=0.01, ge=0, le=1)
        lr: float = Field(default=1e-4, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        bank = KeptInputs(Reservoir(params.capacity, fair=True, seed=context.seed))
        kind = InstanceAwareBatchNorm if params.instance_aware else TrackingBatchNorm
        blending = Blending(context.model, share=params.momentum, unbiased=True, store=True, kind=kind)
        if not len(blending):
            raise PolicyError(
                "adaptation 'note' does nothing for this model: it has no BatchNorm layer with running statistics; "
                "choose 'tent', 'lame' or 'none'"
            )
        for layer in blending.layers:
            setattr(layer, "k", params.standard_errors)  # noqa: B010
        super().__init__(params, context, bank, interval=params.interval, blending=blending, lr=params.lr)

    def _loss(self) -> Tensor:
        return smoothed_entropy(self._forward())


def smoothed_entropy(logits: Tensor) -> Tensor:
    """Mean of ``-p ln(p + 1e-6)`` over rows and classes of ``logits (n, K)``."""
    probabilities = logits.softmax(1)
    return -(probabilities * torch.log(probabilities + 1e-6)).mean()
