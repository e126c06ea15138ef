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

    def _adapt(self, batch: Batch) -> Tensor:
        with torch.inference_mode():  # a hundredth faster than no_grad on a small network
            logits: Tensor = self.context.model(batch.inputs)
        return logits.clone()  # outside of it, so that whoever gets the answer may use it as any other tensor
