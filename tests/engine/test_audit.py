from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.audit import Audit, held_out
from engine.host import Inputs
from policies.flips import UNKNOWN
from streams.join import Joined

CPU = torch.device("cpu")


def audit(capacity: int = 10) -> Audit:
    return Audit(capacity, Inputs((2,), np.dtype("<f4"), scale=2.0), CPU)


def row(number: int, label: int, live: int) -> Joined:
    inputs = np.full(2, number, dtype="<f4").tobytes()
    return Joined(f"e{number}", inputs, float(number), None, live, 0, label, None, float(number))


def filled(count: int, capacity: int = 10) -> Audit:
    """Of every four rows: all right, source alone right, live alone right, none right; the release is as the source."""
    made = audit(capacity)
    for number in range(count):
        case = number % 4
        live, source = (1 if case in (0, 2) else 0), (1 if case in (0, 1) else 2)
        made.add([row(number, 1, live)], torch.tensor([source]), torch.tensor([source]))
    return made


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_ids_is_held_out(share: float) -> None:
    held = sum(held_out(f"event-{number}", share) for number in range(4000))
    assert held == pytest.approx(4000 * share, abs=100 if 0 < share < 1 else 0)


def test_whether_an_id_is_held_out_depends_on_it_alone() -> None:
    ids = [f"event-{number}" for number in range(200)]
    first = [held_out(name, 0.3) for name in ids]
    assert [held_out(name, 0.3) for name in reversed(ids)][::-1] == first
    assert [held_out(name, 0.3, salt="other") for name in ids] != first
    assert all(held_out(name, 0.6) for name, held in zip(ids, first, strict=True) if held), "a larger share holds more"


def test_the_newest_rows_are_kept_with_what_each_model_said_of_them() -> None:
    made = filled(13, capacity=8)
    window = made.window()
    assert (len(made), made.seen) == (8, 13)
    assert torch.equal(window.inputs[:, 0], 2.0 * torch.arange(5, 13))
    assert torch.equal(window.labels, torch.ones(8, dtype=torch.int64))
    assert window.source.tolist() == [1, 2, 2, 1, 1, 2, 2, 1]
    assert window.live.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_accuracies_and_flips_are_counted_on_the_window() -> None:
    made = filled(8)
    assert made.accuracies() == {"source": 0.5, "live": 0.5, "release": 0.5}
    assert made.flips() == (0.25, 0.25)


def test_an_empty_window_has_no_accuracy() -> None:
    made = audit()
    made.add([], torch.zeros(0), torch.zeros(0))
    assert made.accuracies() == {}
    assert made.flips() == (0.0, 0.0)
    assert len(made.window()) == 0
    assert made.window().inputs.shape == (0, 2)


def test_what_was_answered_before_a_rollback_is_no_evidence_for_another() -> None:
    made = filled(4)
    made.rolled_back(7)
    made.add([row(4, 1, 0)._replace(step=6), row(5, 1, 1)._replace(step=7)], *2 * [torch.ones(2, dtype=torch.int64)])
    made.add([row(6, 1, 1)._replace(step=-1)], *2 * [torch.ones(1, dtype=torch.int64)])
    assert made.window().live.tolist() == [UNKNOWN] * 5 + [1, 1]
    assert made.accuracies()["live"] == pytest.approx(4 / 7), "as it was answered"
    again = audit()
    again.load_state_dict(made.state_dict())
    again.add([row(7, 1, 0)._replace(step=6)], *2 * [torch.ones(1, dtype=torch.int64)])
    assert again.window().live.tolist() == [UNKNOWN] * 5 + [1, 1, UNKNOWN]


def test_a_state_from_before_rollbacks_were_heard_of_is_taken_over() -> None:
    state = filled(4).state_dict()
    del state["rolled_back_at"]
    made = audit()
    made.load_state_dict(state | {"classes": state["classes"][:, :4]})
    made.add([row(4, 1, 1)], *2 * [torch.ones(1, dtype=torch.int64)])
    assert made.window().live.tolist() == [1, 0, 1, 0, 1]


def test_a_new_release_is_judged_on_the_same_rows() -> None:
    made = filled(8)
    made.promoted(torch.ones(8, dtype=torch.int64))
    assert made.accuracies() == {"source": 0.5, "live": 0.5, "release": 1.0}
    assert made.flips() == (0.5, 0.0)


def test_a_window_that_was_given_out_does_not_change() -> None:
    made = filled(8)
    window = made.window()
    before = window.release.clone()
    made.promoted(torch.full((8,), 9))
    made.add([row(9, 1, 1)], torch.tensor([1]), torch.tensor([1]))
    assert torch.equal(window.release, before)


def test_the_state_comes_back() -> None:
    made, other = filled(13, capacity=8), audit(8)
    other.load_state_dict(made.state_dict())
    for each in (made, other):
        each.add([row(20, 1, 1)], torch.tensor([1]), torch.tensor([2]))
    assert other.accuracies() == made.accuracies()
    assert torch.equal(other.window().inputs, made.window().inputs)
    assert other.seen == made.seen == 14


def without_inputs(number: int, label: int, live: int) -> Joined:
    return row(number, label, live)._replace(inputs=b"")


def mixed(capacity: int = 10) -> Audit:
    """Three rows with inputs, numbers 0, 2 and 4, and two without."""
    made = audit(capacity)
    made.add([row(0, 1, 1), without_inputs(1, 1, 0)], torch.tensor([1, 0]), torch.tensor([1, 0]))
    made.add([row(2, 1, 0), without_inputs(3, 1, 1), row(4, 1, 1)], *2 * [torch.tensor([0, 1, 1])])
    return made


def test_rows_without_inputs_count_and_are_no_evidence() -> None:
    made = mixed()
    assert (len(made), made.evidence, made.seen) == (5, 3, 5)
    assert made.accuracies() == {"source": 0.6, "live": 0.6, "release": 0.6}
    window = made.window()
    assert torch.equal(window.inputs[:, 0], 2.0 * torch.tensor([0.0, 2.0, 4.0]))
    assert window.live.tolist() == [1, 0, 1]


def test_the_inputs_go_with_their_rows() -> None:
    made = mixed(capacity=4)
    assert torch.equal(made.window().inputs[:, 0], 2.0 * torch.tensor([2.0, 4.0]))
    for number in range(5, 9):
        made.add([without_inputs(number, 1, 1)], *2 * [torch.ones(1, dtype=torch.int64)])
    assert (len(made), made.evidence, len(made.window())) == (4, 0, 0)
    made.add([row(9, 1, 1)], *2 * [torch.ones(1, dtype=torch.int64)])
    assert torch.equal(made.window().inputs[:, 0], torch.tensor([18.0]))


def test_rows_without_inputs_end_with_a_new_release() -> None:
    made = mixed()
    made.promoted(torch.tensor([1, 1, 0]))
    assert (len(made), made.evidence) == (3, 3)
    assert made.accuracies()["release"] == pytest.approx(2 / 3)
    assert made.window().release.tolist() == [1, 1, 0]


def test_a_state_keeps_apart_which_rows_have_inputs() -> None:
    made, again = mixed(), audit()
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.window().inputs, made.window().inputs)
    assert again.accuracies() == made.accuracies()


def test_a_state_in_which_every_row_had_its_inputs_is_taken_over() -> None:
    state, made = filled(4).state_dict(), audit()
    made.load_state_dict(state | {"classes": state["classes"][:, :5]})
    assert torch.equal(made.window().inputs, filled(4).window().inputs)
