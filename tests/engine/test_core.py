import numpy as np
import pytest
import torch

from engine.core import Core
from engine.host import clone
from policies.interfaces import Weights
from tests.engine.cores import choice, drive, events, feedback, make_core


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_without_labels_the_live_model_stays_the_source_model() -> None:
    core = make_core()
    for number in range(3):
        core.answer(events(number * 16, 16))
        core.follow()
    assert same(core.host.live.state_dict(), core.host.source.state_dict())
    assert core.counts["events"] == 48
    assert core.joins.pending == 48


def test_answers_come_from_before_the_step_that_follows() -> None:
    core = make_core()
    first = drive(core, [0])[0]
    with torch.inference_mode():
        inputs = core.host.inputs.stack([e.inputs for e in events(0, 16)], core.host.device)
        expected = core.host.source(inputs).softmax(1).numpy()
    assert np.array_equal(first, expected)


def test_labels_change_the_live_model_and_raise_its_accuracy() -> None:
    core = make_core()
    drive(core, range(60))
    assert core.counts["updates.learning"] > 50
    accuracy = core.audit.accuracies()
    assert accuracy["live"] > accuracy["source"] + 0.2
    assert same(core.host.source.state_dict(), make_core().host.source.state_dict())


def test_audited_labels_are_never_learned_from() -> None:
    core = make_core(audit_share=1.0)
    drive(core, range(5))
    assert core.step == 0
    assert len(core.audit) == 80


def test_labels_out_of_range_are_counted_and_not_learned() -> None:
    core = make_core()
    core.answer(events(0, 4))
    core.follow()
    core.feedback([item._replace(label=99) for item in feedback(0, 4)])
    assert core.counts["unusable_labels"] == 4
    assert core.counts["labels"] == 0


def test_a_positive_reward_confirms_the_answer() -> None:
    core = make_core(audit_share=0.0, batch_size=4)
    answered = core.answer(events(0, 4)).labels
    core.follow()
    core.feedback([item._replace(label=None, reward=1.0) for item in feedback(0, 4)])
    assert core.counts["updates.learning"] == 1
    assert len(answered) == 4


@pytest.mark.parametrize("background", [False, True])
def test_a_restored_core_goes_on_bit_for_bit(background: bool) -> None:
    def step(core: Core, numbers: range) -> list[bytes]:
        out = []
        for number in numbers:
            out += [p.tobytes() for p in drive(core, [number])]
            if core.job is not None:
                core.learner.run(core.job)
                core.done()
                core.make_job()
        return out

    def settle(core: Core) -> None:
        while core.job is not None:
            core.learner.run(core.job)
            core.done()
            core.make_job()

    whole, first, second = (make_core(background=background) for _ in range(3))
    step(whole, range(6))
    settle(whole)
    expected = step(whole, range(6, 12))
    step(first, range(6))
    settle(first)
    second.host.live.load_state_dict(clone(first.host.live.state_dict()))
    second.methods.load_state_dict(first.methods.state_dict())
    second.audit.load_state_dict(first.audit.state_dict())
    second.load_state_dict(first.state_dict())
    own = dict(second.host.learner.named_parameters())
    for name, parameter in first.host.learner.named_parameters():
        second.learner.optimizer.state[own[name]] = {
            key: value.clone() for key, value in first.learner.optimizer.state[parameter].items()
        }
    second.joins = first.joins
    assert step(second, range(6, 12)) == expected
    assert same(second.host.live.state_dict(), whole.host.live.state_dict())


def test_serving_goes_on_with_consistent_weights_while_a_job_is_under_way() -> None:
    core = make_core(background=True)
    drive(core, [0])
    assert core.job is not None
    before = clone(core.host.live.state_dict())
    core.learner.run(core.job)
    core.answer(events(16, 16))
    core.follow()
    assert same(core.host.live.state_dict(), before)
    core.done()
    assert not same(core.host.live.state_dict(), before)


def test_release_attempts_are_made_and_decided() -> None:
    core = make_core(choice("interpolation", "linear"), choice("gate", "flips", budget=0.2), release_every=100)
    drive(core, range(80))
    decisions = {name: count for name, count in core.counts.items() if name.startswith("decisions.")}
    assert 10 <= sum(decisions.values()) <= core.counts["labels"] // 100
    assert core.release > 0
