"""The operations as plainly as PyTorch can say them: what every other implementation must agree with.

Arguments are those that `kernels.dispatch` has checked already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SoftmaxEntropy(NamedTuple):
    """What `softmax_entropy` gives for logits ``(B, K)``.

    Attributes:
        entropy: ``(B,)`` entropy of the softmax in nats, float32 (float64 for float64 logits), differentiable.
        confidence: ``(B,)`` largest probability, of the dtype of ``entropy``, without gradient.
        argmax: ``(B,)`` int64 class of the largest logit, the first one of several.
    """

    entropy: Tensor
    confidence: Tensor
    argmax: Tensor


def accumulator(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if any of ``dtypes`` is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each target towards its source; see `kernels.dispatch.lerp_`."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            wide = accumulator(target.dtype, source.dtype)
            start, end = target.to(wide), source.to(wide)
            # Counted from the nearer end, so that a weight of 1 gives the source exactly.
            near_start = abs(weight) < 0.5
            target.copy_(start + weight * (end - start) if near_start else end - (1 - weight) * (end - start))


def softmax_entropy(logits: Tensor) -> SoftmaxEntropy:
    """Entropy, confidence and argmax of the softmax; see `kernels.dispatch.softmax_entropy`."""
    wide = logits.to(accumulator(logits.dtype))
    shifted = wide - wide.detach().amax(1, keepdim=True)
    probabilities = shifted.exp() / shifted.exp().sum(1, keepdim=True)
    # p ln p is 0 at p = 0; the logarithm sees 1 there, so that its gradient is 0 too.
    logarithms = torch.where(probabilities == 0, torch.ones_like(probabilities), probabilities).log()
    entropy = -(probabilities * logarithms).sum(1)
    return SoftmaxEntropy(entropy, probabilities.detach().amax(1), logits.detach().argmax(1))
