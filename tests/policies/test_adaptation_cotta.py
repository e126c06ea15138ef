from __future__ import annotations

import pytest
import torch
from torch import nn

from policies.adaptation.cotta import CoTTA
from tests.policies.models import batch_of, context_for, drive, source_model, stream, weights_of
from tests.policies.scores import logits_of, on_scores

BATCH = logits_of([0.9, 0.1], [0.3, 0.7])


def test_the_teacher_follows_the_student_slowly() -> None:
    method = on_scores("cotta", momentum=0.999, restore=0.0, threshold=0.0, lr=0.0)
    with torch.no_grad():
        method._student["norm.bias"].copy_(torch.tensor([1.0, 0.0]))
    drive(method, [batch_of(BATCH)])
    torch.testing.assert_close(weights_of(method.context.model)["norm.bias"], torch.tensor([0.001, 0.0]))


@pytest.mark.parametrize(("restore", "back"), [(0.0, False), (1.0, True)])
def test_the_student_returns_to_the_source_by_chance(restore: float, back: bool) -> None:
    method = on_scores("cotta", momentum=1.0, restore=restore, threshold=0.0, lr=0.1)
    with torch.no_grad():
        method._student["norm.bias"].copy_(torch.tensor([0.5, -0.5]))
    drive(method, [batch_of(BATCH)])
    start = weights_of(method.context.source)
    assert all(torch.equal(p, start[name]) for name, p in method._student.items()) == back


def test_one_in_a_hundred_returns() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(400, 250)).eval()
    method = CoTTA(CoTTA.Params(restore=0.01), context_for(model, classes=2))
    with torch.no_grad():
        method._student["1.weight"].add_(1.0)
    method._restore()
    back = int((method._student["1.weight"] == method._anchor["1.weight"]).sum())
    assert abs(back - 1000) < 100, "1e5 elements at 0.01 have a standard deviation of 31"


def test_an_unsure_anchor_asks_for_views() -> None:
    sure = on_scores("cotta", threshold=0.6, views=3, augmentation="noise", noise=0.5)
    unsure = on_scores("cotta", threshold=0.9, views=3, augmentation="noise", noise=0.5)
    assert torch.equal(sure.adapt(batch_of(BATCH)), BATCH)
    assert sure.gauges["anchor_confidence"] == pytest.approx(0.8)
    answer = unsure.adapt(batch_of(BATCH))
    assert not torch.equal(answer, BATCH)
    views = torch.Generator().manual_seed(unsure.context.seed)
    drawn = [torch.randn(2, 2, generator=views) for _ in range(3)]
    wanted = BATCH + 0.5 * BATCH.std(0, correction=0) * torch.stack(drawn).mean(0)
    torch.testing.assert_close(answer, wanted)


def test_the_loss_is_the_cross_entropy_with_the_teacher() -> None:
    plain, both = on_scores("cotta", threshold=0.0), on_scores("cotta", threshold=0.0, symmetric=True)
    one, two = logits_of([0.75, 0.25]), logits_of([0.5, 0.5])
    assert plain._loss(one, two).item() == pytest.approx(0.693147, abs=1e-6)
    assert plain._loss(two, one).item() == pytest.approx(0.836988, abs=1e-6)
    assert both._loss(one, two).item() == pytest.approx(0.765068, abs=1e-6)


def test_statistics_of_batch_norm_are_those_of_the_source_for_ever() -> None:
    source = source_model("conv_bn")
    method = CoTTA(CoTTA.Params(threshold=0.0), context_for(source))
    drive(method, stream("conv_bn", 3))
    for name, tensor in method.state_dict()["student"].items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(tensor, source.state_dict()[name])
            assert torch.equal(weights_of(method.context.model)[name], source.state_dict()[name])


def test_labelled_learning_moves_student_and_anchor() -> None:
    method = on_scores("cotta")
    method.learned({"norm.bias": torch.zeros(2)}, {"norm.bias": torch.ones(2)})
    assert method.state_dict()["student"]["norm.bias"].tolist() == [1.0, 1.0]
    assert method.state_dict()["anchor"]["norm.bias"].tolist() == [1.0, 1.0]
