from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policies.gates.flips import Flips
from policies.interfaces import Action, Candidate, Decision, Evidence
from tests.policies.builders import context_of, linear_model, window_of

ROWS = 400
RIGHT = 300
"""The release is right on this many rows: the first ones."""

LABELS = torch.zeros(ROWS, dtype=torch.int64)
RELEASE = (torch.arange(ROWS) >= RIGHT).long()


def gate(**params: Any) -> Flips:
    return Flips(Flips.Params(**params), context_of(linear_model()))


def answers(negative: int, positive: int) -> Tensor:
    """Predictions with so many flips against the release."""
    predicted = RELEASE.clone()
    predicted[:negative] = 1
    predicted[RIGHT : RIGHT + positive] = 0
    return predicted


def decide(
    *candidates: tuple[float, int, int], live: Tensor | None = None, rows: int = ROWS, **params: Any
) -> Decision:
    window = window_of(LABELS[:rows], RELEASE[:rows], live=None if live is None else live[:rows])
    made = tuple(Candidate(alpha, answers(b, c)[:rows]) for alpha, b, c in candidates)
    return gate(**params).decide(Evidence(window, made))


def test_the_most_accurate_candidate_within_the_budget_is_promoted() -> None:
    decision = decide((0.0, 5, 80), (0.4, 0, 60), (0.8, 0, 20))
    assert (decision.action, decision.reason, decision.chosen) == (Action.PROMOTE, "passed", 1)
    assert decision.figures["alpha"] == 0.4
    assert decision.figures["accuracy_candidate"] == 0.9
    assert decision.figures["accuracy_release"] == 0.75
    assert decision.figures["nfr"] == 0
    assert decision.figures["nfr_upper"] == pytest.approx(1 - 0.05 ** (1 / ROWS))
    assert decision.figures["pfr"] == 0.15


def test_equal_accuracy_goes_to_fewer_negative_flips_then_to_the_older_weights() -> None:
    assert decide((0.0, 1, 31), (0.5, 0, 30), (0.6, 1, 31), budget=0.02).chosen == 1
    assert decide((0.0, 0, 30), (0.5, 0, 30), (0.6, 0, 30)).chosen == 2


def test_testing_stops_at_the_first_candidate_that_fails() -> None:
    decision = decide((0.0, 0, 90), (0.5, 9, 60), (0.9, 0, 20))
    assert decision.chosen == 2
    assert decide((0.0, 0, 90), (0.5, 9, 60)).reason == "flips"


def test_candidates_in_any_order_get_the_same_decision() -> None:
    forward = decide((0.0, 5, 80), (0.4, 0, 60), (0.8, 0, 20))
    backward = decide((0.8, 0, 20), (0.4, 0, 60), (0.0, 5, 80))
    assert forward.figures == backward.figures
    assert (forward.chosen, backward.chosen) == (1, 1)


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [
        ((), "no_candidates"),
        (((0.0, 4, 90),), "flips"),
        (((0.0, 0, 0), (1.0, 0, 0)), "unchanged"),
        (((0.0, 1, 1),), "no_gain"),
    ],
)
def test_the_release_is_held_with_a_reason(candidates: tuple[tuple[float, int, int], ...], reason: str) -> None:
    decision = decide(*candidates, budget=0.02 if reason == "no_gain" else 0.01, margin=0.02)
    assert (decision.action, decision.reason, decision.chosen) == (Action.HOLD, reason, -1)


def test_a_candidate_that_may_be_less_accurate_is_held() -> None:
    decision = decide((0.0, 3, 4), budget=0.05)
    assert (decision.action, decision.reason) == (Action.HOLD, "accuracy")


def test_too_few_rows_hold_and_the_least_follows_from_the_budget() -> None:
    assert decide((0.0, 0, 0), rows=298).reason == "too_few"
    assert decide((0.0, 0, 0), rows=299).reason == "unchanged"
    assert decide((0.0, 0, 0), rows=299, budget=0.005).reason == "too_few"
    assert decide((0.0, 0, 0), rows=0).figures == {}
    assert gate(min_rows=50).min_rows == 50


def test_live_answers_clearly_worse_than_the_release_are_rolled_back() -> None:
    decision = decide((0.0, 30, 0), live=answers(30, 2))
    assert (decision.action, decision.reason) == (Action.ROLL_BACK, "live_worse")
    assert decision.figures["accuracy_live"] == pytest.approx((RIGHT - 30 + 2) / ROWS)
    assert decide(live=answers(30, 2), rows=200).action is Action.ROLL_BACK


def test_live_answers_that_may_be_as_good_are_not_rolled_back() -> None:
    assert decide((0.0, 0, 0), live=answers(6, 3)).action is Action.HOLD


def test_live_weights_that_have_recovered_are_not_rolled_back() -> None:
    assert decide((0.0, 0, 40), (0.5, 0, 10), live=answers(30, 2)).action is Action.PROMOTE


def test_rows_without_a_known_answer_say_nothing_of_the_live_model() -> None:
    live = answers(30, 2)
    live[:30] = -1
    decision = decide((0.0, 0, 0), live=live)
    assert decision.action is Action.HOLD
    assert decision.figures["accuracy_live"] == pytest.approx((RIGHT - 30 + 2) / (ROWS - 30))
    assert "accuracy_live" not in decide((0.0, 0, 0), live=torch.full((ROWS,), -1)).figures


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 100)), min_size=1, max_size=5),
    st.data(),
    st.sampled_from([0.01, 0.02, 0.05]),
)
def test_one_more_negative_flip_never_turns_a_hold_into_a_promotion(
    flips: list[tuple[int, int]], data: st.DataObject, budget: float
) -> None:
    candidates = [(index / 10, b, c) for index, (b, c) in enumerate(flips)]
    worse = list(candidates)
    index = data.draw(st.integers(0, len(flips) - 1))
    alpha, b, c = worse[index]
    worse[index] = (alpha, b + 1, c)
    if decide(*candidates, budget=budget).action is not Action.PROMOTE:
        assert decide(*worse, budget=budget).action is not Action.PROMOTE


def test_candidates_beyond_the_budget_seldom_pass_however_many_are_proposed() -> None:
    generator, trials, promoted = torch.Generator().manual_seed(0), 300, 0
    for _ in range(trials):
        # Eleven candidates, each far more accurate, each with flips at just the budget: any one passes by chance.
        drawn = torch.rand(11, ROWS, generator=generator) < 0.01 * ROWS / RIGHT
        made = tuple(Candidate(i / 10, torch.where(drawn[i], 1, answers(0, 50))) for i in range(11))
        promoted += gate().decide(Evidence(window_of(LABELS, RELEASE), made)).action is Action.PROMOTE
    assert promoted <= 0.05 * trials
