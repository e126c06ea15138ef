from __future__ import annotations

import math

import pytest
import torch

from policies.adaptation.roid import corrected, diversity_weights, likelihood_ratio, symmetric_cross_entropy
from tests.policies.models import batch_of, drive, weights_of
from tests.policies.scores import logits_of, on_scores


def test_the_likelihood_ratio_of_a_worked_row() -> None:
    assert likelihood_ratio(torch.tensor([[0.75, 0.25]])).item() == pytest.approx(-0.549316, abs=1e-6)


def test_the_likelihood_ratio_keeps_a_gradient_where_the_row_is_sure() -> None:
    logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    likelihood_ratio(logits.softmax(1)).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) == pytest.approx(1.18, abs=0.01)


def test_a_row_that_is_all_sure_has_a_finite_loss() -> None:
    logits = torch.tensor([[100.0, 0.0]], requires_grad=True)
    loss = likelihood_ratio(logits.softmax(1)).sum()
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_the_symmetric_cross_entropy_of_a_worked_pair() -> None:
    one, two = logits_of([0.75, 0.25]), logits_of([0.5, 0.5])
    assert symmetric_cross_entropy(one, two).item() == pytest.approx(0.765068, abs=1e-6)
    assert symmetric_cross_entropy(two, one).item() == pytest.approx(0.765068, abs=1e-6)


def test_weights_follow_diversity_and_certainty() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]])
    entropy = -(probabilities * probabilities.log()).sum(1)
    mean = torch.tensor([0.9, 0.1])
    distance = 1 - torch.nn.functional.cosine_similarity(probabilities, mean[None])
    scaled = distance / distance.max()
    kept = scaled >= scaled.mean()
    assert kept.tolist() == [False, True, False]
    weights = diversity_weights(mean, probabilities, entropy, 1 / 3)
    # The second row is the most diverse and, with the first, the surest: exp(1 * 1 / (1 / 3)).
    torch.testing.assert_close(weights, torch.tensor([0.0, math.exp(3), 0.0]))


def test_the_prior_of_a_worked_batch() -> None:
    logits = logits_of([0.9, 0.1], [0.9, 0.1])
    added = corrected(logits) - logits
    torch.testing.assert_close(added.exp(), torch.tensor([[0.689474, 0.310526]] * 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_answers_hold_the_power_of_the_prior_that_is_asked_for(weight: float) -> None:
    rows = logits_of([0.9, 0.1], [0.6, 0.4])
    prior = (corrected(rows) - rows)[0].exp()
    answered = on_scores("roid", prior_weight=weight).adapt(batch_of(rows)).softmax(1)
    wanted = rows.softmax(1) * prior**weight
    torch.testing.assert_close(answered, wanted / wanted.sum(1, keepdim=True))


def test_rows_that_are_not_finite_do_not_touch_the_prior_of_others() -> None:
    rows = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.5, 0.0]])
    torch.testing.assert_close(corrected(rows)[[0, 2]], corrected(rows[[0, 2]]))


def test_the_running_mean_follows_the_batch() -> None:
    method = on_scores("roid", lr=0.0)
    drive(method, [batch_of(logits_of([0.9, 0.1], [0.7, 0.3]))])
    torch.testing.assert_close(method.state_dict()["mean"], torch.tensor([0.53, 0.47]))


def test_weights_are_pulled_to_the_source_after_a_step() -> None:
    pulled, free = on_scores("roid", pull=0.25, lr=0.1), on_scores("roid", pull=0.0, lr=0.1)
    batch = batch_of(logits_of([0.9, 0.1], [0.3, 0.7]))
    drive(pulled, [batch])
    drive(free, [batch])
    start = weights_of(free.context.source)
    after = weights_of(free.context.model)
    for name, value in weights_of(pulled.context.model).items():
        torch.testing.assert_close(value, start[name] + 0.75 * (after[name] - start[name]))
        assert not torch.equal(value, start[name])
