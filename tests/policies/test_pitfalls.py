"""What published code of these methods is known to get wrong, each with what shows that it is right here.

`PITFALLS` says what each is; a pitfall has tests named ``test_pNN_...``, or a word on why it cannot happen here.
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

from policies.adaptation.lame import LAME, affinity
from policies.adaptation.mezo import directional
from policies.adaptation.note import smoothed_entropy
from policies.adaptation.roid import corrected, diversity_weights
from policies.augment import feature_noise
from policies.balanced import overall
from policies.interfaces import Context, StepKind
from policies.registry import find
from policies.stepping import SafeStepper
from tests.policies.builders import linear_model, same
from tests.policies.models import (
    CLASSES,
    applied,
    batch_of,
    build,
    context_for,
    draw,
    drive,
    flat,
    labelled_of,
    same_weights,
    source_model,
    stream,
    weights_of,
)
from tests.policies.scores import logits_of, on_scores

PITFALLS = {
    1: "a step on an empty selection: the gradient is 0 and momentum moves the weights all the same",
    2: "running variances are unbiased, those that normalise in training are biased",
    3: "a width of 0 in an affinity, from one row or from equal ones, makes every answer NaN",
    4: "scores of a batch scaled by their own range are 0 / 0 for one row and for equal ones",
    5: "a prior multiplied onto logits makes a class with negative logits rarer, not more frequent",
    6: "what was averaged before a recovery is written back after it",
    7: "keeping all supports means dropping the last of each class at every call",
    8: "an entropy averaged over classes as well is 1 / K of the usual one",
    9: "a softmax of probabilities, and weights normalised over more heads than are summed",
    10: "the standard deviation of one row is NaN",
    11: "a solver that returns nothing where it does not converge",
    12: "a weighting called uniform that still passes through an exponential",
    13: "two averages that are one tensor, as the helper works in place",
    14: "a branch that waits for a loss above 0 which never is",
    15: "volumes below 0 for points on the wrong side of the reference",
    16: "a published benchmark that cannot run RoTTA in single precision",
    17: "weights that are moved to and fro in place do not come back exactly",
    18: "a loop over nearest neighbours that nothing promises to converge",
    19: "a reset that forgets weights and not the variance of their filter",
    20: "the variance between classes of a single class, and a mean over no sure row",
    21: "an average over parameters that says nothing of buffers, and a checkpoint without them",
}

NOT_HERE = {
    11: "no method here solves for directions between objectives",
    14: "no method here switches on the sign of a mutual information",
    15: "no method here measures hypervolumes",
    16: "nothing here is checked against that code",
}


def made(name: str, context: Context, **params: Any) -> Any:
    """An adaptation in a context of one's own."""
    method = find("adaptation", name)
    return method(method.Params.model_validate(params), context)


def test_every_pitfall_has_a_test_or_cannot_happen_here() -> None:
    named = [name for name, _ in inspect.getmembers(sys.modules[__name__], inspect.isfunction)]
    shown = {number for number in PITFALLS if any(name.startswith(f"test_p{number:02}_") for name in named)}
    assert shown.isdisjoint(NOT_HERE)
    assert shown | NOT_HERE.keys() == PITFALLS.keys() == set(range(1, 22))


@pytest.mark.parametrize("selection", ["mean", "masked"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_p01_a_loss_over_no_row_moves_neither_weights_nor_momentum(optimizer: Any, selection: str) -> None:
    model, rows = linear_model(), torch.tensor([[1.0, -1.0, 0.5], [0.2, 0.4, -2.0]])
    held = optimizer(model.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    stepper = SafeStepper()
    assert stepper.step(model, held, model(rows).square().mean(), StepKind.LEARNING).applied
    weights, memory = weights_of(model), flat({str(k): v for k, v in held.state_dict()["state"].items()})
    loss = model(rows)[:0].mean() if selection == "mean" else (model(rows) * 0).sum()
    assert not stepper.step(model, held, loss, StepKind.LEARNING).applied
    assert same(weights, weights_of(model))
    assert flat({str(k): v for k, v in held.state_dict()["state"].items()}) == memory


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("eta", {}),
        ("eata", {}),
        ("rdumb", {}),
        ("graded", {}),
        ("sar", {}),
        ("delta", {"loss": "reliable"}),
        ("delta", {"loss": "pseudo_label"}),
    ],
)
def test_p01_a_method_that_chooses_no_row_makes_no_step(name: str, params: dict[str, Any], optimizer: str) -> None:
    method = on_scores(name, 4, optimizer=optimizer, lr=0.1, **params)
    drive(method, [batch_of(logits_of([0.97, 0.03], classes=4))])
    before, held = weights_of(method.context.model), method.state_dict()
    mean, moments = held.get("mean"), flat(held["optimizer"])
    assert not same_weights(before, weights_of(method.context.source)), "there is momentum"
    method.adapt(batch_of(torch.zeros(4, 4)))
    assert method.update().reason == "empty"
    assert same_weights(weights_of(method.context.model), before)
    assert flat(method.state_dict()["optimizer"]) == moments
    if name != "delta":
        assert method.state_dict().get("mean") is mean


def test_p02_half_of_each_blends_mean_and_unbiased_variance() -> None:
    context = context_for(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval(), classes=1)
    half = made("bn", context, alpha=0.5).adapt(batch_of(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)))
    torch.testing.assert_close(half.flatten(), torch.tensor([0.0, 1.63299]), atol=1e-5, rtol=0)


