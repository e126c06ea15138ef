from __future__ import annotations

import pytest
import torch

from policies.adaptation.cmf import filtered
from tests.policies.models import batch_of, drive, weights_of
from tests.policies.scores import logits_of, on_scores


def test_the_filter_follows_worked_values() -> None:
    variance, shares, variances = 0.0, [], []
    for _ in range(3):
        share, variance = filtered(variance, 0.99, 0.005)
        shares.append(share)
        variances.append(variance)
    assert shares == pytest.approx([0.995, 0.990172, 0.985554], abs=1e-6)
    assert variances == pytest.approx([0.004975, 0.009779, 0.014374], abs=1e-6)


def test_the_filter_comes_to_rest() -> None:
    share, variance = 1.0, 0.0
    for _ in range(500):
        share, variance = filtered(variance, 0.99, 0.005)
    assert share == pytest.approx(0.939991, abs=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1.0])
def test_extreme_noise_keeps_the_share_within_its_bounds(noise: float) -> None:
    share, variance = filtered(0.5, 0.99, noise)
    assert 0.89 <= share <= 1
    assert variance >= 0
    assert filtered(0.0, 0.99, noise)[0] in (1.0, 0.89)


def test_the_hidden_model_trails_the_live_one() -> None:
    method = on_scores("cmf", lr=0.1, pull=0.5, process_noise=1e4)
    drive(method, [batch_of(logits_of([0.9, 0.1], [0.3, 0.7]))])
    hidden, live = method.state_dict()["hidden"], weights_of(method.context.model)
    # 4 values * 1e4 / 38400 is clamped to 1, so the share is at its least: h = 0.89 phi_s + 0.11 phi.
    for name, start in weights_of(method.context.source).items():
        stepped = start + (hidden[name] - start) / 0.11
        torch.testing.assert_close(live[name], (stepped + hidden[name]) / 2)
        assert not torch.equal(live[name], start)


def test_labelled_learning_moves_anchor_and_hidden_model() -> None:
    method = on_scores("cmf")
    method.learned({"norm.bias": torch.zeros(2)}, {"norm.bias": torch.ones(2)})
    state = method.state_dict()
    assert state["hidden"]["norm.bias"].tolist() == state["anchor"]["norm.bias"].tolist() == [1.0, 1.0]
