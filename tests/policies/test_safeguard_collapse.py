from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.interfaces import Verdict
from policies.safeguards.collapse import Collapse, _entropy
from tests.policies.builders import context_of, events

CLASSES = 10


class Reader(nn.Module):
    """Its inputs are its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def collapse(**params: Any) -> Collapse:
    return Collapse(Collapse.Params.model_validate(params), context_of(Reader().eval(), classes=CLASSES))


def sure(classes: Tensor) -> Tensor:
    return F.one_hot(classes, CLASSES) * 8.0


def balanced(batches: int, rows: int = 64, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        yield torch.randint(CLASSES, (rows,), generator=generator)


def run(guard: Collapse, batches: Iterator[Tensor], live: Any) -> list[int]:
    """Indices of the batches after which the verdict was a reset."""
    found = []
    for index, truth in enumerate(batches):
        source = sure(truth)
        if guard.verdict(events(source), live(source)) is Verdict.RESET:
            found.append(index)
    return found


def one_class(source: Tensor) -> Tensor:
    return sure(torch.full((len(source),), 3))


def test_the_effective_number_of_classes_equals_the_reference() -> None:
    entropy = _entropy(torch.tensor([0.97, 0.01, 0.01, 0.01], dtype=torch.float64))
    assert entropy == pytest.approx(0.16770, abs=1e-5)
    assert math.exp(entropy) == pytest.approx(1.1826, abs=1e-4)


def test_a_model_that_answers_one_class_is_reset_within_fifty_batches() -> None:
    guard = collapse()
    resets = run(guard, balanced(50), one_class)
    assert len(resets) == 1
    assert guard.gauges["resets"] == 1
    assert guard.gauges["live_classes"] < 2 < 9 < guard.gauges["source_classes"]


def test_a_model_that_gives_every_row_the_same_uniform_answer_is_reset() -> None:
    assert run(collapse(), balanced(50), torch.zeros_like)


def test_a_model_that_collapses_after_a_healthy_time_is_reset() -> None:
    guard = collapse()
    assert run(guard, balanced(60), lambda source: source) == []
    assert len(run(guard, balanced(60, seed=1), one_class)) == 1


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_any_batch_size_comes_to_the_verdict(rows: int) -> None:
    guard = collapse(share=0.5, window=40, patience=2)
    assert len(run(guard, balanced(300 // rows + 2, rows), one_class)) == 1


def test_classes_that_come_in_runs_are_no_collapse() -> None:
    runs = (torch.full((64,), index // 20 % CLASSES) for index in range(200))
    assert run(collapse(), runs, lambda source: source) == []


def test_an_imbalanced_stream_is_no_collapse_for_a_model_that_knows_it() -> None:
    generator = torch.Generator().manual_seed(3)
    shares = torch.tensor([0.9] + [0.1 / 9] * 9)
    rows = (torch.multinomial(shares, 64, replacement=True, generator=generator) for _ in range(150))
    assert run(collapse(), rows, lambda source: source) == []


def wrong_source(truth: int, right: float, generator: torch.Generator) -> Tensor:
    """Logits of a source that is right on a share of rows of one class, and guesses on the others."""
    guesses = torch.randint(CLASSES, (64,), generator=generator)
    return sure(torch.where(torch.rand(64, generator=generator) < right, truth, guesses))


def test_a_run_of_one_class_that_the_source_mostly_knows_is_no_collapse() -> None:
    guard, generator = collapse(), torch.Generator().manual_seed(4)
    verdicts = [guard.verdict(events(wrong_source(3, 0.6, generator)), one_class(torch.zeros(64))) for _ in range(150)]
    assert set(verdicts) == {Verdict.KEEP}


def test_patience_and_cooldown_count_windows() -> None:
    guard = collapse(share=1.0, window=64, patience=2, cooldown=3)
    assert run(guard, balanced(14), one_class) == [1, 6, 11]


def test_bad_rows_are_left_out() -> None:
    guard = collapse(share=1.0, window=32)
    rows = sure(torch.arange(64) % CLASSES)
    rows[::2, 0] = float("nan")
    assert guard.verdict(events(rows), torch.zeros(64, CLASSES)) is Verdict.KEEP
    state = guard.state_dict()
    assert bool(state["sums"].isfinite().all())
    assert float(state["sums"][-1]) == 32


def test_an_empty_batch_changes_nothing() -> None:
    guard = collapse()
    before = copy.deepcopy(guard.state_dict())
    assert guard.verdict(events(torch.zeros(0, CLASSES)), torch.zeros(0, CLASSES)) is Verdict.KEEP
    assert str(before) == str(guard.state_dict())


def test_a_restored_safeguard_comes_to_the_same_verdict_at_the_same_batch() -> None:
    one, two = collapse(), collapse()
    run(one, balanced(33), one_class)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert run(one, balanced(60, seed=2), one_class) == run(two, balanced(60, seed=2), one_class) != []
    assert torch.equal(one.state_dict()["sums"], two.state_dict()["sums"])


def test_the_source_answers_only_its_share_of_the_rows() -> None:
    guard = collapse(share=0.1)
    seen: list[int] = []
    guard.context.source.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    run(guard, balanced(100), lambda source: source)
    assert 620 < sum(seen) <= 640
    assert min(seen) >= 16
