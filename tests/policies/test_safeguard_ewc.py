from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.interfaces import StepKind
from policies.safeguards.ewc import EWC
from policies.stepping import SafeStepper
from tests.policies.builders import context_of, labelled, linear_model, same, weights_of

KIND = StepKind.LEARNING


class Logistic(nn.Module):
    """Two classes with logits ``(0, w x)``: class 1 has the chance sigma(w x)."""

    def __init__(self, weight: float = math.log(3)) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([weight]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), self.w * x], 1)


class Plain(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(values))


def ewc(model: nn.Module, **params: Any) -> EWC:
    return EWC(EWC.Params(**params), context_of(model))


def with_fisher(model: nn.Module, fisher: list[float], anchor: list[float], **params: Any) -> EWC:
    guard = ewc(model, normalise=False, decay=0.0, **params)
    state = guard.state_dict()
    state |= {"fisher": {"theta": torch.tensor(fisher)}, "anchor": {"theta": torch.tensor(anchor)}, "updates": 1}
    guard.load_state_dict(state)
    return guard


def learn(guard: EWC, model: nn.Module, rows: Tensor, labels: list[int]) -> None:
    """What a labelled step does to the Fisher."""
    guard.observe(labelled(rows, labels))
    guard.penalty(model, KIND)


def fisher_of(guard: EWC) -> float:
    value: Tensor = guard.state_dict()["fisher"]["w"]
    return float(value)


def test_penalty_and_gradient_equal_the_reference() -> None:
    model = Plain([2.0, 5.0])
    guard = with_fisher(model, [2.0, 0.0], [1.0, 1.0], strength=3, proximal=False)
    penalty = guard.penalty(model, KIND)
    assert penalty is not None
    assert penalty.item() == pytest.approx(3.0)
    assert torch.autograd.grad(penalty, model.theta)[0].tolist() == [6.0, 0.0]


def test_the_proximal_step_is_stable_where_the_explicit_one_diverges() -> None:
    model = Plain([1.0])
    guard = with_fisher(model, [1.0], [0.0], strength=100)
    assert guard.penalty(model, KIND) is None
    model.theta.grad = torch.zeros(1)
    guard.after_step(model, KIND, 0.1)
    assert model.theta.item() == pytest.approx(1 / 11)
    explicit = Plain([1.0])
    pull = with_fisher(explicit, [1.0], [0.0], strength=100, proximal=False).penalty(explicit, KIND)
    assert pull is not None
    assert 1 - 0.1 * float(torch.autograd.grad(pull, explicit.theta)[0]) == pytest.approx(-9)


def test_the_minimum_balances_task_and_anchor() -> None:
    model = Plain([4.0])
    guard = with_fisher(model, [1.0], [0.0], strength=3, proximal=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        SafeStepper([guard]).step(model, optimizer, (model.theta - 4).square().sum() / 2, KIND)
    assert model.theta.item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "label", "expected"),
    [("exact", 0, 0.1875), ("exact", 1, 0.1875), ("observed", 1, 0.0625), ("observed", 0, 0.5625)],
)
def test_the_fisher_of_a_logistic_model_equals_the_reference(labels: str, label: int, expected: float) -> None:
    model = Logistic()
    guard = ewc(model, labels=labels, decay=0.0)
    learn(guard, model, torch.ones(1, 1), [label])
    assert fisher_of(guard) == pytest.approx(expected, abs=1e-6)


def test_sampled_labels_estimate_the_fisher_without_bias() -> None:
    model = Logistic()
    guard = ewc(model, rows=400, decay=0.0)
    learn(guard, model, torch.ones(400, 1), [0] * 400)
    deviation = math.sqrt(0.75 * 0.0625**2 + 0.25 * 0.5625**2 - 0.1875**2) / 20
    assert abs(fisher_of(guard) - 0.1875) < 3 * deviation


def test_gradients_are_squared_row_by_row() -> None:
    model = Logistic(0.0)
    guard = ewc(model, labels="observed", decay=0.0)
    learn(guard, model, torch.ones(2, 1), [0, 1])
    assert fisher_of(guard) == pytest.approx(0.25)


