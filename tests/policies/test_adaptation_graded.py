from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from policies.adaptation.graded import GradedReset, ramp
from policies.interfaces import Outcome
from tests.policies.models import applied, batch_of, drive, weights_of
from tests.policies.scores import logits_of, on_scores

SURE: dict[str, Any] = {"margin": 1.0, "similarity": 1.0, "every": 1000, "watch": 1, "memory": 4}
ROWS = logits_of([0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8])


def graded(**params: float) -> GradedReset:
    method: GradedReset = on_scores("graded", **{**SURE, "lr": 0.0, **params})
    return method


def bias(method: GradedReset) -> Tensor:
    return weights_of(method.context.model)["norm.bias"]


def shift(method: GradedReset, values: list[float]) -> None:
    """Move the live model away from its anchor, as harmful steps would."""
    with torch.no_grad():
        method.context.model.get_parameter("norm.bias").copy_(torch.tensor(values))


def step(method: GradedReset, rows: Tensor = ROWS) -> Outcome | None:
    method.adapt(batch_of(rows))
    return method.update()


def test_a_ramp_rises_between_its_ends_in_either_direction() -> None:
    assert [ramp(x, 0.4, 0.8) for x in (0.0, 0.4, 0.5, 0.6, 0.8, 1.0)] == pytest.approx([0, 0, 0.25, 0.5, 1, 1])
    assert [ramp(x, 0.65, 0.3) for x in (1.0, 0.65, 0.475, 0.3, 0.0)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_while_answers_are_those_of_the_source_nothing_is_given_back() -> None:
    method = graded()
    drive(method, [batch_of(ROWS)] * 4)
    assert method.gauges["grade"] == 0
    assert method.gauges["resets"] == 0


def test_some_disagreement_gives_back_a_share_in_proportion() -> None:
    method = graded(disagreement=0.8, spread=0.0, entropy=0.0, rate=0.5)
    shift(method, [0.0, 1.0])  # the third row changes its class, and the first does not
    step(method)
    assert method.gauges["disagreement"] == pytest.approx(0.25)
    assert bias(method).tolist() == [0.0, 1.0]
    shift(method, [0.0, 3.0])  # both do: the decayed mean of 1/4 and 1/2
    step(method)
    decayed = (0.75**4 * 0.25 + 0.5) / (0.75**4 + 1)
    grade = (decayed - 0.4) / 0.4
    assert method.gauges["grade"] == pytest.approx(grade)
    assert bias(method).tolist() == pytest.approx([0.0, 3.0 * (1 - 0.5 * grade)])
    assert method.gauges["resets"] == 0


@pytest.mark.parametrize(
    ("limits", "moved"),
    [
        ({"disagreement": 0.4, "spread": 0.0, "entropy": 0.0}, [0.0, 4.0]),
        ({"disagreement": 1.0, "spread": 0.6, "entropy": 0.0}, [0.0, 9.0]),
        ({"disagreement": 1.0, "spread": 0.0, "entropy": 0.1}, [0.0, 9.0]),
    ],
    ids=["disagreement", "spread", "entropy"],
)
def test_beyond_a_limit_all_is_given_back_and_no_step_follows_for_a_while(
    limits: dict[str, float], moved: list[float]
) -> None:
    method = graded(**limits, cooldown=2, lr=0.1)
    shift(method, moved)
    step(method)
    assert bias(method).tolist() == [0.0, 0.0]
    assert method.gauges["resets"] == 1
    assert method.state_dict()["optimizer"] == {}
    assert [step(method), step(method)] == [Outcome(applied=False, reason="resting")] * 2
    assert bias(method).tolist() == [0.0, 0.0]
    assert applied(step(method))


def test_the_interval_resets_as_it_does_for_rdumb() -> None:
    method = graded(every=2, cooldown=0, lr=0.1, disagreement=1.0, spread=0.0, entropy=0.0)
    moved = []
    for _ in range(4):
        step(method)
        moved.append(bool(bias(method).any()))
    assert moved == [True, False, True, False]


def test_nothing_is_judged_on_a_few_rows() -> None:
    method = graded(memory=5, disagreement=0.4)
    shift(method, [0.0, 9.0])
    step(method)
    assert method.gauges["resets"] == 0
    step(method)
    assert method.gauges["resets"] == 1


def test_what_labels_taught_is_no_harm() -> None:
    method = graded(disagreement=0.4)
    method.learned({"norm.bias": torch.zeros(2)}, {"norm.bias": torch.tensor([0.0, 4.0])})
    shift(method, [0.0, 4.0])
    step(method)
    assert method.gauges["grade"] == 0
    assert bias(method).tolist() == [0.0, 4.0]


def test_one_row_in_so_many_is_watched_whatever_the_batches() -> None:
    method = graded(watch=3, memory=1000)
    for rows in (ROWS[:1], ROWS[:2], ROWS, ROWS[:1], ROWS[:1]):  # rows 0, 3 and 6 of nine
        step(method, rows)
    assert float(method.state_dict()["sums"][-1]) == pytest.approx(3, rel=0.01)
