from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.core import Core
from engine.host import clone
from engine.learner import Job
from policies.interfaces import Action, LabelledBatch
from streams.join import Joined
from tests.engine.cores import FEATURES, choice, drive, label_of, make_core, rows


def joined(start: int, count: int, *, reward: float | None = None) -> list[Joined]:
    return [
        Joined(f"e{i}", x.tobytes(), float(i), None, 0, 0, label_of(x), reward, float(i + 5))
        for i, x in enumerate(rows(start, count), start)
    ]


def done(core: Core, job: Job) -> Job:
    core.learner.prepare(job)
    core.learner.run(job)
    return job


def with_sgd(core: Core, lr: float = 0.1) -> Core:
    parameters = [p for name, p in core.host.learner.named_parameters() if name in core.learner.names]
    core.learner.optimizer = torch.optim.SGD(parameters, lr=lr)
    return core


def test_one_step_is_that_of_the_weighted_loss() -> None:
    core = with_sgd(make_core())
    learned = joined(0, 8)
    live = clone(core.host.live.state_dict())
    job = done(core, Job(learned, [], False, 0.0))
    assert job.outcome is not None
    assert job.outcome.applied
    x = torch.tensor(np.stack([np.frombuffer(row.inputs, np.float32) for row in learned]))
    y = torch.tensor([row.label for row in learned])
    model = core.host.source
    loss = F.cross_entropy(torch.func.functional_call(model, live, (x,)), y)
    assert job.losses == pytest.approx(float(loss))
    parameters = {name: live[name].clone().requires_grad_() for name, _ in model.named_parameters()}
    expected = F.cross_entropy(torch.func.functional_call(model, {**live, **parameters}, (x,)), y)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    for (name, before), gradient in zip(parameters.items(), gradients, strict=True):
        after = core.host.learner.state_dict()[name]
        torch.testing.assert_close(after, before.detach() - 0.1 * gradient)


def test_nothing_reaches_the_live_model_before_it_is_taken_in() -> None:
    core = make_core()
    before = clone(core.host.live.state_dict())
    job = done(core, Job(joined(0, 8), [], False, 0.0))
    assert all(torch.equal(core.host.live.state_dict()[name], before[name]) for name in before)
    references = {name: parameter.data_ptr() for name, parameter in core.host.live.named_parameters()}
    core.learner.take(job)
    taken = {name: parameter.data_ptr() for name, parameter in core.host.live.named_parameters()}
    assert all(taken[name] != references[name] for name in taken), "taken in by exchanging references"
    assert not torch.equal(core.host.live.state_dict()["3.weight"], before["3.weight"])


def test_what_adaptation_changes_as_well_is_moved_by_the_difference() -> None:
    core = make_core(choice("adaptation", "tent", lr=0.0))
    job = Job(joined(0, 8), [], False, 0.0)
    core.learner.prepare(job)
    with torch.no_grad():
        core.host.live.get_parameter("1.weight").add_(0.5)
    shifted = clone(core.host.live.state_dict())
    core.learner.run(job)
    moved = core.host.learner.state_dict()["1.weight"] - core.host.source.state_dict()["1.weight"]
    core.learner.take(job)
    torch.testing.assert_close(core.host.live.state_dict()["1.weight"], shifted["1.weight"] + moved)
    assert float(moved.abs().max()) > 0


def test_only_the_named_parameters_learn() -> None:
    core = make_core()
    core.learner.names = ("3.weight", "3.bias")
    with_sgd(core)
    core.learner.take(done(core, Job(joined(0, 8), [], False, 0.0)))
    changed = {
        name
        for name, tensor in core.host.live.state_dict().items()
        if not torch.equal(tensor, core.host.source.state_dict()[name])
    }
    assert changed == {"3.weight", "3.bias"}


def spoiled(number: int) -> Joined:
    return joined(number, 1)[0]._replace(inputs=np.full(FEATURES, np.nan, np.float32).tobytes())


def test_rows_that_are_not_finite_are_left_out() -> None:
    clean, dirty = with_sgd(make_core()), with_sgd(make_core())
    done(clean, Job(joined(0, 8), [], False, 0.0))
    job = done(dirty, Job([spoiled(20), *joined(0, 8), spoiled(21)], [], False, 0.0))
    assert job.outcome is not None
    assert job.outcome.applied
    for name, tensor in clean.host.learner.state_dict().items():
        assert torch.equal(tensor, dirty.host.learner.state_dict()[name])


def test_without_a_finite_row_there_is_no_step() -> None:
    core = make_core()
    job = done(core, Job([spoiled(0), spoiled(1)], [], False, 0.0))
    assert job.outcome is not None
    assert (job.outcome.applied, job.outcome.reason) == (False, "nonfinite_inputs")


def test_a_small_reward_counts_for_less() -> None:
    results = []
    for reward in (1.0, 0.01):
        core = with_sgd(make_core())
        learned = [*joined(0, 8), *joined(8, 8, reward=reward)]
        job = done(core, Job(learned, [], False, 0.0))
        results.append((job.max_weight, job.ess_ratio))
    (even_weight, even_size), (weight, size) = results
    assert even_weight == 1.0
    assert even_size == pytest.approx(1.0)
    assert weight > 1.1
    assert size < 0.99


def test_older_rows_weigh_less_by_their_age() -> None:
    core = make_core(choice("reweighting", "age", half_life=4.0))
    job = done(core, Job(joined(0, 8), [], False, 8.0))
    assert job.max_weight > 1.5
    assert job.ess_ratio < 0.9


def test_safeguards_see_every_row_before_it_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(choice("safeguard", "replay", capacity=10))
    seen: list[str] = []

    def observe(batch: LabelledBatch) -> None:
        seen.extend(batch.ids)

    monkeypatch.setattr(core.methods.safeguards[0], "observe", observe)
    done(core, Job(joined(0, 4), joined(4, 4), False, 0.0))
    assert seen == ["e0", "e1", "e2", "e3"], "and never one of the audit window"


def test_audited_rows_are_scored_by_source_and_release() -> None:
    core = make_core()
    core.host.release = clone(make_core(model=None).host.release)
    core.host.release["3.bias"] = torch.tensor([0.0, 0.0, 100.0])
    job = done(core, Job([], joined(0, 6), False, 0.0))
    x = torch.tensor(np.stack([np.frombuffer(row.inputs, np.float32) for row in joined(0, 6)]))
    assert torch.equal(job.source_classes, core.host.source(x).argmax(1))
    assert job.release_classes.tolist() == [2] * 6
    assert job.outcome is None


def test_where_nothing_is_learned_no_step_is_taken() -> None:
    core = make_core(learn=False)
    job = done(core, Job(joined(0, 8), [], False, 0.0))
    assert job.outcome is None


def test_an_attempt_chooses_among_the_proposals_and_holds_their_weights() -> None:
    core = make_core(choice("interpolation", "linear"), choice("gate", "flips", budget=0.3))
    drive(core, range(40))
    job = done(core, Job([], [], True, core.watermark))
    assert job.decision is not None
    assert job.decision.action is Action.PROMOTE
    assert job.chosen is not None
    assert job.chosen_classes is not None
    window = core.audit.window()
    assert torch.equal(core.host.predict_with(job.chosen.weights, window.inputs), job.chosen_classes)


def test_without_a_gate_nothing_is_attempted() -> None:
    core = make_core()
    drive(core, range(4))
    assert done(core, Job([], [], True, 0.0)).decision is None
