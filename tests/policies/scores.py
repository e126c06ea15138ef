"""A model whose logits are its inputs, so that worked values can be read off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from policies.interfaces import Adaptation
from policies.registry import find
from tests.policies.models import context_for


class Scores(nn.Module):
    """Logits ``weight * x + bias``: the identity until it is moved."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, classes)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm.weight + self.norm.bias


def on_scores(name: str, classes: int = 2, **params: Any) -> Any:
    """An adaptation on a fresh `Scores`."""
    method: type[Adaptation] = find("adaptation", name)
    return method(method.Params.model_validate(params), context_for(Scores(classes), classes=classes))


def logits_of(*rows: list[float], classes: int = 2) -> Tensor:
    """Logits with these probabilities; what a row leaves out gets next to nothing."""
    return torch.tensor([row + [1e-9] * (classes - len(row)) for row in rows]).log()
