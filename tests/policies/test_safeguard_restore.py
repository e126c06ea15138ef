from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from policies.interfaces import StepKind
from policies.safeguards.restore import Restore
from tests.policies.builders import context_of, linear_model, same, weights_of

ADAPTATION = StepKind.ADAPTATION


def drifted(model: nn.Module, **params: Any) -> Restore:
    guard = Restore(Restore.Params(**params), context_of(model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
            p.grad = torch.zeros_like(p)
    return guard


def source_of(guard: Restore) -> dict[str, torch.Tensor]:
    return weights_of(guard.context.source)


@pytest.mark.parametrize("mode", ["stochastic", "pull"])
@pytest.mark.parametrize("toward", ["release", "source"])
def test_a_rate_of_one_restores_everything_and_zero_nothing(mode: str, toward: str) -> None:
    model = linear_model()
    guard = drifted(model, mode=mode, rate=1.0, toward=toward)
    guard.after_step(model, ADAPTATION, 0.1)
    assert same(weights_of(model), source_of(guard))
    model = linear_model()
    guard = drifted(model, mode=mode, rate=0.0, toward=toward)
    before = weights_of(model)
    guard.after_step(model, ADAPTATION, 0.1)
    assert same(weights_of(model), before)


def test_the_restored_share_is_the_rate() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    guard = drifted(model, rate=0.01)
    before = model.weight.detach().clone()
    guard.after_step(model, ADAPTATION, 0.1)
    changed = model.weight != before
    assert abs(float(changed.double().mean()) - 0.01) < 3e-4
    assert torch.equal(model.weight[changed], source_of(guard)["weight"][changed])


def test_a_pull_shortens_the_distance_by_the_rate() -> None:
    model = linear_model()
    guard = drifted(model, mode="pull", rate=0.25)
    guard.after_step(model, ADAPTATION, 0.1)
    away = [p - source_of(guard)[name] for name, p in model.named_parameters()]
    assert all(torch.allclose(d, torch.full_like(d, 0.75), atol=1e-6) for d in away)


def test_only_stepped_parameters_are_restored() -> None:
    model = linear_model()
    guard = drifted(model, rate=1.0)
    model.get_parameter("0.weight").grad = None
    before = weights_of(model)
    guard.after_step(model, ADAPTATION, 0.1)
    assert torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    assert torch.equal(model.state_dict()["2.weight"], source_of(guard)["2.weight"])


def test_labelled_steps_are_restored_only_when_asked() -> None:
    for steps, restored in (("adaptation", False), ("all", True)):
        model = linear_model()
        guard = drifted(model, rate=1.0, steps=steps)
        guard.after_step(model, StepKind.LEARNING, 0.1)
        assert same(weights_of(model), source_of(guard)) is restored


def test_the_anchor_follows_the_release_unless_it_is_the_source() -> None:
    for toward, follows in (("release", True), ("source", False)):
        model = linear_model()
        guard = drifted(model, rate=1.0, toward=toward)
        release = {name: tensor + 5 for name, tensor in source_of(guard).items()}
        source = source_of(guard)
        guard.released(release)
        guard.after_step(model, ADAPTATION, 0.1)
        assert same(weights_of(model), release if follows else source)
        assert same(source_of(guard), source)


@pytest.mark.parametrize("toward", ["release", "source"])
def test_a_restored_safeguard_goes_on_bit_for_bit(toward: str) -> None:
    left, right = linear_model(), linear_model()
    one, two = drifted(left, rate=0.3, toward=toward), drifted(right, rate=0.3, toward=toward)
    one.released({name: tensor + 2 for name, tensor in source_of(one).items()})
    one.after_step(left, ADAPTATION, 0.1)
    right.load_state_dict(left.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    one.after_step(left, ADAPTATION, 0.1)
    two.after_step(right, ADAPTATION, 0.1)
    assert same(weights_of(left), weights_of(right))
