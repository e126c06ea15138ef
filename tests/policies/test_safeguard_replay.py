from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.interfaces import StepKind
from policies.safeguards.replay import Replay
from tests.policies.builders import context_of, labelled, linear_model, same, weights_of

LEARNING = StepKind.LEARNING


def replay(model: nn.Module | None = None, seed: int = 7, **params: Any) -> Replay:
    return Replay(Replay.Params(**params), context_of(model or linear_model(), seed=seed))


def feed(buffer: Replay, ids: list[str]) -> None:
    rows = torch.tensor([[float(name[1:]), 0.0, 1.0] for name in ids])
    buffer.observe(labelled(rows, [int(name[1:]) % 2 for name in ids], ids=ids))


def kept(buffer: Replay) -> dict[str, tuple[float, int]]:
    state = buffer.state_dict()
    return {
        name: (float(row[0]), int(label))
        for name, row, label in zip(state["ids"], state["inputs"], state["labels"], strict=True)
    }


def names(first: int, last: int) -> list[str]:
    return [f"e{number}" for number in range(first, last)]


def test_redelivery_changes_nothing() -> None:
    buffer = replay(capacity=8)
    feed(buffer, names(0, 100))
    before = copy.deepcopy(buffer.state_dict())
    feed(buffer, names(0, 100))
    feed(buffer, list(reversed(names(20, 60))))
    after = buffer.state_dict()
    assert before["ids"] == after["ids"]
    assert all(torch.equal(before[key], after[key]) for key in ("inputs", "labels", "generator"))


def test_every_row_keeps_its_own_input_and_label() -> None:
    buffer = replay(capacity=8)
    feed(buffer, names(0, 30))
    feed(buffer, names(30, 31))
    feed(buffer, names(31, 90))
    assert len(buffer) == 8
    assert all(row == float(name[1:]) and label == int(name[1:]) % 2 for name, (row, label) in kept(buffer).items())


def test_what_is_kept_depends_on_the_ids_and_not_on_order_or_batches() -> None:
    one, two = replay(capacity=8), replay(capacity=8)
    feed(one, names(0, 100))
    for name in reversed(names(0, 100)):
        feed(two, [name])
    assert kept(one) == kept(two)


def test_two_reservoirs_merge_into_the_reservoir_of_both_streams() -> None:
    left, right, both = (replay(capacity=8) for _ in range(3))
    feed(left, names(0, 50))
    feed(right, names(50, 120))
    feed(both, names(0, 120))
    feed(left, list(kept(right)))
    assert kept(left) == kept(both)


def test_each_of_three_rows_is_kept_by_a_third_of_the_salts() -> None:
    counts = dict.fromkeys(names(0, 3), 0)
    model, trials = linear_model(), 600
    for seed in range(trials):
        buffer = replay(model, seed=seed, capacity=1)
        feed(buffer, names(0, 3))
        counts[next(iter(kept(buffer)))] += 1
    deviation = (trials * 2 / 9) ** 0.5
    assert all(abs(count - trials / 3) < 3 * deviation for count in counts.values())


def test_the_penalty_is_the_weighted_mean_loss_of_the_kept_rows() -> None:
    model = linear_model()
    buffer = replay(model, capacity=8, batch=8, weight=0.5)
    feed(buffer, names(0, 5))
    state = buffer.state_dict()
    expected = 0.5 * F.cross_entropy(model(state["inputs"]), state["labels"])
    penalty = buffer.penalty(model, LEARNING)
    assert penalty is not None
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)
    assert penalty.requires_grad


def test_there_is_no_penalty_before_the_first_row_nor_in_steps_without_labels() -> None:
    model = linear_model()
    buffer = replay(model)
    assert buffer.penalty(model, LEARNING) is None
    feed(buffer, ["e1"])
    assert buffer.penalty(model, StepKind.ADAPTATION) is None
    assert buffer.penalty(model, LEARNING) is not None


def test_a_replay_in_training_mode_leaves_running_statistics_and_modes_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    model[0].eval()
    buffer = replay(model)
    feed(buffer, names(0, 10))
    before = weights_of(model)
    buffer.penalty(model, LEARNING)
    assert same(before, weights_of(model))
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_rows_that_are_not_finite_are_not_kept() -> None:
    buffer = replay(capacity=8)
    rows = torch.ones(3, 3)
    rows[1, 2] = float("nan")
    buffer.observe(labelled(rows, [0, 1, 0]))
    buffer.observe(labelled(torch.zeros(0, 3), []))
    assert sorted(kept(buffer)) == ["e0", "e2"]


@pytest.mark.parametrize("seen", [0, 5, 40])
def test_a_restored_buffer_goes_on_bit_for_bit(seen: int) -> None:
    model = linear_model()

    def go_on(buffer: Replay) -> list[Tensor]:
        feed(buffer, names(100, 130))
        draws = [buffer.penalty(model, LEARNING) for _ in range(3)]
        return [draw.detach() for draw in draws if draw is not None]

    one, two = replay(model, capacity=8, batch=3), replay(model, seed=99, capacity=8, batch=3)
    feed(one, names(0, seen))
    one.penalty(model, LEARNING)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(go_on(one), go_on(two), strict=True))
    assert kept(one) == kept(two)


def test_loading_its_own_state_changes_nothing() -> None:
    buffer = replay(capacity=8)
    feed(buffer, names(0, 40))
    before = kept(buffer)
    buffer.load_state_dict(buffer.state_dict())
    assert kept(buffer) == before


def test_a_smaller_capacity_keeps_the_rows_that_it_would_have_kept() -> None:
    large, small, fresh = replay(capacity=16), replay(capacity=4), replay(capacity=4)
    feed(large, names(0, 60))
    feed(fresh, names(0, 60))
    small.load_state_dict(large.state_dict())
    assert kept(small) == kept(fresh)
