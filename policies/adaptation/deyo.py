"""DeYO: entropy minimisation on rows whose answer depends on the shape of what they show."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.augment import shuffled
from policies.gradient import GradientAdaptation, GradientParams
from policies.interfaces import Context, State


class DeYO(GradientAdaptation):
    """Minimises the entropy of rows that are fairly sure and lose confidence once their parts are shuffled.

    Reference: Lee et al., "Entropy is not enough for test-time adaptation" (ICLR 2024).

    Equations, with ``x'`` the row with its parts shuffled and ``c = argmax p_i``:

    - ``PLPD_i = p_i[c] - p'_i[c]``;
    - ``S = {i: H_i < 0.5 ln K and PLPD_i > drop}`` with the 0.5 of ``margin``;
    - ``w_i = exp(E0 - H_i) + exp(PLPD_i)`` without gradient, ``E0 = 0.4 ln K``; ``L = mean_{i in S} w_i H_i``.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step. Images ``(C, H, W)`` are cut into
    ``patches x patches`` pieces, other rows along their first dimension into ``patches ** 2`` blocks.

    State: the generator, the optimizer's moments, and the inputs of batches answered but not yet adapted to.

    Deviations: as of `policies.adaptation.tent.Tent`. Images whose sides are no multiple of ``patches`` are shuffled up
    to the largest multiple, not resized. Rows of one value are not shuffled, so their PLPD is 0 and they never adapt.
    Late layers, which the original leaves out by names of its own networks, are left out by ``exclude``.

    Cost: one forward, one without gradients on the rows that are fairly sure, and a backward where a row is chosen.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "deyo"

    class Params(GradientParams):
        """Parameters of DeYO.

        Attributes:
            margin: Entropy in units of ``ln K`` below which a row may be chosen.
            centre: Entropy in units of ``ln K`` at which the first part of the weight is 1.
            drop: Loss of confidence above which a row is chosen; 0.2 for hostile streams, 0.3 for mild ones.
            patches: Pieces along each side.
        """

        margin: float = Field(default=0.5, gt=0, le=1)
        centre: float = Field(default=0.4, ge=0, le=1)
        drop: float = Field(default=0.2, ge=-1, lt=1)
        patches: int = Field(default=4, ge=1)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        scale = math.log(context.num_classes)
        self._limit, self._centre = params.margin * scale, params.centre * scale
        self._generator = torch.Generator(context.device).manual_seed(context.seed)
        self.gauges |= {"kept_ratio": 0.0, "sure_ratio": 0.0}

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        entropy, confidence, label = softmax_entropy(logits)
        sure = (entropy.detach() < self._limit).nonzero().flatten()
        self.gauges |= {"sure_ratio": len(sure) / len(logits), "kept_ratio": 0.0}
        if len(sure) == 0:
            return None
        with torch.no_grad(), self._blending.active():
            parts: Tensor = self.context.model(shuffled(inputs[sure], self.params.patches, self._generator))
            drop = confidence[sure] - parts.softmax(1).gather(1, label[sure, None])[:, 0]
            chosen = (drop > self.params.drop).nonzero().flatten()
            rows = sure[chosen]
            weights = certainty_and_drop(entropy[rows], drop[chosen], self._centre)
        self.gauges["kept_ratio"] = len(rows) / len(logits)
        return (weights * entropy[rows]).mean() if len(rows) else None

    def reset(self) -> None:
        """Return to the source model and to the generator's start."""
        super().reset()
        self._generator.manual_seed(self.context.seed)

    def state_dict(self) -> State:
        """The generator beside what every gradient method holds."""
        return super().state_dict() | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"].cpu())


def certainty_and_drop(entropy: Tensor, drop: Tensor, centre: float) -> Tensor:
    """Weights ``(n,)`` of rows with these entropies and losses of confidence."""
    return torch.exp(centre - entropy) + torch.exp(drop)
