from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from policies.flips import (
    FlipCounts,
    accuracy_gain_lower_bound,
    count_flips,
    rate_upper_bound,
    rows_needed,
    worse_e_value,
)


def flips(negative: int, positive: int, right: int = 0, wrong: int = 0) -> FlipCounts:
    return FlipCounts(right, negative, positive, wrong)


def test_rates_equal_the_reference() -> None:
    labels, old, new = (torch.tensor(rows) for rows in ([0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]))
    found = count_flips(old, new, labels)
    assert found == FlipCounts(both_right=2, negative=1, positive=1, both_wrong=0)
    assert (found.nfr, found.pfr, found.nfi, found.bec) == (0.25, 0.25, 1.0, 0.0)
    assert found.relative_nfr == pytest.approx(4 / 3)
    assert found.btc == pytest.approx(2 / 3)


def test_a_model_does_not_flip_against_itself() -> None:
    answers, labels = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 1])
    found = count_flips(answers, answers, labels)
    assert (found.nfr, found.pfr, found.bec, found.btc) == (0, 0, 1, 1)


def test_rates_of_no_rows_are_zero() -> None:
    nothing = count_flips(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert (nothing.rows, nothing.nfr, nothing.nfi, nothing.relative_nfr, nothing.new_accuracy) == (0, 0, 0, 0, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=30))
def test_errors_change_by_negative_less_positive_flips(rows: list[tuple[int, int, int]]) -> None:
    found = count_flips(*torch.tensor(rows).T)
    assert (1 - found.new_accuracy) - (1 - found.old_accuracy) == pytest.approx(found.nfr - found.pfr)
    assert found.rows == len(rows)


@pytest.mark.parametrize(("count", "rows", "bound"), [(0, 300, 0.00994), (3, 300, 0.02564)])
def test_the_upper_bound_of_a_rate_equals_the_reference(count: int, rows: int, bound: float) -> None:
    assert rate_upper_bound(count, rows) == pytest.approx(bound, abs=5e-6)


@pytest.mark.parametrize(
    ("count", "rows", "confidence"), [(0, 1, 0.95), (1, 7, 0.9), (3, 300, 0.95), (40, 90, 0.99), (500, 5000, 0.95)]
)
def test_the_upper_bound_is_the_quantile_of_the_beta_distribution(count: int, rows: int, confidence: float) -> None:
    assert rate_upper_bound(count, rows, confidence) == pytest.approx(
        float(special.betaincinv(count + 1, rows - count, confidence)), rel=1e-9
    )


def test_nothing_can_be_said_of_a_rate_that_every_row_or_no_row_shows() -> None:
    assert rate_upper_bound(5, 5) == 1.0
    assert rate_upper_bound(0, 0) == 1.0


@pytest.mark.parametrize(("budget", "rows"), [(0.005, 598), (0.01, 299), (0.001, 2995)])
def test_the_rows_needed_are_the_least_that_can_prove_the_budget(budget: float, rows: int) -> None:
    assert rows_needed(budget) == rows
    assert rate_upper_bound(0, rows) <= budget < rate_upper_bound(0, rows - 1)


@pytest.mark.parametrize(
    ("negative", "positive", "value"), [(5, 0, 10.5), (6, 0, 18.14), (10, 2, 9.44), (12, 1, 89.94), (2, 10, 0.107)]
)
def test_the_e_value_equals_the_reference(negative: int, positive: int, value: float) -> None:
    assert worse_e_value(flips(negative, positive)) == pytest.approx(value, rel=5e-3)


def test_the_e_value_is_one_without_flips_and_finite_with_very_many() -> None:
    assert worse_e_value(flips(0, 0)) == pytest.approx(1.0)
    assert worse_e_value(flips(50_000, 0)) > 1e300
    assert worse_e_value(flips(0, 5000)) < 1e-2


def test_the_e_value_is_one_on_average_when_flips_are_even() -> None:
    flipped = 12
    mean = sum(math.comb(flipped, b) / 2**flipped * worse_e_value(flips(b, flipped - b)) for b in range(flipped + 1))
    assert mean == pytest.approx(1.0)


def test_the_accuracy_bound_follows_its_formula() -> None:
    assert accuracy_gain_lower_bound(flips(0, 0, right=500)) == 0
    spread = (12 - 64 / 500) ** 0.5
    assert accuracy_gain_lower_bound(flips(2, 10, right=488)) == pytest.approx((8 - 1.645 * spread) / 500)
