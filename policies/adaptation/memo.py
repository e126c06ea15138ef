"""MEMO: every row gets a model of its own, adapted to views of that row alone."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from policies.augment import Augmentation, augment
from policies.interfaces import Adaptation, Batch, Context, MethodParams, State
from policies.memory import fastest
from policies.norm import Blending, all_finite


class MEMO(Adaptation):
    """Answers each row with weights that make its own views agree, and forgets them: the live model never moves.

    Reference: Zhang et al., "MEMO: test time robustness via adaptation and augmentation" (NeurIPS 2022).

    Equations, per row, with ``n`` augmented views and their probabilities ``p_j``:

        l_k = logsumexp_j(ln p_jk) - ln n,   L = -sum_k exp(l_k) l_k,   theta_row = theta - lr dL/dtheta

    over all weights; the answer is ``f(x; theta_row)``. BatchNorm layers use ``1 / (prior_strength + 1)`` of the
    statistics of the views, and of the row for its answer.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of after the step.

    State: the generator.

    Deviations: views are those of `policies.augment.strong_image`, not AugMix. Plain gradient descent for one step,
    which is what SGD from nothing does; it moves weights that are thrown away, so no safeguard sees it. A row whose
    step is not finite is answered without one. The views of one row have no spread to scale noise by: on inputs that
    are no images it is absolute. Inputs of whole numbers are not augmented.

    Cost: for every row one forward and backward on ``views`` rows over all weights and one forward: for few and
    valuable requests alone.
    """

    name = "memo"

    class Params(MethodParams):
        """Parameters of MEMO.

        Attributes:
            views: ``n``; 32 suits small images, 64 large ones.
            lr: Learning rate.
            prior_strength: How many rows the stored statistics are worth.
            augmentation: How views are made, see `policies.augment.augment`.
            image_noise: Standard deviation of the pixel noise of ``image``.
            noise: Standard deviation of the noise on other inputs, in their own unit.
        """

        views: int = Field(default=32, ge=1)
        lr: float = Field(default=0.005, ge=0)
        prior_strength: float = Field(default=16, ge=0)
        augmentation: Augmentation = "auto"
        image_noise: float = Field(default=0.005, ge=0)
        noise: float = Field(default=0.1, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        share = 1 / (params.prior_strength + 1)
        self._blending = Blending(context.model, share=share, unbiased=True, store=False)
        self._generator = torch.Generator(context.device).manual_seed(context.seed)
        self.gauges |= {"rows_unstepped": 0, "loss": 0.0}

    def _adapt(self, batch: Batch) -> Tensor:
        with self._blending.active():
            answers = [self._answer(row[None]) for row in fastest(batch.inputs)]
        return torch.cat(answers)

    def _answer(self, row: Tensor) -> Tensor:
        """Logits ``(1, K)`` of one row by a model of its own."""
        weights = {name: p.detach().requires_grad_() for name, p in self.context.model.named_parameters()}
        with torch.enable_grad():
            loss = marginal_entropy(functional_call(self.context.model, weights, (self._views(row),)))
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
        with torch.no_grad():
            moved = [p.sub(g, alpha=self.params.lr) for p, g in zip(weights.values(), gradients, strict=True)]
            finite = all_finite(moved)
            self.gauges["loss"] = float(loss.detach().nan_to_num())
            self.gauges["rows_unstepped"] += not finite
            chosen = dict(zip(weights, moved, strict=True)) if finite else weights
            answer: Tensor = functional_call(self.context.model, chosen, (row,))
        return answer

    def _views(self, row: Tensor) -> Tensor:
        """Augmented copies ``(n, *shape)`` of one row ``(1, *shape)``."""
        rows = row.repeat(self.params.views, *[1] * (row.dim() - 1))
        kind = self.params.augmentation
        if rows.is_floating_point() and (kind == "noise" or (kind == "auto" and rows.dim() != 4)):
            drawn = torch.randn(rows.shape, generator=self._generator, device=rows.device, dtype=rows.dtype)
            return rows.add_(drawn, alpha=self.params.noise)
        return augment(kind, rows, self._generator, image_noise=self.params.image_noise, noise=0.0)

    def reset(self) -> None:
        """Return to the source model and to the generator's start."""
        super().reset()
        self._generator.manual_seed(self.context.seed)

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._blending.undo()

    def state_dict(self) -> State:
        """The generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        self._generator.set_state(state["generator"].cpu())


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean probability over the rows of ``logits (n, K)``."""
    mean = torch.logsumexp(logits.log_softmax(1), 0) - math.log(len(logits))
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
    return -(mean.exp() * mean).sum()