def test_p02_the_batch_alone_is_normalised_by_the_biased_variance() -> None:
    context = context_for(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval(), classes=1)
    whole = made("bn", context, alpha=1.0).adapt(batch_of(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)))
    torch.testing.assert_close(whole.flatten(), torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)


def test_p03_affinities_of_equal_rows_are_one_and_of_one_row_too() -> None:
    assert affinity("rbf", torch.ones(3, 2), 5).tolist() == [[1.0] * 3] * 3
    assert affinity("rbf", torch.ones(1, 2), 5).tolist() == [[1.0]]
    two_pairs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert affinity("rbf", two_pairs, 2).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("kind", ["knn", "rbf", "linear"])
def test_p03_one_row_is_answered_as_it_is(kind: str) -> None:
    source = source_model("mlp")
    method = made("lame", context_for(source), affinity=kind)
    batch = next(stream("mlp", 1, rows=1))
    assert torch.equal(method.adapt(batch), source(batch.inputs).detach())


@pytest.mark.parametrize("rows", [1, 5])
def test_p04_one_row_and_equal_rows_have_finite_weights(rows: int) -> None:
    probabilities = torch.tensor([[0.75, 0.25]]).expand(rows, -1)
    weights = diversity_weights(torch.full((2,), 0.5), probabilities, torch.full((rows,), 0.562335), 1 / 3)
    torch.testing.assert_close(weights, torch.full((rows,), math.exp(3)))
    for name in ("roid", "cmf"):
        method = on_scores(name, prior_correction=False)
        method.adapt(batch_of(logits_of(*[[0.75, 0.25]] * rows)))
        assert applied(method.update())
        assert math.isfinite(method.gauges["loss"])


def test_p05_the_prior_raises_the_frequent_class_though_logits_are_negative() -> None:
    rows = torch.tensor([[9.0, -9.0]] * 40 + [[-1.0, -2.0]])
    assert corrected(rows).argmax(1).tolist() == [0] * 41, "times the prior (.75, .25) the last would be (-.75, -.5)"


def test_p06_recovery_returns_to_the_source_and_forgets_the_running_loss() -> None:
    method = on_scores("sar", lr=0.1, recovery=0.5)
    method.learned({"norm.bias": torch.zeros(2)}, {"norm.bias": torch.tensor([0.5, 0.5])})
    drive(method, [batch_of(logits_of([0.99, 0.01]))])
    state = method.state_dict()
    assert state["running"] is None
    assert state["optimizer"] == {}
    assert method.gauges["recoveries"] == 1
    live = method.context.model.state_dict()
    assert live["norm.weight"].tolist() == [1.0, 1.0]
    assert live["norm.bias"].tolist() == [0.5, 0.5], "what was learned from labels stays"


def test_p07_the_supports_grow_up_to_their_number_and_no_further() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    nn.init.eye_(model.get_parameter("0.weight"))
    method, sizes = made("t3a", context_for(model, classes=2), supports=3), []
    for _ in range(5):
        drive(method, [batch_of(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))])
        sizes.append(method.gauges["supports"])
    assert sizes == [2, 4, 6, 6, 6]


def test_p08_the_entropy_of_note_is_averaged_over_classes_too() -> None:
    assert smoothed_entropy(torch.zeros(3, 2)).item() == pytest.approx(0.34657, abs=1e-5)


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 1.0])
def test_p09_mixed_heads_give_probabilities_that_may_be_sure(gamma: float) -> None:
    method = build("adaptation", "drm", {"gamma": gamma, "confidence": 0.75}, source_model("mlp_heads"))
    first, *others = method.context.model.heads
    with torch.no_grad():
        first.weight.mul_(60)
    for head in others:
        head.load_state_dict(first.state_dict())
    answers = method.adapt(batch_of(draw("mlp_heads", 40)))
    torch.testing.assert_close(answers.exp().sum(1), torch.ones(40))
    assert math.e / (math.e + CLASSES - 1) < 0.75, "a second softmax could not reach the threshold"
    assert applied(method.update())


