from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from policies.adaptation.eata import EATA, ETA
from tests.policies.models import batch_of, drive
from tests.policies.scores import logits_of, on_scores


def eta(**params: Any) -> ETA:
    method: ETA = on_scores("eta", 10, **params)
    return method


def eata(**params: Any) -> EATA:
    method: EATA = on_scores("eata", **params)
    return method


def test_a_reliable_row_is_weighted_by_how_sure_it_is() -> None:
    method = eta(lr=0.0)
    drive(method, [batch_of(logits_of([0.75, 0.25], classes=10))])
    # exp(0.4 ln 10 - 0.562335) = 1.431466
    assert method.gauges["loss"] == pytest.approx(1.431466 * 0.562335, abs=1e-5)
    assert method.gauges["kept_ratio"] == 1.0


def test_the_loss_is_the_mean_over_chosen_rows_alone() -> None:
    method = eta(lr=0.0)
    flat = [0.1] * 10
    drive(method, [batch_of(logits_of([0.75, 0.25], flat, flat, flat, classes=10))])
    assert method.gauges["loss"] == pytest.approx(1.431466 * 0.562335, abs=1e-5)
    assert method.gauges["kept_ratio"] == 0.25


def test_rows_like_the_running_mean_are_redundant() -> None:
    method = eta(lr=0.0)
    assert applied_to(method, logits_of([0.97, 0.03], classes=10))
    assert not applied_to(method, logits_of([0.97, 0.03], classes=10))
    assert applied_to(method, logits_of([0.03, 0.97], classes=10))
    assert method.gauges["kept_ratio"] == 1.0


def applied_to(method: ETA, inputs: Tensor) -> bool:
    """Whether the batch led to a loss; with a learning rate of 0 every step changes nothing."""
    method.gauges["kept_ratio"] = 0.0
    method.adapt(batch_of(inputs))
    method.update()
    return method.gauges["kept_ratio"] > 0


def test_the_running_mean_follows_chosen_rows() -> None:
    method = eta(lr=0.0)
    drive(method, [batch_of(logits_of([0.97, 0.03], classes=10))])
    drive(method, [batch_of(logits_of([0.01, 0.99], [0.97, 0.03], classes=10))])
    wanted = torch.zeros(10)
    wanted[:2] = torch.tensor([0.9 * 0.97 + 0.1 * 0.01, 0.9 * 0.03 + 0.1 * 0.99])
    torch.testing.assert_close(method.state_dict()["mean"], wanted, atol=1e-6, rtol=0)


def test_the_fisher_is_the_mean_square_of_batch_gradients() -> None:
    method = eata(lr=0.0, margin=1.0, similarity=1.0)
    # d CE / d bias = p - onehot(argmax): (-.25, .25) and, for the mean of two rows, (-.25 + .4) / 2 = .075
    drive(method, [batch_of(torch.tensor([[3.0, 1.0]]).log())])
    drive(method, [batch_of(torch.tensor([[3.0, 1.0], [2.0, 3.0]]).log())])
    wanted = (0.25**2 + 0.075**2) / 2
    torch.testing.assert_close(method.state_dict()["fisher"]["norm.bias"], torch.full((2,), wanted))
    assert method.gauges["fisher_rows"] == 3


def test_the_pull_is_beta_fisher_distance_squared() -> None:
    method = eata(lr=0.0, beta=2000.0, fisher_rows=1, margin=1.0)
    plain = eata(lr=0.0, beta=0.0, fisher_rows=1, margin=1.0)
    first = batch_of(torch.tensor([[3.0, 1.0]]).log())
    drive(method, [first])
    drive(plain, [first])
    with torch.no_grad():
        for fisher in method.state_dict()["fisher"].values():
            fisher.zero_()
        method.state_dict()["fisher"]["norm.bias"][0] = 2.0
        for live in (method.context.model, plain.context.model):
            live.get_parameter("norm.bias")[0] += 0.1
    drive(method, [batch_of(torch.tensor([[-3.0, 0.0]]))])
    drive(plain, [batch_of(torch.tensor([[-3.0, 0.0]]))])
    assert method.gauges["loss"] - plain.gauges["loss"] == pytest.approx(40.0, rel=1e-5)


def test_the_fisher_stops_after_its_rows_and_reset_measures_anew() -> None:
    method = eata(lr=0.0, fisher_rows=2, margin=1.0)
    drive(method, [batch_of(torch.tensor([[3.0, 1.0]]).log())] * 4)
    assert method.gauges["fisher_rows"] == 2
    method.reset()
    assert method.gauges["fisher_rows"] == 0
    assert not any(bool(fisher.any()) for fisher in method.state_dict()["fisher"].values())


def test_the_anchor_moves_with_labelled_learning() -> None:
    method = eata()
    before = {"norm.bias": torch.zeros(2)}
    method.learned(before, {"norm.bias": torch.tensor([0.5, -0.5])})
    torch.testing.assert_close(method.state_dict()["anchor"]["norm.bias"], torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(method.state_dict()["anchor"]["norm.weight"], torch.ones(2))
    method.reset()
    torch.testing.assert_close(method.state_dict()["anchor"]["norm.bias"], torch.zeros(2))
