"""What counts rollbacks, and who answers after too many."""

from typing import Any

import pytest
import torch
from torch import nn

from engine.freeze import Freeze
from engine.host import Inputs, ModelHost
from policies.interfaces import Action, Batch

HOLD, BACK, PROMOTE = Action.HOLD, Action.ROLL_BACK, Action.PROMOTE


def batch(x: torch.Tensor) -> Batch:
    return Batch(ids=("a", "b"), inputs=x, times=torch.zeros(2, dtype=torch.float64), groups=(None, None), now=0.0)


@pytest.fixture
def host() -> ModelHost:
    torch.manual_seed(0)
    return ModelHost(nn.Linear(3, 2), Inputs((3,), torch.zeros(0).numpy().dtype), torch.device("cpu"))


@pytest.mark.parametrize(
    ("actions", "on"),
    [
        ([BACK, BACK], False),
        ([BACK, BACK, BACK], True),
        ([BACK, HOLD, BACK, HOLD, BACK], True),
        ([BACK, HOLD, HOLD, HOLD, HOLD, HOLD, BACK, BACK], False),
        ([BACK, BACK, PROMOTE, BACK, BACK], False),
    ],
)
def test_it_is_on_after_three_rollbacks_among_six_attempts_and_no_release(
    host: ModelHost, actions: list[Action], on: bool
) -> None:
    freeze = Freeze(host, 3)
    for action in actions:
        freeze.see(action)
    assert freeze.on is on


def test_without_a_limit_it_never_is(host: ModelHost) -> None:
    freeze = Freeze(host, 0)
    for _ in range(100):
        freeze.see(BACK)
    assert not freeze.on
    assert freeze.state_dict() == []


def test_the_release_answers_whatever_becomes_of_the_live_model(host: ModelHost) -> None:
    freeze = Freeze(host, 1)
    x = torch.ones(2, 3)
    right = host.source(x)
    with torch.no_grad():
        for parameter in host.live.parameters():
            parameter.fill_(torch.nan)
    freeze.see(BACK)
    assert torch.equal(freeze.answer(batch(x)), right)


def test_a_row_that_is_not_finite_spoils_no_other(host: ModelHost) -> None:
    freeze = Freeze(host, 1)
    freeze.see(BACK)
    x = torch.ones(2, 3)
    right = host.source(x)
    x[1] = torch.inf
    logits = freeze.answer(batch(x))
    assert torch.equal(logits[0], right[0])
    assert torch.equal(logits[1], torch.zeros(2))


def test_it_goes_on_in_the_next_process_until_it_is_thawed(host: ModelHost) -> None:
    before, after = Freeze(host, 2), Freeze(host, 2)
    before.see(BACK)
    before.see(BACK)
    state: Any = before.state_dict()
    after.load_state_dict(state)
    assert (after.on, after.rollbacks) == (True, 2)
    after.thaw()
    assert (after.on, after.rollbacks) == (False, 0)
