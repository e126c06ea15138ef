"""Measures of a window and detectors of change, against worked values."""

from __future__ import annotations

import json
import random

import pytest
import torch

from policies.detectors import (
    Adwin,
    FeatureShift,
    Kswin,
    PageHinkley,
    autocorrelation,
    disagreement,
    effective_classes,
    entropy_ratio,
    ks_distance,
    neighbour_distances,
    simpson_excess,
    squared_distance,
)
from tests.policies.models import carried

UNIFORM = torch.full((10,), 0.1)
SORTED = torch.arange(10).repeat_interleave(50)


@pytest.mark.parametrize(
    ("mean", "classes"),
    [((0.7, 0.1, 0.1, 0.1), 2.561129), ((0.25,) * 4, 4.0), ((0.97, 0.01, 0.01, 0.01), 1.182582), ((1.0, 0, 0, 0), 1.0)],
)
def test_effective_classes(mean: tuple[float, ...], classes: float) -> None:
    assert effective_classes(torch.tensor([mean] * 3, dtype=torch.float64)) == pytest.approx(classes, abs=1e-6)


def test_sorted_classes_are_correlated_and_shuffled_ones_are_not() -> None:
    assert autocorrelation(SORTED, UNIFORM) == pytest.approx(490 / 499 - 0.1)
    shuffled = SORTED[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    assert abs(autocorrelation(shuffled, UNIFORM)) < 3 / 500**0.5
    assert autocorrelation(SORTED[:1], UNIFORM) == 0


def test_simpson_excess_does_not_look_at_the_order() -> None:
    one_class = torch.zeros(64, dtype=torch.int64)
    assert simpson_excess(one_class, UNIFORM) == pytest.approx(0.9)
    two = torch.tensor([0, 1] * 32)
    assert simpson_excess(two, UNIFORM) == pytest.approx(2 * 32 * 31 / (64 * 63) - 0.1)
    independent = torch.randint(10, (20000,), generator=torch.Generator().manual_seed(0))
    assert abs(simpson_excess(independent, UNIFORM)) < 1e-3
    assert simpson_excess(one_class[:1], UNIFORM) == 0


def test_entropy_ratio_and_disagreement() -> None:
    assert entropy_ratio(torch.full((2, 5), 0.2)) == pytest.approx(1.0)
    assert entropy_ratio(torch.eye(5)) == 0
    assert entropy_ratio(torch.ones(3, 1)) == 0
    one, other = torch.eye(3), torch.eye(3)[[0, 2, 2]]
    assert disagreement(one, other) == pytest.approx(1 / 3)
    assert disagreement(one[:0], other[:0]) == 0


def test_features_that_move_or_spread_are_far_away() -> None:
    torch.manual_seed(0)
    shift = FeatureShift(4, reference=400, memory=100)
    for _ in range(40):
        shift.add(torch.randn(20, 4) + 5)
    near = shift.distance()
    assert near < 0.2
    other = FeatureShift(4, reference=400, memory=100)
    other.load_state_dict(carried(shift.state_dict()))
    for _ in range(50):
        shift.add(torch.randn(20, 4) + 6)
        other.add(3 * torch.randn(20, 4) + 5)
    assert shift.distance() == pytest.approx(1, abs=0.2)
    assert other.distance() == pytest.approx(1.1, abs=0.25)
    shift.add(torch.full((1, 4), float("nan")))
    assert shift.distance() < 2


def series(before: float, after: float, rows: int = 300) -> list[float]:
    draw = random.Random(1)
    return [before + draw.gauss(0, 0.1) for _ in range(rows)] + [after + draw.gauss(0, 0.1) for _ in range(rows)]


@pytest.mark.parametrize("make", [PageHinkley, Adwin, Kswin])
def test_a_rise_is_noticed_soon_and_a_level_series_is_quiet(make: type[PageHinkley | Adwin | Kswin]) -> None:
    quiet, rising = make(), make()
    assert not any(quiet.add(value) for value in series(0.3, 0.3))
    alarms = [number for number, value in enumerate(series(0.3, 0.8)) if rising.add(value)]
    assert 300 <= alarms[0] < 340
    assert rising.alarms == len(alarms)


@pytest.mark.parametrize("make", [PageHinkley, Adwin, Kswin])
def test_a_restored_detector_goes_on_as_before(make: type[PageHinkley | Adwin | Kswin]) -> None:
    one, two = make(), make()
    values = series(0.3, 0.8)
    for value in values[:290]:
        one.add(value)
    two.load_state_dict(carried(one.state_dict()))
    assert [one.add(value) for value in values[290:]] == [two.add(value) for value in values[290:]]
    left, right = carried(one.state_dict()), carried(two.state_dict())
    assert left.keys() == right.keys()
    assert json.dumps(left, default=lambda t: t.tolist()) == json.dumps(right, default=lambda t: t.tolist())


def test_page_hinkley_by_hand() -> None:
    detector = PageHinkley(tolerance=0.0, threshold=0.4)
    assert not detector.add(0.0)
    assert detector.add(1.0)  # The mean is 0.5 then, and the sum 0.5.


def test_adwin_keeps_the_mean_of_its_window() -> None:
    detector = Adwin()
    for _ in range(1000):
        detector.add(0.25)
    assert len(detector) == 1000
    assert detector.mean() == pytest.approx(0.25)


def test_distance_of_distributions() -> None:
    assert ks_distance([1, 2, 3, 4], [1, 2, 3, 4]) == 0
    assert ks_distance([1, 2], [3, 4]) == 1
    assert ks_distance([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5


def test_the_squared_distance_of_two_distributions_is_estimated_without_bias() -> None:
    assert squared_distance(torch.tensor([4.0, 0.0]), torch.tensor([0.0, 6.0])) == 2.0
    assert squared_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 6.0])) == 0.0
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 2000 * 20, True, generator=generator).reshape(2000, 2, 10)
    counts = torch.nn.functional.one_hot(draws, 3).sum(2).double()
    mean = sum(squared_distance(one, other) for one, other in counts) / len(counts)
    assert abs(mean) < 0.01


def test_neighbours_of_a_class_are_no_nearer_than_others_unless_rows_wander() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(400) // 10 % 4
    corners, noise = 3 * torch.randn(4, 6, generator=generator), torch.randn(400, 6, generator=generator)
    near, apart = neighbour_distances(corners[classes] + noise, classes)
    assert near / apart == pytest.approx(1, abs=0.1)
    wandering = torch.stack([noise[max(0, t - 20) : t + 1].mean(0) for t in range(400)])
    near, apart = neighbour_distances(corners[classes] + 5 * wandering, classes)
    assert near / apart < 0.5


def test_neighbours_by_hand() -> None:
    rows = torch.tensor([[0.0, 7.0], [2.0, 7.0], [9.0, 7.0], [2.0, 7.0]])
    near, apart = neighbour_distances(rows, torch.tensor([0, 0, 1, 0]))
    variance = rows[:, 0].var(correction=0).item()
    assert near == pytest.approx(4 / variance)
    assert apart == pytest.approx((4 + 4 + 0) / 3 / variance)
    assert neighbour_distances(rows, torch.arange(4)) == (0.0, 0.0)
