"""What every method of the other kinds must do; methods are found by the registry."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from policies.interfaces import (
    Action,
    AuditWindow,
    Candidate,
    Decision,
    Evidence,
    Gate,
    Interpolation,
    LabelledBatch,
    Outcome,
    Reweighting,
    Safeguard,
    StepKind,
    Verdict,
)
from policies.registry import METHODS, find, known
from policies.stepping import SafeStepper
from tests.policies.models import (
    CLASSES,
    MODELS,
    build,
    carried,
    draw,
    flat,
    labelled_of,
    same_weights,
    size_of,
    source_model,
    weights_of,
)

SOURCES = {name: source_model(name) for name in MODELS}
SMALL: dict[str, dict[str, Any]] = {"replay": {"capacity": 24, "batch": 8}, "loss": {"window": 24}}
"""Parameters that let a short stream reach every bound."""

EVERY = [(kind, name) for kind in METHODS for name in known(kind)]


def names(kind: str) -> list[str]:
    return sorted(known(kind))


def labelled(model: str, batches: int, rows: int = 12) -> list[LabelledBatch]:
    torch.manual_seed(4)
    return [labelled_of(draw(model, rows), torch.randint(CLASSES, (rows,)), n * rows) for n in range(batches)]


def losses_of(batch: LabelledBatch) -> Tensor:
    return batch.inputs.flatten(1).square().mean(1)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_method_is_documented_and_its_parameters_are_strict(kind: str, name: str) -> None:
    method = find(kind, name)
    assert method.name == name
    text = method.__doc__ or ""
    assert [part for part in ("State:", "Deviations:") if part not in text] == []
    with pytest.raises(ValidationError, match="surely_unknown"):
        method.Params(surely_unknown=1)
    params = method.Params()
    for field in method.Params.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(params, field, None)


@pytest.mark.parametrize("name", names("reweighting"))
def test_weights_are_a_mean_of_one_whatever_the_losses(name: str) -> None:
    method: Reweighting = build("reweighting", name, SMALL.get(name, {}), SOURCES["mlp"])
    for losses in (
        [0.0] * 12,
        [1e-12] * 11 + [1e12],
        [0.1 * row for row in range(12)],
        [float("nan"), float("inf")] + [1.0] * 10,
    ):
        batch = labelled("mlp", 1)[0]
        given = torch.tensor(losses, requires_grad=True)
        before = given.detach().clone()
        weights = method.weigh(batch, given)
        assert weights.shape == given.shape
        assert weights.dtype == given.dtype
        assert not weights.requires_grad
        assert bool(weights.isfinite().all())
        assert bool((weights >= 0).all())
        assert bool((weights[~before.isfinite()] == 0).all())
        assert float(weights[before.isfinite()].mean()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(given.detach(), before, equal_nan=True)


@pytest.mark.parametrize("name", names("reweighting"))
def test_rows_that_are_alike_weigh_alike(name: str) -> None:
    method: Reweighting = build("reweighting", name, SMALL.get(name, {}), SOURCES["mlp"])
    one = labelled("mlp", 1)[0].rows(torch.tensor([0]))
    nine = labelled("mlp", 1)[0].rows(torch.tensor([0] * 9))
    assert method.weigh(one.rows(torch.tensor([], dtype=torch.int64)), torch.zeros(0)).shape == (0,)
    torch.testing.assert_close(method.weigh(one, torch.ones(1)), torch.ones(1))
    torch.testing.assert_close(method.weigh(nine, torch.full((9,), 0.3)), torch.ones(9))


@pytest.mark.parametrize("name", names("reweighting"))
def test_a_restored_reweighting_goes_on_as_before(name: str) -> None:
    batches = labelled("mlp", 30)
    first, second = (build("reweighting", name, SMALL.get(name, {}), SOURCES["mlp"], seed) for seed in (11, 99))
    sizes = []
    for batch in batches[:20]:
        first.weigh(batch, losses_of(batch))
        sizes.append(size_of(first.state_dict()))
    assert sizes[-1] <= 1.1 * sizes[4] + 16
    second.weigh(batches[0], losses_of(batches[0]))
    second.load_state_dict(carried(first.state_dict()))
    for batch in batches[20:]:
        assert torch.equal(first.weigh(batch, losses_of(batch)), second.weigh(batch, losses_of(batch)))
    assert flat(first.state_dict()) == flat(second.state_dict())


class Learner:
    """A labelled learner with one safeguard, as the engine drives it."""

    def __init__(self, name: str, model: str, seed: int = 11) -> None:
        self.guard: Safeguard = build("safeguard", name, SMALL.get(name, {}), SOURCES[model], seed)
        self.model = self.guard.context.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.stepper = SafeStepper([self.guard])

    def learn(self, batch: LabelledBatch, kind: StepKind = StepKind.LEARNING) -> Outcome:
        self.guard.observe(batch)
        logits = self.model(batch.inputs)
        loss = F.cross_entropy(logits, batch.labels)
        outcome = self.stepper.step(self.model, self.optimizer, loss, kind)
        self.guard.verdict(batch, logits.detach())
        return outcome


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", names("safeguard"))
def test_a_restored_safeguard_goes_on_as_before(name: str, model: str) -> None:
    batches = labelled(model, 14)
    first, second = Learner(name, model), Learner(name, model, seed=99)
    sizes = []
    for number, batch in enumerate(batches[:10]):
        first.learn(batch, StepKind.ADAPTATION if number % 2 else StepKind.LEARNING)
        sizes.append(size_of(first.guard.state_dict()))
    assert sizes[-1] <= 1.1 * sizes[4] + 16
    second.learn(batches[3])
    second.model.load_state_dict(carried(first.model.state_dict()))
    second.guard.load_state_dict(carried(first.guard.state_dict()))
    assert flat(second.guard.state_dict()) == flat(first.guard.state_dict())
    for batch in batches[10:]:
        assert first.learn(batch) == second.learn(batch)
    assert same_weights(weights_of(first.model), weights_of(second.model))
    assert flat(first.guard.state_dict()) == flat(second.guard.state_dict())
    assert same_weights(weights_of(first.guard.context.source), weights_of(SOURCES[model]))


@pytest.mark.parametrize("name", names("safeguard"))
def test_a_safeguard_survives_any_batch(name: str) -> None:
    learner = Learner(name, "conv_bn")
    good = labelled("conv_bn", 1)[0]
    bad = labelled_of(good.inputs.clone(), good.labels)
    bad.inputs[0], bad.inputs[1] = float("nan"), float("inf")
    learner.guard.observe(bad)
    learner.guard.observe(good.rows(torch.tensor([], dtype=torch.int64)))
    learner.guard.observe(good.rows(torch.tensor([0])))
    for kind in StepKind:
        penalty = learner.guard.penalty(learner.model, kind)
        assert penalty is None or (penalty.shape == () and bool(penalty.isfinite()))
    assert learner.guard.verdict(bad, torch.zeros(12, CLASSES)) in Verdict
    assert learner.guard.verdict(good, torch.full((12, CLASSES), float("nan"))) in Verdict
    learner.learn(good)
    learner.guard.released(weights_of(learner.model))
    learner.guard.reset()
    learner.learn(good)
    assert all(bool(t.isfinite().all()) for t in learner.model.state_dict().values())


@pytest.mark.parametrize("name", names("safeguard"))
def test_a_safeguard_only_touches_what_is_stepped(name: str) -> None:
    learner = Learner(name, "conv_bn")
    for batch in labelled("conv_bn", 4):
        learner.learn(batch)
    before = weights_of(learner.model)
    flags = [(p.requires_grad, p.dtype) for p in learner.model.parameters()]
    learner.guard.observe(labelled("conv_bn", 5)[-1])
    learner.guard.penalty(learner.model, StepKind.ADAPTATION)
    assert same_weights(weights_of(learner.model), before)
    norm = learner.model.get_submodule("1")
    learner.optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    for batch in labelled("conv_bn", 3):
        learner.learn(batch, StepKind.ADAPTATION)
    after = weights_of(learner.model)
    assert {key for key in after if not torch.equal(after[key], before[key])} <= {"1.weight", "1.bias"}
    assert [(p.requires_grad, p.dtype) for p in learner.model.parameters()] == flags
    assert not any(module.training for module in learner.model.modules())


def audit_of(model: nn.Module, inputs: Tensor) -> AuditWindow:
    with torch.no_grad():
        predicted = model(inputs).argmax(1)
    return AuditWindow(inputs=inputs, labels=predicted.clone(), source=predicted, live=predicted, release=predicted)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", names("interpolation"))
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_candidates_are_weights_between_two(name: str, model: str, rows: int) -> None:
    method: Interpolation = build("interpolation", name, {}, SOURCES[model])
    torch.manual_seed(0)
    other = copy.deepcopy(SOURCES[model])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    release, live = weights_of(SOURCES[model]), weights_of(other)
    kept = [weights_of(SOURCES[model]), weights_of(other)]
    audit = audit_of(other, draw(model, rows) if rows else draw(model, 1)[:0])
    proposals = list(method.propose(release, live, audit))
    again = list(method.propose(release, live, audit))
    assert proposals
    for proposal, twin in zip(proposals, again, strict=True):
        assert 0 <= proposal.alpha <= 1
        assert same_weights(proposal.weights, twin.weights)
        for key, tensor in proposal.weights.items():
            assert (tensor.shape, tensor.dtype, tensor.device) == (live[key].shape, live[key].dtype, live[key].device)
            assert bool(tensor.isfinite().all())
            if not tensor.is_floating_point():
                assert torch.equal(tensor, live[key])
        if proposal.alpha in (0, 1):
            end = release if proposal.alpha else live
            assert all(torch.equal(proposal.weights[key], t) for key, t in end.items() if t.is_floating_point())
    assert same_weights(release, kept[0])
    assert same_weights(live, kept[1])
    assert same_weights(weights_of(method.context.source), weights_of(SOURCES[model]))
    flat(method.state_dict())


@pytest.mark.parametrize("name", names("gate"))
@pytest.mark.parametrize(("rows", "candidates"), [(0, 0), (0, 2), (3, 2), (3000, 0), (3000, 3)])
def test_a_gate_decides_from_the_evidence_alone(name: str, rows: int, candidates: int) -> None:
    method: Gate = build("gate", name, {}, SOURCES["mlp"])
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    noisy = torch.where(torch.rand(rows, generator=generator) < 0.3, (labels + 1) % CLASSES, labels)
    window = AuditWindow(inputs=torch.zeros(rows, 1), labels=labels, source=noisy, live=labels, release=noisy)
    shares = [step / 2 for step in range(candidates)]
    evidence = Evidence(window, tuple(Candidate(share, labels.clone()) for share in shares))
    decision: Decision = method.decide(evidence)
    assert method.decide(evidence) == decision
    assert decision.action in Action
    assert decision.reason
    assert (decision.action is Action.PROMOTE) == (0 <= decision.chosen < candidates)
    assert rows or decision.action is Action.HOLD
    assert all(isinstance(value, float | int) for value in decision.figures.values())
    assert torch.equal(window.live, labels)
