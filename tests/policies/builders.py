"""Small models and batches for tests of reweighting, safeguards, interpolation and gates."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from policies.interfaces import AuditWindow, Batch, Context, LabelledBatch
from policies.stepping import SafeStepper


def linear_model(inputs: int = 3, classes: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, classes)).eval()


def context_of(model: nn.Module, *, classes: int = 2, seed: int = 7) -> Context:
    source = copy.deepcopy(model).requires_grad_(False)
    return Context(model=model, source=source, num_classes=classes, seed=seed, stepper=SafeStepper())


def labelled(
    inputs: Tensor,
    labels: Sequence[int] | Tensor,
    *,
    ids: Sequence[str] | None = None,
    times: Sequence[float] | None = None,
    feedback_times: Sequence[float] | None = None,
    now: float = 0.0,
) -> LabelledBatch:
    rows = len(inputs)
    seconds = torch.tensor(times if times is not None else [now] * rows, dtype=torch.float64)
    return LabelledBatch(
        ids=tuple(ids) if ids is not None else tuple(f"e{row}" for row in range(rows)),
        inputs=inputs,
        times=seconds,
        groups=(None,) * rows,
        now=now,
        labels=torch.as_tensor(labels, dtype=torch.int64),
        feedback_times=seconds if feedback_times is None else torch.tensor(feedback_times, dtype=torch.float64),
        predicted=torch.full((rows,), -1),
    )


def events(inputs: Tensor) -> Batch:
    rows = len(inputs)
    names = tuple(f"e{row}" for row in range(rows))
    return Batch(ids=names, inputs=inputs, times=torch.zeros(rows).double(), groups=(None,) * rows, now=0.0)


def window_of(
    labels: Tensor, release: Tensor, *, live: Tensor | None = None, inputs: Tensor | None = None
) -> AuditWindow:
    rows = len(labels)
    return AuditWindow(
        inputs=torch.zeros(rows, 1) if inputs is None else inputs,
        labels=labels,
        source=release,
        live=release if live is None else live,
        release=release,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
