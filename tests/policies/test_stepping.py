from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.interfaces import MethodParams, Outcome, Safeguard, StepKind
from policies.stepping import SafeStepper
from tests.policies.builders import context_of, linear_model, same, weights_of

KIND = StepKind.LEARNING
ROWS = torch.tensor([[1.0, -1.0, 0.5], [0.2, 0.4, -2.0]])


class Guard(Safeguard):
    name = "spy"

    def __init__(self, model: nn.Module, veto: str | None = None, pull: float = 0.0, poison: bool = False) -> None:
        super().__init__(MethodParams(), context_of(model))
        self.veto, self.pull, self.poison = veto, pull, poison
        self.calls: list[str] = []

    def penalty(self, model: nn.Module, kind: StepKind) -> Tensor | None:
        self.calls.append("penalty")
        return self.pull * sum((p.square().sum() for p in model.parameters()), torch.zeros(())) if self.pull else None

    def filter_gradients(self, model: nn.Module, kind: StepKind) -> str | None:
        self.calls.append("filter")
        return self.veto

    def after_step(self, model: nn.Module, kind: StepKind, lr: float) -> None:
        self.calls.append(f"after lr={lr}")
        if self.poison:
            next(model.parameters()).mul_(float("nan"))


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1),
        "momentum": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam(model.parameters(), lr=0.1),
    }


def warmed(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = linear_model()
    optimizer = optimizers(model)[name]
    assert SafeStepper().step(model, optimizer, model(ROWS).square().mean(), KIND) == Outcome(True)
    return model, optimizer


def memory(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return copy.deepcopy(list(optimizer.state_dict()["state"].values()))


def unchanged(before: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> bool:
    after = optimizer.state_dict()["state"].values()
    return len(before) == len(after) and all(
        old.keys() == new.keys()
        and all(torch.equal(old[k], new[k]) if isinstance(old[k], Tensor) else old[k] == new[k] for k in old)
        for old, new in zip(before, after, strict=True)
    )


def test_a_step_without_safeguards_is_the_plain_step_bit_for_bit() -> None:
    model, plain = linear_model(), linear_model()
    ours, theirs = (torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, plain))
    for _ in range(3):
        assert SafeStepper().step(model, ours, model(ROWS).square().mean(), KIND).applied
        theirs.zero_grad()
        plain(ROWS).square().mean().backward()
        theirs.step()
    assert same(weights_of(model), weights_of(plain))


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize(
    ("factor", "reason"),
    [(float("nan"), "nonfinite_loss"), (float("inf"), "nonfinite_loss"), (0.0, "empty")],
)
def test_a_bad_loss_leaves_weights_and_optimizer_bit_for_bit(name: str, factor: float, reason: str) -> None:
    model, optimizer = warmed(name)
    weights, held = weights_of(model), memory(optimizer)
    outcome = SafeStepper().step(model, optimizer, model(ROWS).square().mean() * factor, KIND)
    assert outcome == Outcome(False, reason)
    assert same(weights, weights_of(model))
    assert unchanged(held, optimizer)


def test_a_loss_that_depends_on_no_parameter_is_empty() -> None:
    model, optimizer = warmed("adam")
    assert SafeStepper().step(model, optimizer, torch.tensor(1.0), KIND) == Outcome(False, "empty")
    stray = torch.ones((), requires_grad=True)
    assert SafeStepper().step(model, optimizer, stray * 2, KIND) == Outcome(False, "empty")


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_in_any_layer_is_not_stepped(layer: int, bad: float) -> None:
    model, optimizer = warmed("adam")
    weights, held = weights_of(model), memory(optimizer)
    model.get_parameter(f"{layer}.weight").register_hook(lambda grad: grad * bad)
    outcome = SafeStepper().step(model, optimizer, model(ROWS).square().mean(), KIND)
    assert outcome == Outcome(False, "nonfinite_gradient")
    assert same(weights, weights_of(model))
    assert unchanged(held, optimizer)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_step_that_overflows_is_undone_with_the_optimizer(name: str) -> None:
    model, optimizer = warmed(name)
    weights, held = weights_of(model), memory(optimizer)
    outcome = SafeStepper([Guard(model, poison=True)]).step(model, optimizer, model(ROWS).square().mean(), KIND)
    assert outcome == Outcome(False, "nonfinite_weights")
    assert same(weights, weights_of(model))
    assert unchanged(held, optimizer)
    assert SafeStepper().step(model, optimizer, model(ROWS).square().mean(), KIND).applied


def test_the_first_step_undone_leaves_an_optimizer_without_memory() -> None:
    model = linear_model()
    optimizer = optimizers(model)["adam"]
    assert not SafeStepper([Guard(model, poison=True)]).step(model, optimizer, model(ROWS).sum(), KIND).applied
    assert memory(optimizer) == []


def test_an_optimizer_poisoned_by_an_overflowing_square_is_undone_though_weights_are_finite() -> None:
    model, optimizer = warmed("adam")
    held = memory(optimizer)
    assert SafeStepper().step(model, optimizer, model(ROWS).sum() * 1e25, KIND) == Outcome(False, "nonfinite_weights")
    assert unchanged(held, optimizer)


def test_a_veto_carries_its_reason_and_stops_what_follows() -> None:
    model, optimizer = warmed("adam")
    weights, held = weights_of(model), memory(optimizer)
    first, second = Guard(model, veto="too_steep"), Guard(model)
    outcome = SafeStepper([first, second]).step(model, optimizer, model(ROWS).sum(), KIND)
    assert outcome == Outcome(False, "too_steep")
    assert (first.calls, second.calls) == (["penalty", "filter"], ["penalty"])
    assert same(weights, weights_of(model))
    assert unchanged(held, optimizer)


def test_penalties_are_added_and_hooks_hear_the_learning_rate() -> None:
    model, plain = linear_model(), linear_model()
    guard = Guard(model, pull=0.5)
    SafeStepper([guard]).step(model, optimizers(model)["sgd"], model(ROWS).sum(), KIND)
    penalised = plain(ROWS).sum() + 0.5 * sum(p.square().sum() for p in plain.parameters())
    SafeStepper().step(plain, optimizers(plain)["sgd"], penalised, KIND)
    assert guard.calls == ["penalty", "filter", "after lr=0.1"]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_parameters_outside_the_optimizer_get_no_gradient_and_stay() -> None:
    model = linear_model()
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)  # type: ignore[index]
    before = weights_of(model)
    assert SafeStepper().step(model, head, model(ROWS).square().sum(), KIND).applied
    assert torch.equal(before["0.weight"], model.state_dict()["0.weight"])
    assert not torch.equal(before["2.weight"], model.state_dict()["2.weight"])
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_of_a_labelled_step_is_clipped_and_one_within_the_limit_is_not() -> None:
    for size, expected in ((3e30, 0.5), (0.25, 0.25)):
        model = nn.Linear(1, 1, bias=False)
        before = model.weight.item()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = size * model(torch.ones(1, 1)).sum()
        assert SafeStepper(clip_norm=0.5).step(model, optimizer, loss, StepKind.LEARNING).applied
        assert before - model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_steps_of_adaptation_have_safeguards_alone_to_clip_them() -> None:
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    SafeStepper(clip_norm=0.5).step(model, optimizer, 8.0 * model(torch.ones(1, 1)).sum(), StepKind.ADAPTATION)
    assert before - model.weight.item() == pytest.approx(8.0)
