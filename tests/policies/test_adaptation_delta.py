from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.adaptation.delta import DELTA, class_weights
from policies.renorm import RenormBatchNorm
from tests.policies.models import batch_of, context_for, drive
from tests.policies.scores import logits_of, on_scores


@pytest.mark.parametrize(("labels", "wanted"), [([0, 1], [0.4, 1.6]), ([0, 0, 1], [0.5, 0.5, 2.0])])
def test_rare_classes_weigh_more(labels: list[int], wanted: list[float]) -> None:
    weights = class_weights(torch.tensor([0.8, 0.2]), torch.tensor(labels))
    torch.testing.assert_close(weights, torch.tensor(wanted))


def test_a_class_that_is_never_predicted_cannot_take_all_weight() -> None:
    method = on_scores("delta", lr=0.0, momentum=0.0, floor=0.1)
    drive(method, [batch_of(torch.tensor([[60.0, -60.0]]))])
    assert method.state_dict()["frequency"].tolist() == [1.0, 0.0]
    drive(method, [batch_of(logits_of([0.25, 0.75], [0.75, 0.25]))])
    assert method.gauges["loss"] == pytest.approx(0.562335, abs=1e-5), "both rows have the same entropy"
    weights = class_weights(torch.tensor([1.0, 0.05]), torch.tensor([1, 0]))
    torch.testing.assert_close(weights, torch.tensor([20 / 10.5, 1 / 10.5]))


def test_class_frequencies_follow_the_stream() -> None:
    method = on_scores("delta", lr=0.0)
    drive(method, [batch_of(logits_of([0.9, 0.1], [0.7, 0.3]))])
    torch.testing.assert_close(method.state_dict()["frequency"], torch.tensor([0.515, 0.485]))


def renorm() -> RenormBatchNorm:
    layer = RenormBatchNorm(nn.BatchNorm1d(2).eval(), share=1.0, unbiased=False, store=False)
    layer.reset()
    layer.blending = True
    return layer


def test_the_first_batch_is_normalised_by_itself() -> None:
    layer, rows = renorm(), torch.randn(8, 2) * 3 + 1
    torch.testing.assert_close(layer(rows), nn.functional.batch_norm(rows, None, None, training=True))


def test_later_batches_are_normalised_by_the_running_statistics_with_gradients_of_the_batch() -> None:
    layer = renorm()
    first, second = torch.randn(8, 2) * 3 + 1, (torch.randn(8, 2) + 5).requires_grad_()
    layer(first)
    layer.settle(0.95)
    deviation = (first.var(0, correction=0) + layer.eps).sqrt()
    out = layer(second)
    torch.testing.assert_close(out, (second - first.mean(0)) / deviation, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(out.square().sum(), second)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(2), atol=1e-4, rtol=0)  # as the batch's mean moves along
    layer.settle(0.95)
    assert layer.running is not None
    torch.testing.assert_close(layer.running[0], 0.95 * first.mean(0) + 0.05 * second.detach().mean(0))
    wanted = 0.95 * deviation + 0.05 * (second.detach().var(0, correction=0) + layer.eps).sqrt()
    torch.testing.assert_close(layer.running[1], wanted)


def test_statistics_move_once_a_batch_though_waiting_batches_are_forwarded_again() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    once = DELTA(DELTA.Params(lr=0.0), context_for(model, classes=2))
    twice = DELTA(DELTA.Params(lr=0.0), context_for(model, classes=2))
    one, two = torch.randn(6, 2), torch.randn(6, 2) + 1
    drive(once, [batch_of(one)])
    drive(twice, [batch_of(one)])
    for method in (once, twice):
        method.adapt(batch_of(one))
        if method is twice:
            method.learned({}, {})
        method.adapt(batch_of(two))
        method.update()
    torch.testing.assert_close(once.state_dict()["renorm"], twice.state_dict()["renorm"])
