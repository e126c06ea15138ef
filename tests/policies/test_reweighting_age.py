from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policies.reweighting.age import Age
from tests.policies.builders import context_of, labelled, linear_model


def weigh(params: Age.Params, ages: list[float], now: float = 1e9, delays: list[float] | None = None) -> Tensor:
    times = [now - age for age in ages]
    arrived = None if delays is None else [t + d for t, d in zip(times, delays, strict=True)]
    rows = len(ages)
    batch = labelled(torch.zeros(rows, 3), [0] * rows, times=times, feedback_times=arrived, now=now)
    return Age(params, context_of(linear_model())).weigh(batch, torch.ones(rows))


def test_a_row_one_half_life_old_weighs_half() -> None:
    weights = weigh(Age.Params(half_life=100), [0, 100, 200])
    assert torch.allclose(weights, torch.tensor([1, 0.5, 0.25]) * 3 / 1.75)


def test_timeliness_follows_the_values_of_the_reference() -> None:
    weights = weigh(Age.Params(mode="timeliness", tau=10), [0, 10, 20, 50])
    assert torch.allclose(weights / weights[0] / 2, torch.tensor([0.5, 0.268941, 0.119203, 0.006693]), atol=1e-6)


@pytest.mark.parametrize("mode", ["half_life", "timeliness"])
def test_weights_have_mean_one_fall_with_age_and_depend_on_age_alone(mode: str) -> None:
    params = Age.Params.model_validate({"mode": mode, "half_life": 60, "tau": 60})
    weights = weigh(params, [0, 1, 30, 3600, 1e9])
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
    assert bool((weights.diff() <= 0).all())
    assert torch.equal(weigh(params, [5, 50], now=1e9), weigh(params, [5, 50], now=2e9))


@pytest.mark.parametrize("mode", ["half_life", "timeliness"])
def test_ages_too_old_for_a_float_still_compare(mode: str) -> None:
    weights = weigh(Age.Params.model_validate({"mode": mode, "half_life": 1, "tau": 1}), [1e6, 1e6 + 1])
    ratio = 0.5 if mode == "half_life" else math.exp(-1)
    assert float(weights[1] / weights[0]) == pytest.approx(ratio, rel=1e-5)


def test_equal_ages_weigh_exactly_one() -> None:
    for rows in (1, 7, 49):
        assert torch.equal(weigh(Age.Params(), [123.0] * rows), torch.ones(rows))


def test_times_ahead_of_the_watermark_and_unknown_ones_count_as_new() -> None:
    weights = weigh(Age.Params(half_life=10), [-50, 0, 10, math.nan])
    assert torch.allclose(weights, torch.tensor([1, 1, 0.5, 1]) * 4 / 3.5)


def test_age_of_feedback_does_not_weigh_down_slow_labels() -> None:
    weights = weigh(Age.Params(half_life=100, of="feedback"), [100, 1000], delays=[90, 990])
    assert torch.equal(weights, torch.ones(2))


def test_a_half_life_is_written_with_a_unit() -> None:
    assert Age.Params.model_validate({"half_life": "1h"}).half_life == 3600