def test_the_fisher_decays_and_its_start_from_zero_is_corrected() -> None:
    model = Logistic()
    guard = ewc(model, labels="exact", decay=0.9, every=1, normalise=False, proximal=False, strength=2)
    for _ in range(3):
        learn(guard, model, torch.ones(1, 1), [0])
    assert fisher_of(guard) == pytest.approx(0.1875 * (1 - 0.9**3))
    moved = Logistic(math.log(3) + 1)
    penalty = guard.penalty(moved, KIND)
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.1875)


def test_a_normalised_fisher_has_mean_one() -> None:
    model = linear_model()
    guard = ewc(model, proximal=False, strength=2)
    learn(guard, model, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), [0, 1] * 4)
    count = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    penalty = guard.penalty(model, KIND)
    assert penalty is not None
    assert penalty.item() == pytest.approx(count, rel=1e-4)


@pytest.mark.parametrize("proximal", [True, False])
def test_without_a_fisher_training_is_plain_bit_for_bit(proximal: bool) -> None:
    guarded, plain = linear_model(), linear_model()
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    for model, guards in ((guarded, [ewc(guarded, proximal=proximal)]), (plain, [])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            SafeStepper(guards).step(model, optimizer, model(rows).square().mean(), KIND)
    assert same(weights_of(guarded), weights_of(plain))


def test_only_parameters_that_were_stepped_are_pulled() -> None:
    model = linear_model()
    guard = ewc(model, strength=10)
    learn(guard, model, torch.ones(2, 3), [0, 1])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before = weights_of(model)
    model.get_parameter("2.bias").grad = torch.zeros(2)
    guard.after_step(model, KIND, 0.1)
    after = weights_of(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["2.bias"]


def test_the_anchor_moves_with_the_release() -> None:
    model = linear_model()
    guard = ewc(model)
    release = {name: tensor + 1 for name, tensor in weights_of(model).items()}
    guard.released(release)
    assert same(guard.state_dict()["anchor"], release)


def test_a_reset_forgets_the_fisher_and_keeps_the_anchor() -> None:
    model = linear_model()
    guard = ewc(model, proximal=False)
    learn(guard, model, torch.ones(2, 3), [0, 1])
    guard.reset()
    assert guard.penalty(model, KIND) is None
    assert not any(bool(f.any()) for f in guard.state_dict()["fisher"].values())


def test_bad_rows_never_reach_the_fisher_and_nothing_else_is_touched() -> None:
    model = linear_model()
    guard = ewc(model)
    before = weights_of(model)
    rows = torch.ones(3, 3)
    rows[0, 0] = float("nan")
    rows[1] = 1e38
    learn(guard, model, rows, [0, 1, 0])
    learn(guard, model, torch.zeros(0, 3), [])
    assert all(bool(f.isfinite().all()) for f in guard.state_dict()["fisher"].values())
    assert same(before, weights_of(model))
    assert all(p.grad is None for p in model.parameters())


def test_a_restored_safeguard_goes_on_bit_for_bit() -> None:
    model = linear_model()
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    one, two = ewc(model, every=2, rows=4), ewc(model, every=2, rows=4)
    for _ in range(3):
        learn(one, model, rows, [0, 1] * 3)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for guard in (one, two):
        for _ in range(4):
            learn(guard, model, rows.flip(0), [1, 0] * 3)
    assert same(one.state_dict()["fisher"], two.state_dict()["fisher"])
    assert torch.equal(one.state_dict()["generator"], two.state_dict()["generator"])


def test_the_fisher_is_taken_at_the_weights_that_are_stepped_and_not_in_steps_without_labels() -> None:
    live, learner = Logistic(), Logistic(0.0)
    guard = ewc(live, labels="exact", decay=0.0)
    guard.observe(labelled(torch.ones(1, 1), [0]))
    guard.penalty(live, StepKind.ADAPTATION)
    assert fisher_of(guard) == 0
    guard.penalty(learner, KIND)
    assert fisher_of(guard) == pytest.approx(0.25)
