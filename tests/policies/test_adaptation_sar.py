from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from policies.interfaces import Adaptation, StepKind
from policies.sharpness import sharp, with_gradients
from policies.stepping import SafeStepper
from tests.policies.models import applied, batch_of, drive
from tests.policies.scores import logits_of, on_scores


def test_a_climb_gives_the_gradient_at_the_top_to_the_step_at_the_bottom() -> None:
    model = nn.Linear(1, 1, bias=False)
    weight = next(model.parameters())
    nn.init.ones_(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def loss() -> torch.Tensor:
        seen.append(weight.item())
        return weight.square().sum()

    top = sharp([weight], loss(), 0.05, loss)
    assert top is not None
    assert seen == [1.0, pytest.approx(1.05)]
    assert weight.item() == 1.0
    assert top.item() == pytest.approx(1.05**2)
    assert SafeStepper().step(model, optimizer, top, StepKind.ADAPTATION).applied
    assert weight.item() == pytest.approx(0.79)


def test_given_gradients_are_those_of_the_loss() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = with_gradients(torch.tensor(7.0), [weight], [torch.tensor([3.0, -4.0])])
    (2 * loss).backward()
    assert loss.item() == 7.0
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0, -8.0]


def test_a_climb_without_a_loss_on_top_leaves_everything() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    assert sharp([weight], weight.square().sum(), 0.05, lambda: None) is None
    assert weight.tolist() == [1.0, 2.0]


def test_rows_that_are_unsure_on_top_are_left_out() -> None:
    # Climbing raises the entropy of the only reliable row above the limit.
    limit = 0.562335 / math.log(2) + 1e-4
    method = on_scores("sar", margin=limit, rho=0.5)
    method.adapt(batch_of(logits_of([0.75, 0.25])))
    assert method.update().reason == "empty"
    assert method.gauges["kept_ratio"] == 1.0
    assert stepped(on_scores("sar", margin=limit, rho=0.0))


def stepped(method: Adaptation) -> bool:
    method.adapt(batch_of(logits_of([0.75, 0.25])))
    return applied(method.update())


def test_without_a_climb_it_is_entropy_minimisation_of_reliable_rows() -> None:
    method = on_scores("sar", optimizer="sgd", lr=1.0, rho=0.0, margin=0.9)
    drive(method, [batch_of(logits_of([0.75, 0.25], [0.5, 0.5]))])
    wanted = torch.tensor([0.205990, -0.205990])
    torch.testing.assert_close(method.context.model.state_dict()["norm.bias"], wanted, atol=1e-6, rtol=0)
    assert method.gauges["kept_ratio"] == 0.5


def test_the_running_loss_is_averaged() -> None:
    method = on_scores("sar", lr=0.0, rho=0.0, margin=1.0, recovery=0.0)
    drive(method, [batch_of(logits_of([0.75, 0.25]))])
    drive(method, [batch_of(logits_of([0.9, 0.1]))])
    assert method.state_dict()["running"] == pytest.approx(0.9 * 0.562335 + 0.1 * 0.325083, abs=1e-6)