def test_p10_one_row_has_a_shift_and_a_view() -> None:
    method = build("adaptation", "foa", {"window": 1, "reference_rows": 1}, source_model("mlp"))
    answers = torch.cat(drive(method, stream("mlp", 4, rows=1)))
    assert bool(answers.isfinite().all())
    assert 0 < method.gauges["shift"] < math.inf
    row = torch.tensor([[1.0, 2.0]])
    assert torch.equal(feature_noise(row, torch.Generator().manual_seed(0), 0.1), row), "one row has no spread"


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
def test_p12_equal_losses_weigh_one_exactly_and_no_strategy_is_called_uniform(strategy: str) -> None:
    method = build("reweighting", "loss", {"strategy": strategy}, source_model("mlp"))
    batch = labelled_of(torch.zeros(5, 6), torch.zeros(5, dtype=torch.int64))
    assert method.weigh(batch, torch.full((5,), 0.7)).tolist() == [1.0] * 5


def test_p13_live_weights_anchor_and_hidden_model_are_tensors_of_their_own() -> None:
    method = on_scores("cmf", lr=0.1, pull=0.5, process_noise=1e4)
    drive(method, [batch_of(logits_of([0.9, 0.1], [0.3, 0.7]))])
    live = dict(method.context.model.named_parameters())
    for name in method.adapted:
        three = [live[name], method.state_dict()["anchor"][name], method.state_dict()["hidden"][name]]
        assert len({tensor.data_ptr() for tensor in three}) == 3
        assert not any(torch.equal(three[i], three[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_p17_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = nn.Parameter((torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype))
    before = weight.detach().clone()
    directional([weight], 1e-3, torch.Generator().manual_seed(1), lambda: weight.float().square().sum())
    assert torch.equal(weight, before)


def test_p17_a_step_without_a_learning_rate_changes_nothing() -> None:
    method = on_scores("mezo", lr=0.0)
    drive(method, [batch_of(logits_of([0.9, 0.1], [0.3, 0.7]))] * 3)
    assert same_weights(weights_of(method.context.model), weights_of(method.context.source))


def test_p18_a_cap_that_is_hit_is_counted() -> None:
    method = LAME(LAME.Params(max_iterations=1, affinity="knn"), context_for(source_model("mlp")))
    method.adapt(next(stream("mlp", 1)))
    assert method.gauges == {"iterations": 1, "cap_hits": 1}


def test_p19_reset_forgets_variance_and_hidden_model() -> None:
    method = on_scores("cmf", lr=0.1)
    drive(method, [batch_of(logits_of([0.9, 0.1], [0.3, 0.7]))])
    assert method.state_dict()["variance"] > 0
    method.reset()
    assert method.state_dict()["variance"] == 0
    assert all(torch.equal(method.state_dict()["hidden"][n], t) for n, t in weights_of(method.context.source).items())


def test_p20_one_class_alone_has_no_variance_between() -> None:
    assert overall(torch.stack([torch.zeros(1, 1), torch.ones(1, 1)]))[1].tolist() == [1.0]


def test_p20_without_a_sure_row_statistics_move_and_weights_do_not() -> None:
    method = build("adaptation", "tribe", {"margin": 1e-6}, source_model("conv_bn"))
    before = weights_of(method.context.model)
    method.adapt(next(stream("conv_bn", 1)))
    assert method.update().reason == "empty"
    after = weights_of(method.context.model)
    assert all(torch.equal(after[name], before[name]) for name in method.adapted)
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])


def test_p21_statistics_of_the_teacher_are_followed_not_averaged() -> None:
    method = build("adaptation", "rotta", {"nu": 1.0, "interval": 16}, source_model("conv_bn"))
    drive(method, stream("conv_bn", 3))
    teacher, student = method.context.model.state_dict(), method.state_dict()["student"]
    assert torch.equal(teacher["1.weight"], student["1.weight"])
    assert not torch.equal(teacher["1.running_mean"], student["1.running_mean"])


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("rotta", ["student"]),
        ("petta", ["student", "source"]),
        ("cotta", ["student", "anchor"]),
        ("tribe", ["anchor"]),
    ],
)
def test_p21_buffers_of_every_copy_are_part_of_the_state(name: str, copies: list[str]) -> None:
    source = source_model("conv_bn")
    state = build("adaptation", name, {}, source).state_dict()
    for copy in copies:
        assert state[copy].keys() == source.state_dict().keys()
