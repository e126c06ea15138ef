from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.adaptation.mezo import directional
from tests.policies.models import batch_of, drive, same_weights, weights_of
from tests.policies.scores import logits_of, on_scores

BATCH = logits_of([0.9, 0.1], [0.3, 0.7])


@pytest.mark.parametrize("eps", [1e-3, 1e-1, 1.0])
def test_the_slope_of_a_parabola_is_exact_for_any_distance(eps: float) -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    slope, (z,) = directional([weight], eps, torch.Generator().manual_seed(0), lambda: weight.square().sum())
    assert slope.item() == pytest.approx(2 * z.item(), rel=1e-9)
    assert (weight - 0.1 * slope * z / z.square()).item() == pytest.approx(0.8, rel=1e-9)


def test_weights_come_back_though_the_loss_fails() -> None:
    weight = nn.Parameter(torch.ones(3))

    def fails() -> torch.Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        directional([weight], 1e-3, torch.Generator(), fails)
    assert weight.tolist() == [1.0, 1.0, 1.0]


def test_a_run_can_be_repeated_from_seeds_and_slopes() -> None:
    one, two = on_scores("mezo", lr=0.1), on_scores("mezo", lr=0.1)
    drive(one, [batch_of(BATCH)] * 4)
    drive(two, [batch_of(BATCH)] * 4)
    assert same_weights(weights_of(one.context.model), weights_of(two.context.model))
    assert not same_weights(weights_of(one.context.model), weights_of(one.context.source))


def test_the_direction_agrees_with_the_gradient() -> None:
    method = on_scores("mezo", lr=0.01, eps=1e-2)
    losses = []
    for _ in range(60):
        drive(method, [batch_of(BATCH)])
        losses.append(method.gauges["loss"])
    assert losses[-1] < losses[0] - 0.01
