"""The operations with PyTorch's own fused calls: for CPUs, and for GPUs where Triton is missing or wrong.

Arguments are those that `kernels.dispatch` has checked already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import SoftmaxEntropy, accumulator

LOWEST_LOGARITHM = -1e30
"""Stands for ln 0 where it is multiplied by a probability of 0, which -inf would turn into NaN."""


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each target towards its source; see `kernels.dispatch.lerp_`."""
    same: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            if target.dtype == source.dtype:
                starts, ends = same.setdefault(target.dtype, ([], []))
                starts.append(target)
                ends.append(source)
            else:
                wide = accumulator(target.dtype, source.dtype)
                target.copy_(torch.lerp(target.to(wide), source.to(wide), weight))
        for starts, ends in same.values():
            torch._foreach_lerp_(starts, ends, weight)


def softmax_entropy(logits: Tensor) -> SoftmaxEntropy:
    """Entropy, confidence and argmax of the softmax; see `kernels.dispatch.softmax_entropy`."""
    return SoftmaxEntropy(*_SoftmaxEntropy.apply(logits))


class _SoftmaxEntropy(torch.autograd.Function):
    """Saves ``p`` and ``p ln p``, from which the gradient takes one pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logarithms = torch.log_softmax(logits, 1, dtype=accumulator(logits.dtype))
        peaks, argmax = logarithms.max(1)
        probabilities = logarithms.clamp_min_(LOWEST_LOGARITHM).exp()
        terms = logarithms.mul_(probabilities)
        entropy = terms.sum(1).neg_()
        confidence = peaks.exp_()
        ctx.save_for_backward(probabilities, terms, entropy)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(confidence, argmax)
        return entropy, confidence, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Tensor:
        """``dH/dz_k = -p_k (ln p_k + H)``."""
        probabilities, terms, entropy = ctx.saved_tensors
        gradient = torch.addcmul(terms, probabilities, entropy[:, None]).mul_(-upstream[:, None])
        return gradient.to(ctx.dtype)
