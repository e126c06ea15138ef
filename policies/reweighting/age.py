"""Weights by age: half-life decay and timeliness."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.interfaces import Context, LabelledBatch, MethodParams, Reweighting
from policies.units import PositiveDuration


class Age(Reweighting):
    """Weighs newer rows more.

    Reference: timeliness is that of Yuan et al., "Robust test-time adaptation in dynamic scenarios" (CVPR 2023), in
    seconds instead of instances; half-life decay is textbook.

    Equations, with the age ``a = max(now - t, 0)`` in seconds, each divided by its mean over the batch:

    - ``mode: half_life``: ``w = 2^(-a / half_life)``.
    - ``mode: timeliness``: ``w = 2 exp(-a / tau) / (1 + exp(-a / tau))``: flat at first, then falling like ``exp``.

    Shapes: losses ``(N,)`` to weights ``(N,)``.
    State: none; the engine's watermark is the only clock.
    Deviations: a row whose time is not finite counts as new. Weights are relative within a batch: a batch whose rows
    are all old weighs as much as one whose rows are all new.
    Cost: one pass over ``N`` numbers on the CPU.
    """

    name = "age"

    class Params(MethodParams):
        """Parameters of weighting by age.

        Attributes:
            mode: Which of the two curves.
            half_life: Age at which a row weighs half of a new one (mode ``half_life``).
            tau: Time scale of mode ``timeliness``.
            of: Whose age: ``event`` follows the world that the row describes; ``feedback`` follows when its label
                arrived, and so never weighs down rows for having slow labels.
        """

        mode: Literal["half_life", "timeliness"] = "half_life"
        half_life: PositiveDuration = 3600.0
        tau: PositiveDuration = 3600.0
        of: Literal["event", "feedback"] = "event"

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params

    def _weigh(self, batch: LabelledBatch, losses: Tensor) -> Tensor:
        times = batch.times if self.params.of == "event" else batch.feedback_times
        ages = (batch.now - times.double()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0)
        self.gauges["mean_age"] = float(ages.mean())
        if self.params.mode == "half_life":
            logs = ages * (-math.log(2) / self.params.half_life)
        else:
            logs = F.logsigmoid(-ages / self.params.tau)
        weights = torch.exp(logs - logs.max())
        return (weights / weights.mean()).to(losses)
