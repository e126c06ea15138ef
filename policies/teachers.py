"""Copies of the live model that a method keeps beside it: students and anchors."""

from __future__ import annotations

import torch
from torch import nn

from policies.interfaces import Weights


@torch.no_grad()
def follow(model: nn.Module, adapted: frozenset[str], before: Weights, after: Weights) -> None:
    """Move a copy as a labelled step moved the live model.

    Args:
        model: The copy.
        adapted: Names of the weights in which the copy differs from the live model: these move by the difference, and
            the rest becomes what it is in the live model.
        before: Live weights of before.
        after: Live weights of now, changed names alone.
    """
    own = model.state_dict()
    for name, new in after.items():
        if name in adapted:
            own[name].add_(new - before[name])
        else:
            own[name].copy_(new)
