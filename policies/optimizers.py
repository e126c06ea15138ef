"""The state of a torch optimizer as tensors and JSON values, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from policies.interfaces import State


def optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> State:
    """What the optimizer holds for each parameter, by name; tensors are not copied.

    Hyperparameters are left out: they come from the policy, which may have changed since.
    """
    return {name: dict(optimizer.state[p]) for name, p in named.items() if p in optimizer.state}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: Mapping[str, State]
) -> None:
    """Take over a copy of what `optimizer_state` gave; a parameter that it does not name starts afresh."""
    optimizer.state.clear()
    for name in [name for name in state if name in named]:
        # Steps are counted on the CPU unless the optimizer says otherwise, so tensors keep the device they have.
        optimizer.state[named[name]] = {
            key: _like(value, named[name]) if isinstance(value, Tensor) else value for key, value in state[name].items()
        }


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``value``, on the device of the parameter where it is shaped like it."""
    return value.detach().clone().to(parameter.device if value.shape == parameter.shape else value.device)
