"""Optimizers that leave PyTorch's compiler out are PyTorch's own otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from policies import optimizers
from tests.crash.zygote import Zygote

MADE: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "sgd": (optimizers.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (optimizers.Adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.99)}),
    "adamw": (optimizers.AdamW, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", MADE)
def test_steps_are_those_of_pytorch_bit_for_bit(name: str) -> None:
    ours, theirs, settings = MADE[name]
    ended = []
    for kind in (ours, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = kind(model.parameters(), **settings)
        assert type(optimizer).__name__ == theirs.__name__  # checkpoints name it
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
            assert all(p.grad is not None and p.grad_fn is None for p in model.parameters())
        state = [value for p in model.parameters() for value in optimizer.state[p].values()]
        ended.append([*model.parameters(), *state])
    for one, other in zip(*ended, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_making_and_stepping_one_does_not_import_the_compiler(zygote: Zygote, tmp_path: Path) -> None:
    code = """
import sys, torch
assert "torch._dynamo" not in sys.modules, "what a daemon imports has imported it"
from policies.optimizers import SGD, Adam, AdamW
for kind in (SGD, Adam, AdamW):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert weight[0] < 1 and weight.grad is None
assert "torch._dynamo" not in sys.modules
"""
    life = zygote.start(["version"], {}, tmp_path / "log", before=code)
    assert life.wait(60) == 0, life.words
