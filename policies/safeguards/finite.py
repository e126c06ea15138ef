"""Bounds on gradients and updates that are finite but absurd."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from policies.interfaces import Context, MethodParams, Safeguard, StepKind

GRADIENT_NORM = "gradient_norm"
"""Reason of a veto: the gradient's norm is above the limit."""


class Finite(Safeguard):
    """Keeps every step within a trust region; what is not finite is never stepped, with this safeguard or without.

    Reference: clipping the gradient's norm is Pascanu et al., "On the difficulty of training recurrent neural networks"
    (ICML 2013); the bound on the update is a trust region, as in LARS (You et al., 2017), over all layers together.

    Equations, with the gradient ``g`` and the update ``d = theta' - theta`` over all parameters that are stepped:

        veto if |g| > veto_norm;   g <- g min(1, clip_norm / |g|);   d <- d min(1, max_update |theta| / |d|)

    State: none; an update is bounded against the weights just before it.
    Deviations: ``max_update`` bounds what the optimizer makes of the gradient (momentum and Adam's normalisation
    included), which clipping gradients does not. Weights that are all zero are not bounded: a share of nothing would
    freeze them. Safeguards after this one in the policy are outside the bound.
    Cost: norms of gradients and weights, and with ``max_update`` one copy of the stepped weights; a host round trip
    with ``veto_norm`` alone.
    """

    name = "finite"

    class Params(MethodParams):
        """Bounds; None leaves one out.

        Attributes:
            clip_norm: Largest L2 norm of the gradient; a longer one is scaled down.
            veto_norm: L2 norm of the gradient above which the step is skipped, reason ``gradient_norm``.
            max_update: Largest L2 norm of an update as a share of the norm of the weights; a longer one is scaled
                down. 0.1 is far above any healthy step and far below one that wrecks a model.
        """

        clip_norm: float | None = Field(default=None, gt=0)
        veto_norm: float | None = Field(default=None, gt=0)
        max_update: float | None = Field(default=0.1, gt=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._before: list[Tensor] = []

    @torch.no_grad()
    def filter_gradients(self, model: nn.Module, kind: StepKind) -> str | None:
        """Clip the gradient, or veto the step."""
        stepped = _stepped(model)
        clip, veto = self.params.clip_norm, self.params.veto_norm
        gradients = [p.grad for p in stepped if p.grad is not None]
        if gradients and (clip is not None or veto is not None):
            norm = get_total_norm(gradients)
            if veto is not None and not float(norm) <= veto:
                return GRADIENT_NORM
            if clip is not None:
                torch._foreach_mul_(gradients, _shrink(norm, norm.new_tensor(clip)))
        if self.params.max_update is not None:
            self._before = [p.detach().clone() for p in stepped]
        return None

    @torch.no_grad()
    def after_step(self, model: nn.Module, kind: StepKind, lr: float) -> None:
        """Shorten an update that is too long."""
        before, self._before = self._before, []
        if self.params.max_update is None or not before:
            return
        after = [p.detach() for p in _stepped(model)]
        moved = [new - old for new, old in zip(after, before, strict=True)]
        length, limit = get_total_norm(moved), get_total_norm(before) * self.params.max_update
        # A weight of exactly 1 gives back the stepped weights bit for bit.
        share = torch.where(limit > 0, _shrink(length, limit), torch.ones_like(limit))
        for new, old in zip(after, before, strict=True):
            new.copy_(torch.where(share < 1, torch.lerp(old, new, share.to(new.dtype)), new))


def _stepped(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a step changes: those with a gradient."""
    return [p for p in model.parameters() if p.grad is not None]


def _shrink(length: Tensor, limit: Tensor) -> Tensor:
    """The factor that brings ``length`` down to ``limit``; 1 where it is within."""
    return (limit / length).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)
