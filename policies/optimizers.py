"""Optimizers without PyTorch's compiler, and their state as tensors and JSON values, by parameter name.

PyTorch's own ones ask ``torch._dynamo`` to leave their methods alone, and import it for that when the first one is
made: a start takes as long again as importing PyTorch itself, for a compiler that nothing here uses.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from policies.interfaces import State

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def _plain(kind: type[Kind]) -> type[Kind]:
    """The same optimizer, bit for bit, whose methods are those that the compiler's decorators wrap."""
    own: dict[str, Any] = {
        "step": torch.no_grad()(inspect.unwrap(kind.step)),  # the decorator that is left out switches gradients off
        "add_param_group": inspect.unwrap(kind.add_param_group),
        "zero_grad": inspect.unwrap(kind.zero_grad),
        "__doc__": kind.__doc__,
        "__module__": __name__,
    }
    return type(kind.__name__, (kind,), own)


SGD = _plain(torch.optim.SGD)
Adam = _plain(torch.optim.Adam)
AdamW = _plain(torch.optim.AdamW)


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
