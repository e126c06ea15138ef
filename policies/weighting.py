"""One weight a row from the weights of several methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BISECTIONS = 40
"""Halvings of the tempering exponent's interval: below the resolution of a float32 weight."""


@dataclass(frozen=True, slots=True)
class Composed:
    """Weights to learn with, and what it took to make them.

    Attributes:
        weights: ``(N,)`` on the device and of the type of the first factor; non-negative, finite. Rows of positive
            weight have mean 1, so a row that is left out makes no other row heavier.
        ess_ratio: Effective sample size over the number of rows of positive weight, in (0, 1]; 0 without such rows.
        clipped: How many rows were clipped, to the median's neighbourhood or to the largest share.
        nonfinite: How many rows were left out because a factor was negative or not finite.
        exponent: What all logarithms were multiplied by to keep the effective sample size; 1 leaves them.
    """

    weights: Tensor
    ess_ratio: float
    clipped: int
    nonfinite: int
    exponent: float = 1.0


def compose(
    weights: Sequence[Tensor], *, clip: float = 10.0, ess_floor: float = 0.1, max_share: float = 0.1
) -> Composed:
    """Multiply the weights of all methods, and keep the product from resting on a few rows.

    In this order: multiply as logarithms; leave out rows with a factor that is negative or not finite; clip to
    ``[median / clip, median * clip]``; bound any row's share of the sum by ``max(2 / n, max_share)``; if the effective
    sample size is below its floor, temper every weight to the power that reaches it; scale to mean 1. ``n`` counts the
    rows of positive weight. A weight of exactly zero stays zero.

    One transfer from the device and one back, whatever the number of methods.

    Args:
        weights: One tensor ``(N,)`` a method, at least one (ones where no method is configured).
        clip: Largest ratio of a weight to the median, >= 1; ``inf`` clips nothing.
        ess_floor: Least effective sample size as a share of ``n``, in [0, 1].
        max_share: Largest share of the sum for one row; never less than twice an equal share.

    Raises:
        ValueError: If there is no factor, or the factors differ in shape.
    """
    if not weights or any(factor.shape != weights[0].shape or factor.dim() != 1 for factor in weights):
        raise ValueError(f"expected one or more weights of one shape (N,), got {[tuple(f.shape) for f in weights]}")
    factors = torch.stack([factor.detach() for factor in weights]).cpu().double()
    valid = (factors.isfinite() & (factors >= 0)).all(0)
    logs = factors.clamp_min(0).log().sum(0)
    used = valid & (logs > -math.inf)
    result = torch.zeros_like(logs)
    nonfinite = int((~valid).sum())
    if not bool(used.any()):
        return Composed(result.to(weights[0]), 0.0, 0, nonfinite)
    kept, clipped = _bounded(logs[used], clip, max_share)
    exponent = _exponent(kept, ess_floor)
    rows = _scaled(kept * exponent)
    result[used] = rows
    return Composed(result.to(weights[0]), _ess_ratio(rows), clipped, nonfinite, exponent)


def _scaled(logs: Tensor) -> Tensor:
    """Weights of mean 1 from their logarithms."""
    weights = (logs - logs.max()).exp()
    return weights / weights.mean()


def _ess_ratio(weights: Tensor) -> float:
    """Effective sample size over the number of rows."""
    return float(weights.mean().square() / weights.square().mean())


def _bounded(logs: Tensor, clip: float, max_share: float) -> tuple[Tensor, int]:
    """Logarithms clipped around their median and to the largest share, and how many rows that changed."""
    middle, reach = logs.median(), math.log(clip)
    near = logs.clamp(middle - reach, middle + reach)
    capped = torch.minimum(near, _ceiling(near, max(2 / len(logs), max_share)))
    return capped, int((capped != logs).sum())


def _ceiling(logs: Tensor, share: float) -> Tensor:
    """The logarithm to cut at so that afterwards no weight holds more than ``share`` of the sum.

    Cutting the ``k`` largest at ``c`` while the others sum to ``S`` gives ``c = share (k c + S)``; the right ``k`` is
    the least for which no other weight exceeds ``c``.
    """
    top = logs.max()
    ordered = (logs - top).exp().sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)
    cut = torch.arange(len(logs), dtype=logs.dtype)
    room = 1 - share * cut
    levels = torch.where(room > 0, share * rest / room.clamp_min(1e-12), math.inf)
    fits = (ordered <= levels).nonzero()
    return top + levels[int(fits[0])].log()


def _exponent(logs: Tensor, floor: float) -> float:
    """The largest exponent up to 1 that keeps the effective sample size; the size falls as the exponent grows."""
    if _ess_ratio(_scaled(logs)) >= floor:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _ess_ratio(_scaled(logs * middle)) >= floor else (low, middle)
    return low
