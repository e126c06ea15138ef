from __future__ import annotations

import math

import pytest
import torch

from policies.adaptation.memo import marginal_entropy
from tests.policies.models import batch_of, build, same_weights, source_model, stream, weights_of
from tests.policies.scores import logits_of, on_scores


def test_views_that_disagree_have_the_entropy_of_a_coin() -> None:
    logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]])
    assert marginal_entropy(logits).item() == pytest.approx(0.693147, abs=1e-6)
    assert marginal_entropy(logits[[0, 0]]).item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_is_finite_though_a_class_has_no_probability() -> None:
    logits = torch.tensor([[1000.0, -1000.0], [1000.0, -1000.0]], requires_grad=True)
    marginal_entropy(logits).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_a_row_is_answered_by_weights_of_its_own_step() -> None:
    method = on_scores("memo", views=4, lr=1.0, augmentation="none")
    row = logits_of([0.75, 0.25])
    answer = method.adapt(batch_of(row))
    # Without augmentation it is one step of entropy minimisation: bias -+ 0.205990, weight by the same times x.
    gradient = torch.tensor([-0.205990, 0.205990])
    wanted = row * (1 - gradient * row) - gradient
    torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=0)
    assert method.gauges["loss"] == pytest.approx(0.562335, abs=1e-6)


def test_rows_do_not_see_each_other_and_the_live_model_stays() -> None:
    source = source_model("conv_bn")
    method = build("adaptation", "memo", {"views": 3, "lr": 0.1, "augmentation": "none"}, source)
    batch = next(stream("conv_bn", 1, rows=4))
    together = method.adapt(batch)
    alone = torch.cat([method.adapt(batch_of(row[None])) for row in batch.inputs])
    torch.testing.assert_close(together, alone)
    assert method.update() is None
    assert same_weights(weights_of(method.context.model), weights_of(source))


def test_a_row_whose_step_overflows_is_answered_without_it() -> None:
    method = on_scores("memo", views=2, lr=1e38, augmentation="none")
    row = logits_of([0.75, 0.25]) * 8
    answer = method.adapt(batch_of(row * 1e2))
    assert bool(answer.isfinite().all())
    assert math.isfinite(method.gauges["loss"])
