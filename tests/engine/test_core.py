from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.audit import held_out
from engine.core import Core
from engine.freeze import Freeze
from engine.host import clone
from policies.interfaces import Action, Batch, Decision, Evidence, Gate, Safeguard, Verdict, Weights
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
    assert core.counts["foreign_labels"] == 4
    assert core.foreign is not None
    assert core.foreign.id == "e3"
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


def answer(core: Core, start: int, count: int) -> None:
    core.answer(events(start, count))
    core.follow()


def test_labels_that_came_before_their_event_join_when_it_comes() -> None:
    core = make_core(audit_share=0.0, batch_size=4)
    core.feedback(feedback(0, 4))
    assert core.counts["labels"] == 0
    answer(core, 0, 4)
    assert (core.counts["labels"], core.counts["updates.learning"]) == (4, 1)


def test_a_reward_that_confirms_nothing_is_not_learned_from() -> None:
    core = make_core(audit_share=0.0, batch_size=4)
    answer(core, 0, 4)
    core.feedback(
        [item._replace(label=None, reward=reward) for item, reward in zip(feedback(0, 4), (0, -1, 0, 0), strict=True)]
    )
    assert (core.counts["unusable_labels"], core.counts["labels"]) == (4, 0)
    assert (core.counts["foreign_labels"], core.foreign) == (0, None)


def test_a_few_labels_are_learned_from_once_they_have_waited_long_enough() -> None:
    core = make_core(audit_share=0.0, batch_size=8)
    core.settings = replace(core.settings, max_delay=50.0)
    answer(core, 0, 16)
    core.feedback(feedback(0, 3))
    assert core.counts["updates.learning"] == 0
    answer(core, 16, 32)
    assert core.counts["updates.learning"] == 0, "47 s after the first label"
    answer(core, 48, 16)
    assert core.counts["updates.learning"] == 1


def test_at_the_end_every_label_is_learned_from_or_audited() -> None:
    core = make_core(batch_size=8)
    answer(core, 0, 16)
    core.feedback(feedback(0, 13))
    core.finish()
    assert not core.unfinished
    assert core.audit.seen + sum(not held_out(f"e{number}", 0.25) for number in range(13)) == 13


def test_feedback_that_carries_its_inputs_needs_no_event() -> None:
    core = make_core(audit_share=0.0, batch_size=4)
    core.settings = replace(core.settings, store_inputs=False)
    answer(core, 0, 4)
    assert core.joins.pending == 0
    inputs = [event.inputs for event in events(0, 4)]
    core.feedback([item._replace(inputs=raw) for item, raw in zip(feedback(0, 4), inputs, strict=True)])
    assert core.counts["updates.learning"] == 1


def test_while_a_job_is_under_way_adaptation_waits_and_then_catches_up() -> None:
    core = make_core(choice("adaptation", "tent", lr=0.01), background=True, audit_share=0.0)
    drive(core, [0])
    assert core.job is not None
    updates = core.counts["updates.adaptation"]
    for number in (1, 2):
        answer(core, number * 16, 16)
    assert (core.deferred, core.counts["updates.adaptation"]) == (2, updates)
    core.learner.run(core.job)
    core.done()
    assert core.deferred == 0
    assert core.counts["updates.adaptation"] == updates + 1


class Resetting(Safeguard):
    name = "resetting"

    def verdict(self, batch: Batch, logits: torch.Tensor) -> Verdict:
        return Verdict.RESET


def test_a_reset_while_a_job_is_under_way_discards_what_it_learned() -> None:
    core = make_core(background=True, audit_share=0.0)
    drive(core, [0])
    assert core.job is not None
    core.learner.run(core.job)
    context = core.methods.adaptation.context
    core.methods.safeguards = (Resetting(Resetting.Params(), context),)
    answer(core, 16, 16)
    assert core.counts["resets"] == 0, "not under the feet of the job"
    core.done()
    assert same(core.host.live.state_dict(), core.host.source.state_dict())
    assert (core.counts["resets"], core.counts["updates.learning"]) == (1, 0)
    assert core.counts["skipped.learning.reset"] == 1
    assert not core.learner.optimizer.state


