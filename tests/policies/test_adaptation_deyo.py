from __future__ import annotations

import math

import pytest
import torch

from policies.adaptation.deyo import certainty_and_drop
from policies.augment import shuffled
from tests.policies.models import batch_of, drive, weights_of
from tests.policies.scores import logits_of, on_scores


def test_the_weight_adds_certainty_and_the_loss_of_confidence() -> None:
    weight = certainty_and_drop(torch.tensor(0.562335), torch.tensor(0.3), 0.4 * math.log(10))
    assert weight.item() == pytest.approx(2.781325, abs=1e-5)


def test_rows_that_lose_their_confidence_are_chosen() -> None:
    method = on_scores("deyo", lr=0.0, margin=0.9, drop=0.2)
    drive(method, [batch_of(logits_of(*[[0.75, 0.25]] * 200))])
    # Two blocks change places in every second row on average, and then half of the confidence is gone.
    assert method.gauges["sure_ratio"] == 1.0
    assert 0.3 < method.gauges["kept_ratio"] < 0.7
    weight = math.exp(0.4 * math.log(2) - 0.562335) + math.exp(0.5)
    assert method.gauges["loss"] == pytest.approx(weight * 0.562335, abs=1e-5)


@pytest.mark.parametrize("row", [[0.5, 0.5], [0.75, 0.25]])
def test_nothing_chosen_moves_nothing_though_there_is_momentum(row: list[float]) -> None:
    method = on_scores("deyo", optimizer="sgd", lr=0.1, margin=0.9, drop=-0.9)
    drive(method, [batch_of(logits_of([0.9, 0.1]))])
    before = weights_of(method.context.model)
    strict = method.params.model_copy(update={"drop": 0.99})
    method.params = strict
    method.adapt(batch_of(logits_of(row)))
    assert method.update().reason == "empty"
    assert all(torch.equal(t, before[key]) for key, t in method.context.model.state_dict().items())


def test_patches_of_images_change_places_as_a_whole() -> None:
    images = torch.arange(2 * 3 * 64.0).view(2, 3, 8, 8)
    before = images.clone()
    moved = shuffled(images, 4, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    for old, new in zip(images, moved, strict=True):
        pieces = {
            tuple(p.flatten().tolist())
            for p in old.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).flatten(0, 1)
        }
        after = {
            tuple(p.flatten().tolist())
            for p in new.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).flatten(0, 1)
        }
        assert pieces == after
        assert not torch.equal(old, new)


def test_what_a_cut_leaves_over_stays() -> None:
    images = torch.rand(3, 1, 9, 10)
    moved = shuffled(images, 4, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, :, 8:], images[:, :, 8:])
    assert torch.equal(moved[:, :, :, 8:], images[:, :, :, 8:])
    rows = torch.rand(3, 7)
    moved = shuffled(rows, 2, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 4:], rows[:, 4:])
    assert torch.equal(moved.sort(1).values, rows.sort(1).values)
    assert torch.equal(shuffled(rows[:, :1], 4, torch.Generator()), rows[:, :1])
