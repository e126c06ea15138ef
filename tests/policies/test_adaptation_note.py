from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from policies.adaptation.note import NOTE
from policies.iabn import InstanceAwareBatchNorm, TrackingBatchNorm, shrunk
from policies.reservoirs import Reservoir
from tests.policies.models import batch_of, build, context_for, drive, source_model, stream, weights_of
from tests.policies.scores import logits_of, on_scores


def iabn(k: float = 4.0) -> InstanceAwareBatchNorm:
    layer = InstanceAwareBatchNorm(nn.BatchNorm2d(1, eps=0.0).eval(), share=0.01, unbiased=True, store=True)
    layer.k = k
    return layer


def image(mean: float, var: float) -> torch.Tensor:
    """64 values with this mean and unbiased variance."""
    values = torch.tensor([-1.0, 1.0]).repeat(32) * math.sqrt(var * 63 / 64)
    return (values + mean).view(1, 1, 8, 8)


@pytest.mark.parametrize(("mean", "wanted"), [(0.4, 0.0), (0.7, 0.2), (-0.7, -0.2)])
def test_the_mean_is_corrected_beyond_four_standard_errors(mean: float, wanted: float) -> None:
    out = iabn()(image(mean, 1.0))
    torch.testing.assert_close(out, image(mean, 1.0) - wanted)


@pytest.mark.parametrize(("var", "wanted"), [(1.5, 1.0), (2.0, 1.287303)])
def test_the_variance_is_corrected_beyond_four_standard_errors(var: float, wanted: float) -> None:
    out = iabn()(image(0.0, var))
    torch.testing.assert_close(out, image(0.0, var) / math.sqrt(wanted), rtol=1e-5, atol=1e-5)


def test_a_row_without_variance_stays_finite() -> None:
    out = iabn(k=0.1)(torch.full((1, 1, 8, 8), 3.0))
    assert bool(shrunk(torch.tensor([-2.0, 0.5]), torch.tensor([1.0, 1.0])).eq(torch.tensor([-1.0, 0.0])).all())
    assert bool(out.isfinite().all())


def test_training_mode_normalises_by_the_batch_and_moves_the_stored_statistics() -> None:
    plain, tracking = nn.BatchNorm2d(3, momentum=0.2).train(), nn.BatchNorm2d(3).eval()
    layer = TrackingBatchNorm(tracking, share=0.2, unbiased=True, store=True)
    layer.blending = True
    rows = torch.rand(5, 3, 4, 4)
    torch.testing.assert_close(layer(rows), plain(rows))
    torch.testing.assert_close(layer.running_var, plain.running_var)
    layer.store = False
    before = layer.running_mean.clone()
    torch.testing.assert_close(layer(rows), plain(rows))
    assert torch.equal(layer.running_mean, before)


def test_an_instance_aware_batch_moves_statistics_as_torch_does() -> None:
    plain = nn.BatchNorm2d(1, momentum=0.01).train()
    layer = iabn()
    layer.blending = True
    rows = torch.rand(5, 1, 4, 4)
    plain(rows)
    layer(rows)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_a_new_class_takes_the_place_of_the_largest() -> None:
    for fair in (True, False):
        for seed in range(5):
            bank = Reservoir(2, fair=fair, seed=seed)
            for label in (0, 0, 1):
                assert bank.insert(label, 0.0) is not None
            assert bank.counts() == {0: 1, 1: 1}


def test_every_input_of_a_class_has_the_same_chance_to_stay() -> None:
    kept = [0] * 20
    for seed in range(400):
        bank, held = Reservoir(4, fair=True, seed=seed), {}
        for number in range(20):
            slot = bank.insert(0, 0.0)
            if slot is not None:
                held[slot] = number
        for number in held.values():
            kept[number] += 1
    # 80 of 400 each, standard deviation 8.
    assert all(40 < count < 120 for count in kept)


def test_without_fairness_the_newcomer_always_stays() -> None:
    bank = Reservoir(2, fair=False, seed=0)
    assert all(bank.insert(0, 0.0) is not None for _ in range(20))
    assert len(bank) == 2


def test_unsure_inputs_never_reach_the_bank_of_sotta() -> None:
    method = on_scores("sotta", confidence=0.9, capacity=1, interval=100)
    rows = logits_of([0.5, 0.5], [0.95, 0.05], [0.99, 0.01])
    drive(method, [batch_of(rows)])
    assert method.gauges["rows_unsure"] == 1
    assert torch.equal(method._bank.inputs, rows[2:])


def test_a_climb_moves_statistics_once() -> None:
    source = source_model("mlp_bn1d")
    for name in ("note", "sotta"):
        params = {"confidence": 0.0, "momentum": 0.2} if name == "sotta" else {"momentum": 0.2, "instance_aware": False}
        method = build("adaptation", name, params | {"interval": 16, "capacity": 16, "lr": 0.0}, source)
        batch = next(stream("mlp_bn1d", 1))
        drive(method, [batch])
        hidden = source.get_submodule("0")(batch.inputs).detach()
        before = weights_of(source)["1.running_mean"]
        wanted = 0.8 * before + 0.2 * hidden.mean(0)
        torch.testing.assert_close(weights_of(method.context.model)["1.running_mean"], wanted)


def test_rows_within_their_errors_are_answered_as_before() -> None:
    source = source_model("conv_bn")
    method = NOTE(NOTE.Params(standard_errors=1e6), context_for(source))
    batch = next(stream("conv_bn", 1))
    torch.testing.assert_close(method.adapt(batch), source(batch.inputs).detach(), rtol=1e-4, atol=1e-5)