class RollingBack(Gate):
    name = "rolling_back"

    def decide(self, evidence: Evidence) -> Decision:
        return Decision(Action.ROLL_BACK, "live_worse")


def test_a_roll_back_returns_live_weights_and_what_adaptation_keeps_beside_them_to_the_release() -> None:
    core = make_core(
        choice("adaptation", "rotta", capacity=16, interval=16, lr=0.05),
        choice("interpolation", "linear"),
        choice("gate", "flips", budget=0.2),
    )
    drive(core, range(20))
    release = clone(core.host.live.state_dict())
    core.host.release = clone(release)
    drive(core, range(20, 30))
    assert not same(core.host.live.state_dict(), release)
    core.methods.gate = RollingBack(RollingBack.Params(), core.methods.adaptation.context)
    core.settings = replace(core.settings, release_every=1)
    core.make_job()
    assert (core.counts["rollbacks"], core.counts["resets"]) == (1, 0)
    assert same(core.host.live.state_dict(), release)
    student = core.methods.adaptation.state_dict()["student"]
    for name, tensor in student.items():
        if name in dict(core.host.live.named_parameters()):
            torch.testing.assert_close(tensor, release[name])


def test_inputs_that_are_not_finite_are_counted_and_spoil_nothing() -> None:
    core = make_core(choice("adaptation", "bn", mode="ema"))
    batch = events(0, 8)
    batch[3] = batch[3]._replace(inputs=np.full(4, np.inf, np.float32).tobytes())
    answers = core.answer(batch)
    core.follow()
    assert core.counts["nonfinite_inputs"] == 1
    assert np.isfinite(answers.probabilities).all()
    assert answers.probabilities[3] == pytest.approx([1 / 3] * 3)
    assert all(bool(tensor.isfinite().all()) for tensor in core.host.live.state_dict().values())


def test_feedback_that_carries_its_inputs_is_audited_by_what_the_live_weights_answer() -> None:
    core = make_core(audit_share=1.0)
    inputs = {event.id: event.inputs for event in events(0, 16)}
    core.feedback([item._replace(inputs=inputs[item.id]) for item in feedback(0, 16)])
    core.make_job()
    assert len(core.audit) == 16
    accuracies = core.audit.accuracies()
    assert accuracies["live"] == accuracies["source"] == accuracies["release"]


def test_frozen_it_answers_as_the_release_and_neither_adapts_nor_learns_nor_attempts() -> None:
    core = make_core(
        choice("adaptation", "tent", lr=0.05),
        choice("safeguard", "replay", capacity=64),
        choice("interpolation", "linear"),
        choice("gate", "flips", budget=0.2),
    )
    core.methods.gate = RollingBack(RollingBack.Params(), core.methods.adaptation.context)
    core.settings = replace(core.settings, release_every=16)
    core.freeze = Freeze(core.host, 2)
    drive(core, range(30))
    assert core.freeze.on
    steps, counts = core.step, core.counts.copy()
    drive(core, range(30, 40))
    assert core.counts["rollbacks"] == 2
    assert core.step == steps
    assert core.counts["updates.learning"] == counts["updates.learning"]
    assert core.counts["labels"] > counts["labels"], "they are audited all the same"
    assert not core.unfinished or not core.job
    core.finish()
    assert core.step == steps
    answers = core.answer(events(400, 8))
    core.follow()
    rows = torch.stack([torch.frombuffer(bytearray(event.inputs), dtype=torch.float32) for event in events(400, 8)])
    expected = core.host.source(rows).softmax(1).numpy()
    np.testing.assert_allclose(answers.probabilities, expected, rtol=1e-5)
