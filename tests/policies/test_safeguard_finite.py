from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.interfaces import Outcome, StepKind
from policies.safeguards.finite import Finite
from policies.stepping import SafeStepper
from tests.policies.builders import context_of, same, weights_of

KIND = StepKind.ADAPTATION


def one_weight(value: float = 1.0) -> nn.Linear:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def step(model: nn.Module, slope: tuple[float, float], lr: float = 1.0, **params: object) -> Outcome:
    guard = Finite(Finite.Params.model_validate({"max_update": None} | params), context_of(model))
    loss = (model(torch.eye(2)).flatten() * torch.tensor(slope)).sum()
    return SafeStepper([guard]).step(model, torch.optim.SGD(model.parameters(), lr=lr), loss, KIND)


def test_a_long_gradient_is_scaled_to_the_limit() -> None:
    model = one_weight()
    assert step(model, (3.0, 4.0), clip_norm=2.5).applied
    assert torch.allclose(model.weight, torch.tensor([[1 - 1.5, 1 - 2.0]]))


def test_a_short_gradient_stays_bit_for_bit() -> None:
    model, plain = one_weight(), one_weight()
    step(model, (0.3, 0.7), clip_norm=2.5, veto_norm=5, max_update=10)
    step(plain, (0.3, 0.7))
    assert same(weights_of(model), weights_of(plain))


def test_a_gradient_beyond_the_veto_is_skipped_with_its_reason() -> None:
    model = one_weight()
    before = weights_of(model)
    assert step(model, (3.0, 4.0), veto_norm=4.9) == Outcome(False, "gradient_norm")
    assert same(before, weights_of(model))


def test_an_update_is_shortened_to_its_share_of_the_weights() -> None:
    model = one_weight()
    assert step(model, (30.0, 40.0), max_update=0.1).applied
    moved = model.weight.detach() - 1
    assert float(moved.norm()) == pytest.approx(0.1 * 2**0.5, rel=1e-5)
    assert torch.allclose(moved / moved.norm(), torch.tensor([[-0.6, -0.8]]), atol=1e-5)


def test_weights_of_zero_can_leave_zero() -> None:
    model = one_weight(0.0)
    assert step(model, (3.0, 4.0), max_update=0.1).applied
    assert torch.equal(model.weight, torch.tensor([[-3.0, -4.0]]))


def test_a_bound_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Finite.Params(clip_norm=0)
