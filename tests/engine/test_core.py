from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.audit import held_out
from engine.core import Core
from engine.freeze import Freeze
from engine.host import clone
from policies.interfaces import (
    Action,
    Adaptation,
    Batch,
    Decision,
    Evidence,
    Gate,
    Outcome,
    Safeguard,
    Verdict,
    Weights,
)
from tests.engine.cores import choice, drive, events, feedback, make_core, rows, tiny_model


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


class Heard(Adaptation):
    """Answers as the live model, and notes what is asked of it."""

    name = "heard"
    calls: list[str]

    def _adapt(self, batch: Batch) -> torch.Tensor:
        self.calls.append("adapt")
        logits: torch.Tensor = self.context.model(batch.inputs)
        return logits

    def update(self) -> Outcome | None:
        self.calls.append("update")
        return Outcome(True)

    def labelled(self, ids: Sequence[str], labels: Sequence[int], groups: Sequence[str | None]) -> None:
        self.calls.append("labelled")


class Watching(Safeguard):
    name = "watching"
    calls: list[str]

    def verdict(self, batch: Batch, logits: torch.Tensor) -> Verdict:
        self.calls.append("verdict")
        return Verdict.KEEP

    def observe(self, batch: object) -> None:
        self.calls.append("observe")


@pytest.mark.parametrize("background", [False, True])
def test_frozen_it_answers_as_the_release_and_asks_nothing_of_any_method(background: bool) -> None:
    core = make_core(choice("interpolation", "linear"), choice("gate", "flips"), background=background)
    context = core.methods.adaptation.context
    adaptation, safeguard = Heard(Heard.Params(), context), Watching(Watching.Params(), context)
    calls = adaptation.calls = safeguard.calls = []
    core.methods.adaptation, core.methods.safeguards = adaptation, (safeguard,)
    parts = core.host, core.methods, core.learner, core.audit, core.joins
    core = Core(replace(core.settings, release_every=16), *parts)  # it looks at what its methods hear
    core.methods.gate = RollingBack(RollingBack.Params(), context)
    core.freeze = Freeze(core.host, 2)
    number = 0
    while not core.freeze.on:
        drive(core, range(number, number + 3))  # in the background, two of them are deferred
        number += 3
        if core.job is not None:
            core.learner.run(core.job)
            core.done()
        assert number < 60
    assert set(calls) >= {"adapt", "update", "labelled", "verdict", "observe"}
    assert not core._to_learn
    before, counts = (core.step, len(core.audit)), core.counts.copy()
    calls.clear()
    drive(core, range(60, 70))
    while core.job is not None or core.unfinished:
        core.make_job()
        if core.job is None:
            core.finish()
        else:
            core.learner.run(core.job)
            core.done()
    assert not calls
    assert core.step == before[0]
    assert len(core.audit) > before[1]
    assert core.counts["rollbacks"] == counts["rollbacks"] == 2
    assert core.counts["frozen_labels"] > counts["frozen_labels"]
    batch = events(1600, 8)
    inputs = torch.stack([torch.frombuffer(bytearray(event.inputs), dtype=torch.float32) for event in batch])
    expected = core.host.source(inputs).softmax(1).numpy()
    np.testing.assert_allclose(core.answer(batch).probabilities, expected, rtol=1e-5)


def test_one_incident_is_rolled_back_once_and_freezes_nothing() -> None:
    model = tiny_model()
    x = torch.from_numpy(rows(50_000, 2048))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
    model.zero_grad()
    core = make_core(choice("interpolation", "linear"), choice("gate", "flips"), release_every=60, lr=0.02, model=model)
    core.freeze = Freeze(core.host, 3)
    drive(core, range(10))
    for number in range(10, 14):
        for sign in (-1, 1):
            with torch.no_grad():
                for parameter in core.host.live.parameters():
                    parameter.mul_(-1)
            if sign < 0:
                drive(core, [number])
    assert core.counts["rollbacks"] <= 1
    drive(core, range(14, 140))
    assert sum(count for name, count in core.counts.items() if name.startswith("decisions")) > 20
    assert core.counts["rollbacks"] == 1
    assert not core.freeze.on
