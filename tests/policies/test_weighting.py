from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.weighting import _ess_ratio as ess_ratio
from policies.weighting import _exponent, compose

SPREAD = torch.tensor([1e-3, 1.0, 1.0, 50.0])


def test_tempering_reaches_the_effective_sample_sizes_of_the_reference() -> None:
    for exponent, expected in ((1.0, 0.270194), (0.5, 0.398353), (0.25, 0.642566)):
        assert ess_ratio(SPREAD.double() ** exponent) == pytest.approx(expected, abs=1e-6)
        found = _exponent(SPREAD.double().log(), expected)
        assert found == pytest.approx(exponent, abs=1e-5)


def test_the_floor_of_the_effective_sample_size_is_kept_by_tempering() -> None:
    composed = compose([SPREAD], clip=math.inf, ess_floor=0.398353, max_share=1.0)
    assert composed.exponent == pytest.approx(0.5, abs=1e-5)
    assert composed.ess_ratio == pytest.approx(0.398353, abs=1e-6)
    assert compose([SPREAD], clip=math.inf, ess_floor=0.2, max_share=1.0).exponent == 1.0


def test_factors_multiply_and_have_mean_one() -> None:
    composed = compose([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 1.0, 1.0, 0.5])])
    assert torch.allclose(composed.weights, torch.tensor([2.0, 2.0, 3.0, 2.0]) / 2.25)
    assert (composed.clipped, composed.nonfinite, composed.exponent) == (0, 0, 1.0)


def test_equal_weights_stay_exactly_one() -> None:
    for rows in (1, 2, 7, 49, 64):
        composed = compose([torch.full((rows,), 0.3), torch.ones(rows)])
        assert torch.equal(composed.weights, torch.ones(rows))
        assert composed.ess_ratio == 1.0


def test_rows_are_clipped_to_ten_times_the_median() -> None:
    weights = torch.ones(100)
    weights[0], weights[1] = 1e6, 1e-6
    composed = compose([weights])
    assert composed.clipped == 2
    assert float(composed.weights[0] / composed.weights[2]) == pytest.approx(10, rel=1e-5)
    assert float(composed.weights[2] / composed.weights[1]) == pytest.approx(10, rel=1e-5)


def test_no_row_holds_more_than_its_share() -> None:
    weights = torch.ones(30)
    weights[:2] = 10.0
    composed = compose([weights], max_share=0.15)
    assert float(composed.weights.max() / composed.weights.sum()) == pytest.approx(0.15, rel=1e-5)
    assert composed.clipped == 2


def test_bad_rows_are_left_out_without_making_others_heavier() -> None:
    bad = torch.tensor([1.0, math.nan, 1.0, math.inf, -1.0, 1.0, 0.0])
    composed = compose([bad, torch.ones(7)])
    assert torch.equal(composed.weights, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]))
    assert composed.nonfinite == 3


def test_a_batch_without_a_usable_row_gets_zeros() -> None:
    composed = compose([torch.tensor([math.nan, 0.0])])
    assert torch.equal(composed.weights, torch.zeros(2))
    assert (composed.ess_ratio, composed.nonfinite) == (0.0, 1)
    assert len(compose([torch.zeros(0)]).weights) == 0


def test_products_that_overflow_a_float_are_composed_in_logarithms() -> None:
    composed = compose([torch.tensor([1e30, 2e30]), torch.tensor([1e30, 1e30])])
    assert torch.allclose(composed.weights, torch.tensor([2 / 3, 4 / 3]))


def test_factors_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        compose([torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match="one or more"):
        compose([])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=40),
    st.floats(0.0, 1.0),
    st.floats(0.01, 1.0),
)
def test_the_promises_hold_for_any_weights(values: list[float], floor: float, share: float) -> None:
    composed = compose([torch.tensor(values, dtype=torch.float64)], ess_floor=floor, max_share=share)
    used = composed.weights[composed.weights > 0]
    assert bool(composed.weights.isfinite().all())
    if len(used):
        assert float(used.mean()) == pytest.approx(1, abs=1e-9)
        assert composed.ess_ratio >= floor - 1e-6
        assert float(used.max() / used.sum()) <= max(2 / len(used), share) + 1e-9
