"""Losses whose gradient was taken elsewhere: at the top of a climb (SAM), or by finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import get_total_norm


class _GivenGradient(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * upstream.to(gradient.dtype) for gradient in ctx.gradients)


def with_gradients(value: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> Tensor:
    """The scalar ``value``, whose gradient for each of ``parameters`` is the one given."""
    with torch.enable_grad():
        loss: Tensor = _GivenGradient.apply(value.detach(), list(gradients), *parameters)
    return loss


def sharp(
    parameters: Sequence[nn.Parameter], loss: Tensor, rho: float, again: Callable[[], Tensor | None]
) -> Tensor | None:
    """The loss at the top of a climb, with the gradient it has there.

    With ``g`` the gradient of ``loss``: ``phi' = phi + rho g / (||g||_2 + 1e-12)``, the norm over all parameters.

    Args:
        parameters: ``phi``; at ``phi'`` while ``again`` runs, and bit for bit as before afterwards.
        loss: A scalar, at ``phi``.
        rho: How far to climb.
        again: Gives the loss at the present parameters, with gradients; None where there is none.

    Returns:
        A scalar that stands for a loss at ``phi``: its value and gradient are those at ``phi'``.
    """
    gradients = torch.autograd.grad(loss, list(parameters), materialize_grads=True)
    before = [parameter.detach().clone() for parameter in parameters]
    plain = [parameter.detach() for parameter in parameters]
    scale = rho / (get_total_norm(gradients) + 1e-12)
    torch._foreach_add_(plain, [gradient * scale for gradient in gradients])
    try:
        top = again()
        if top is None:
            return None
        gradients = torch.autograd.grad(top, list(parameters), materialize_grads=True)
    finally:
        torch._foreach_copy_(plain, before)
    return with_gradients(top, parameters, gradients)
