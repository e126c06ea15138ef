"""The chain of classes behind a stream of answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from policies.chain import STAY_LIMIT, ClassChain
from tests.policies.models import carried


def answers(classes: list[int], right: float, seed: int = 0, count: int = 4) -> np.ndarray:
    """Probabilities that lean to the class, or in one case of ``1 - right`` to another."""
    draw = np.random.default_rng(seed)
    rows = []
    for wanted in classes:
        shown = wanted if draw.random() < right else int(draw.integers(count))
        rows.append([0.7 if place == shown else 0.3 / (count - 1) for place in range(count)])
    return np.array(rows)


def test_posteriors_are_those_of_all_paths_summed() -> None:
    chain = ClassChain(2, noise=0.0)
    chain.stay = 0.6
    q = np.array([[0.8, 0.2], [0.4, 0.6], [0.7, 0.3]])
    expected = np.zeros((3, 2))
    for path in itertools.product((0, 1), repeat=3):
        weight = 0.5
        for t, state in enumerate(path):
            if t:
                weight *= 0.6 * (state == path[t - 1]) + 0.4 * 0.5
            weight *= q[t, state] / 0.5
        for t, state in enumerate(path):
            expected[t, state] += weight
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(chain.correct(q, [None] * 3), expected, rtol=1e-12)


def test_classes_in_runs_are_corrected_and_the_chain_finds_how_long_they_stay() -> None:
    classes = [number // 10 % 4 for number in range(4000)]
    q = answers(classes, 0.7)
    chain = ClassChain(4)
    found = np.concatenate([chain.correct(q[i : i + 50], [None] * 50) for i in range(0, 4000, 50)]).argmax(1)
    assert 0.6 < chain.stay <= STAY_LIMIT
    assert (q.argmax(1) != classes).mean() > 0.2
    assert (found[2000:] != classes[2000:]).mean() < 0.08


def test_independent_classes_turn_the_chain_off() -> None:
    classes = np.random.default_rng(3).integers(4, size=4000).tolist()
    q = answers(classes, 0.6)
    chain = ClassChain(4)
    found = np.concatenate([chain.correct(q[i : i + 50], [None] * 50) for i in range(0, 4000, 50)])
    assert chain.stay < 0.1
    assert (found[2000:].argmax(1) == q[2000:].argmax(1)).mean() > 0.99


def test_batches_of_one_remember_the_row_before() -> None:
    chain = ClassChain(4)
    chain.stay = 0.9
    chain.correct(np.array([[0.97, 0.01, 0.01, 0.01]]), [None])
    torn = np.array([[0.3, 0.4, 0.15, 0.15]])
    assert chain.correct(torn, [None]).argmax() == 0


def test_interleaved_groups_have_a_past_each() -> None:
    chain = ClassChain(4, groups=2)
    chain.stay = 0.9
    sure = np.full((2, 4), 0.01) + 0.96 * np.eye(4)[[0, 2]]
    chain.correct(sure, ["a", "b"])
    torn = np.full((2, 4), 0.25) + 0.02 * np.eye(4)[[1, 1]]
    assert chain.correct(torn / torn.sum(1, keepdims=True), ["a", "b"]).argmax(1).tolist() == [0, 2]
    chain.correct(sure[:1], ["c"])
    assert len(chain.state_dict()["groups"]) == 2


@pytest.mark.parametrize("groups", [[None] * 6, ["a", "b", None, "a", "b", "a"]])
def test_a_restored_chain_goes_on_as_before(groups: list[str | None]) -> None:
    one, two = ClassChain(4), ClassChain(4)
    q = answers([0, 0, 1, 1, 2, 2], 0.8)
    one.correct(q, groups)
    two.load_state_dict(carried(one.state_dict()))
    assert np.array_equal(one.correct(q, groups), two.correct(q, groups))
    assert one.stay == two.stay
