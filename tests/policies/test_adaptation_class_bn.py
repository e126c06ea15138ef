"""BatchNorm statistics adjusted for classes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from policies.moments import ClassMoments
from tests.policies.models import batch_of, build, drive, source_model


def test_one_window_by_hand() -> None:
    moments = ClassMoments(torch.zeros(1), 2, offsets=True)
    rows, classes = torch.tensor([[1.0], [3.0], [8.0], [8.0], [8.0], [8.0]]), torch.tensor([0, 0, 1, 1, 1, 1])
    moments.learn(rows, classes, 0.5, 0.5)
    # w = (2/6, 4/8), m = (2, 8): g = 0.5 (2/3 + 4) / (5/6) = 2.8; o = 0.5 w (m - g) = (-2/15, 1.3), mean 7/12
    assert moments.common.item() == pytest.approx(2.8 + 7 / 12)
    assert moments.offsets.flatten().tolist() == pytest.approx([-2 / 15 - 7 / 12, 1.3 - 7 / 12])


def test_a_long_run_of_one_class_hardly_moves_the_common_part() -> None:
    torch.manual_seed(0)
    places = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    adjusted, plain = (ClassMoments(torch.zeros(1), 4, offsets=on) for on in (True, False))
    for _ in range(200):
        classes = torch.randint(4, (64,))
        for moments in (adjusted, plain):
            moments.learn(places[classes] + 0.1, classes, 0.1, 0.1)
    for _ in range(10):
        classes = torch.full((64,), 3)
        for moments in (adjusted, plain):
            moments.learn(places[classes] + 0.1, classes, 0.1, 0.1)
    assert abs(adjusted.common.item() - 0.1) < 0.2
    assert plain.common.item() > 1.5


def drifted(rows: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(rows, 3, 8, 8) * 0.4 + 0.8


def test_batches_of_one_and_of_sixty_four_learn_the_same() -> None:
    source = source_model("conv_bn")
    together, alone = (build("adaptation", "class_bn", {}, source) for _ in range(2))
    inputs = drifted(64, 0)
    drive(together, [batch_of(inputs)])
    drive(alone, [batch_of(row[None]) for row in inputs])
    for key, value in together.context.model.state_dict().items():
        torch.testing.assert_close(value, alone.context.model.state_dict()[key])


def test_statistics_follow_a_shift_of_the_inputs() -> None:
    source = source_model("conv_bn")
    method = build("adaptation", "class_bn", {}, source)
    drive(method, [batch_of(drifted(64, seed)) for seed in range(60)])
    wanted = copy.deepcopy(source)
    layer = wanted.get_submodule("1")
    assert isinstance(layer, nn.BatchNorm2d)
    with torch.no_grad():
        seen = wanted.get_submodule("0")(torch.cat([drifted(64, seed) for seed in range(30, 60)]))
    live = method.context.model.get_submodule("1")
    for mine, before, there in (
        (live.running_mean, layer.running_mean, seen.mean((0, 2, 3))),
        (live.running_var, layer.running_var, seen.var((0, 2, 3))),
    ):
        assert (mine - there).abs().sum() < 0.5 * (before - there).abs().sum()
    assert method.gauges["drift"] > 0.1


def test_rows_of_absurd_size_are_left_out_and_counted() -> None:
    method = build("adaptation", "class_bn", {"window": 8}, source_model("conv_bn"))
    inputs = drifted(8, 0)
    inputs[2] *= 1e9
    drive(method, [batch_of(inputs), batch_of(drifted(8, 1))])
    assert method.gauges["rows_rejected"] == 1
    assert all(bool(value.isfinite().all()) for value in method.context.model.state_dict().values())
