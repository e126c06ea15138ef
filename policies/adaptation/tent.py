"""TENT: entropy minimisation over normalisation layers."""

from __future__ import annotations

from torch import Tensor

from kernels import softmax_entropy
from policies.gradient import GradientAdaptation, GradientParams


class Tent(GradientAdaptation):
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

    class Params(GradientParams):
        """Parameters of TENT: which layers adapt, and by which optimizer."""

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor:
        return softmax_entropy(logits).entropy.mean()
