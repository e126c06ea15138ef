"""No adaptation: the live model answers as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.interfaces import Adaptation, Batch


class NoAdaptation(Adaptation):
    """Answers with the live model and changes nothing; labelled learning, if any, goes on.

    Reference: the baseline of every test-time adaptation paper ("source" when nothing is learned either).
    Equations: ``z = f(x)``.
    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``.
    State: none.
    Deviations: none.
    Cost: one forward.
    """

    name = "none"

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        logits: Tensor = self.context.model(batch.inputs)
        return logits
