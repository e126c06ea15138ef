"""What every adaptation must do; methods are found by the registry. Other kinds: see `test_conformance_kinds`."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from policies.interfaces import Adaptation, Batch, PolicyError, Weights
from policies.registry import known
from tests.policies.models import (
    CLASSES,
    MODELS,
    batch_of,
    build,
    carried,
    draw,
    drive,
    flat,
    same_weights,
    size_of,
    source_model,
    stream,
    weights_of,
)

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "bn": [{"alpha": 1.0}, {"mode": "prior"}, {"mode": "ema"}],
    "tent": [{"optimizer": "sgd", "lr": 0.01}],
    "rotta": [{"capacity": 6, "interval": 5, "nu": 0.1}],
    "delta": [
        {"loss": "reliable", "margin": 1.0, "floor": 0.0},
        {"renormalise": False, "loss": "pseudo_label", "confidence": 0.0},
    ],
    "note": [{"instance_aware": False}],
    "cotta": [{"views": 2, "threshold": 1.0, "symmetric": True}],
    "class_bn": [{"window": 10}, {"offset_rate": 0.0, "window": 1}],
    "auto": [
        {
            "sure": -1e9,
            "gain": -1e9,
            "window": 12,
            "patience": 1,
            "persistence": 0.0,
            "worse": 9.0,
            "imbalance": 1.0,
            "every": 1,
        }
    ],
    "per_group": [{"of": "class_bn", "params": {"window": 10}, "groups": 2}, {"of": "t3a"}],
    "lame": [{"affinity": "knn"}, {"affinity": "linear", "symmetric": True}],
}
"""Parameters beside the defaults that are worth the same checks."""

EAGER: dict[str, dict[str, Any]] = {
    "auto": {
        "sure": -1e9,
        "gain": -1e9,
        "window": 12,
        "patience": 1,
        "worse": 9.0,
        "moved": 0.0,
        "reference": 16,
        "imbalance": 1.0,
        "every": 1,
    },
    "eta": {"margin": 1.0, "similarity": 1.0},
    "eata": {"margin": 1.0, "similarity": 1.0, "fisher_rows": 40},
    "sar": {"margin": 1.0},
    "deyo": {"margin": 1.0, "drop": -0.5},
    "sotta": {"confidence": 0.0, "capacity": 6, "interval": 5},
    "note": {"capacity": 6, "interval": 5},
    "cotta": {"threshold": 0.0},
    "memo": {"views": 2},
    "petta": {"capacity": 6, "interval": 8, "nu": 0.1, "prototype_rows": 30},
    "rdumb": {"margin": 1.0, "similarity": 1.0, "every": 3},
    "graded": {"margin": 1.0, "similarity": 1.0, "every": 5, "cooldown": 1, "watch": 3, "memory": 4},
    "tribe": {"margin": 1.0, "eta": 0.1},
    "t3a": {"supports": 2},
    "adanpc": {"capacity": 20, "neighbours": 3, "confidence": 0.0},
    "foa": {"window": 4, "reference_rows": 20},
}
"""What stands for the defaults of methods that choose rows, as models that were never trained are sure of none, or that
fill their memory slowly."""

COSTLY = {"memo"}
"""Methods with passes of their own for every row: fewer rows and models do."""

SOURCES = {name: source_model(name) for name in (*MODELS, "mlp_heads")}


def made(name: str, params: dict[str, Any], model: str, seed: int = 11) -> Adaptation:
    method: Adaptation = build("adaptation", name, params, SOURCES[model], seed)
    return method


def rows_of(name: str) -> int:
    """Rows of a batch."""
    return 8 if name in COSTLY else 16


def refusal(name: str, params: dict[str, Any], model: str) -> str:
    """Why the method does not run on the model; empty where it does."""
    try:
        made(name, params, model)
    except PolicyError as error:
        return str(error)
    return ""


ALL = [(name, EAGER.get(name, {}), model) for name in known("adaptation") for model in MODELS]
ALL += [("drm", params, "mlp_heads") for params in ({}, {"confidence": 0.0, "gamma": -1.0})]
ALL += [(name, p, model) for name, more in VARIANTS.items() for p in more for model in ("conv_bn", "mlp")]
REFUSED = {(name, model): why for name, params, model in ALL if (why := refusal(name, params, model))}
CASES = [
    pytest.param(name, params, model, id="-".join([name, *map(str, params.values()), model]))
    for name, params, model in ALL
    if (name, model) not in REFUSED and not (name in COSTLY and model in ("mlp", "mlp_layer_norm"))
]

DRAWN = {"views"}
"""Parameters of those whose answers depend on views of the rows, drawn row by row."""

every_case = pytest.mark.parametrize(("name", "params", "model"), CASES)

LENGTH, HALF = 12, 6
"""Batches of the undisturbed run, and of its first part."""


class Run(NamedTuple):
    """What a method makes of the stream of a model if nothing happens to it, and whether it leaves that as it is."""

    answers: list[Tensor]
    states: tuple[dict[str, Any], ...]
    """At the beginning, after the first half and at the end."""
    weights: Weights
    batches_changed: bool


RUNS: dict[tuple[str, str, str], Run] = {}
"""Every check compares with the same one, so that it is made once."""


def undisturbed(name: str, params: dict[str, Any], model: str) -> Run:
    key = name, repr(params), model
    if key not in RUNS:
        method, batches = made(name, params, model), list(stream(model, LENGTH, rows_of(name)))
        before = [batch.inputs.clone() for batch in batches]
        answers, states = [], [flat(method.state_dict())]
        for part in (batches[:HALF], batches[HALF:]):
            answers += drive(method, part)
            states.append(flat(method.state_dict()))
        changed = not all(torch.equal(batch.inputs, old) for batch, old in zip(batches, before, strict=True))
        RUNS[key] = Run(answers, tuple(states), weights_of(method.context.model), changed)
    return RUNS[key]


def test_a_model_is_refused_with_a_sentence_that_offers_another_method() -> None:
    refused = {model for name, model in REFUSED if name not in ("drm", "nhl")}
    assert refused <= {"mlp", "mlp_layer_norm"}, "BatchNorm suits every method that wants no heads or convolution"
    for name, why in REFUSED.items():
        assert "choose" in why, name


def finite(model: nn.Module) -> bool:
    return all(bool(t.isfinite().all()) for t in model.state_dict().values())


@every_case
def test_rows_that_are_not_finite_leave_the_others_as_they_are(name: str, params: dict[str, Any], model: str) -> None:
    dirty, clean = made(name, params, model), made(name, params, model)
    for batch in stream(model, 6, rows_of(name)):
        inputs = batch.inputs.clone()
        inputs[3].view(-1)[0], inputs[7].view(-1)[1] = float("nan"), float("inf")
        keep = torch.tensor([row for row in range(len(batch)) if row not in (3, 7)])
        logits = drive(dirty, [Batch(batch.ids, inputs, batch.times, batch.groups, batch.now)])[0]
        assert torch.equal(logits[keep], drive(clean, [batch.rows(keep)])[0])
        assert torch.equal(logits[[3, 7]], torch.zeros(2, CLASSES))
    assert same_weights(weights_of(dirty.context.model), weights_of(clean.context.model))
    assert flat(dirty.state_dict()) == flat(clean.state_dict())


@every_case
def test_huge_rows_are_survived(name: str, params: dict[str, Any], model: str) -> None:
    method = made(name, params, model)
    for number, batch in enumerate(stream(model, 8, rows_of(name))):
        inputs = batch.inputs.clone()
        if number in (2, 3):
            inputs[::5] *= 1e37 if number == 2 else 1e19
        logits = drive(method, [Batch(batch.ids, inputs, batch.times, batch.groups, batch.now)])[0]
        assert bool(logits.isfinite().all())
        assert finite(method.context.model)


@every_case
def test_odd_batches_are_answered(name: str, params: dict[str, Any], model: str) -> None:
    method = made(name, params, model)
    torch.manual_seed(0)
    row = draw(model, 1)
    nothing, one, same, more = drive(
        method, [batch_of(row[:0]), batch_of(row), batch_of(row.expand(9, *row.shape[1:])), batch_of(draw(model, 70))]
    )
    assert nothing.shape == (0, CLASSES)
    assert one.shape == (1, CLASSES)
    assert more.shape == (70, CLASSES)
    assert bool(torch.cat([one, same, more]).isfinite().all())
    if not params.keys() & DRAWN:
        torch.testing.assert_close(same, same[:1].expand(9, -1))
    assert finite(method.context.model)


@every_case
def test_a_batch_is_never_changed(name: str, params: dict[str, Any], model: str) -> None:
    assert not undisturbed(name, params, model).batches_changed


@every_case
@pytest.mark.parametrize("between", ["after_update", "before_update"])
def test_a_restored_run_equals_an_uninterrupted_one(
    name: str, params: dict[str, Any], model: str, between: str
) -> None:
    batches = list(stream(model, LENGTH, rows_of(name)))
    whole, first = undisturbed(name, params, model), made(name, params, model)
    drive(first, batches[:5])
    first.adapt(batches[5])
    if between == "after_update":
        first.update()
    second = made(name, params, model, seed=99)
    drive(second, batches[:2])  # What it held before must not matter.
    second.context.model.load_state_dict(carried(first.context.model.state_dict()))
    second.load_state_dict(carried(first.state_dict()))
    assert flat(second.state_dict()) == flat(first.state_dict())
    if between == "before_update":
        second.update()
    for answer, wanted in zip(drive(second, batches[6:]), whole.answers[6:], strict=True):
        assert torch.equal(answer, wanted)
    assert same_weights(weights_of(second.context.model), whole.weights)
    assert flat(second.state_dict()) == whole.states[2]


@every_case
def test_the_same_seed_gives_the_same_run(name: str, params: dict[str, Any], model: str) -> None:
    one, batches = undisturbed(name, params, model), list(stream(model, HALF, rows_of(name)))
    torch.manual_seed(2)  # Global random state must not matter.
    two = made(name, params, model)
    for answer, wanted in zip(drive(two, batches), one.answers[:HALF], strict=True):
        assert torch.equal(answer, wanted)
    assert flat(two.state_dict()) == one.states[1]


@every_case
def test_reset_returns_to_the_start(name: str, params: dict[str, Any], model: str) -> None:
    method, fresh = made(name, params, model), undisturbed(name, params, model)
    batches = list(stream(model, 8, rows_of(name)))
    drive(method, batches)
    for _ in range(2):
        method.reset()
        assert same_weights(weights_of(method.context.model), weights_of(SOURCES[model]))
        assert flat(method.state_dict()) == fresh.states[0]
    for answer, wanted in zip(drive(method, batches), fresh.answers[:8], strict=True):
        assert torch.equal(answer, wanted)


@every_case
def test_only_adapted_parameters_change(name: str, params: dict[str, Any], model: str) -> None:
    method = made(name, params, model)
    live = method.context.model
    before = {key: p.detach().clone() for key, p in live.named_parameters()}
    flags = {key: (p.requires_grad, p.dtype, p.device) for key, p in live.named_parameters()}
    assert method.adapted <= before.keys()
    drive(method, stream(model, 8, rows_of(name)))
    changed = {key for key, p in live.named_parameters() if not torch.equal(p, before[key])}
    assert changed <= method.adapted
    assert bool(changed) == bool(method.adapted), "what is said to adapt must adapt"
    assert {key: (p.requires_grad, p.dtype, p.device) for key, p in live.named_parameters()} == flags
    assert all(p.grad is None for p in live.parameters())
    assert not any(module.training for module in live.modules())
    assert same_weights(weights_of(method.context.source), weights_of(SOURCES[model]))


@every_case
def test_names_of_the_state_stay(name: str, params: dict[str, Any], model: str) -> None:
    method = made(name, params, model)
    assert list(method.context.model.state_dict()) == list(SOURCES[model].state_dict())


@every_case
def test_looking_at_the_live_model_changes_nothing(name: str, params: dict[str, Any], model: str) -> None:
    method = made(name, params, model)
    drive(method, stream(model, 5, rows_of(name)))
    weights, state = weights_of(method.context.model), flat(method.state_dict())
    inputs = draw(model, 8)
    with torch.no_grad():
        together = method.context.model(inputs)
        alone = torch.cat([method.context.model(row[None]) for row in inputs])
    torch.testing.assert_close(together, alone)
    assert same_weights(weights_of(method.context.model), weights)
    assert flat(method.state_dict()) == state


@every_case
def test_labelled_steps_in_between_are_taken_over(name: str, params: dict[str, Any], model: str) -> None:
    method = made(name, params, model)
    live = method.context.model
    batches = list(stream(model, 10, rows_of(name)))
    for batch in batches[:5]:
        method.adapt(batch)
        before = {key: p.detach().clone() for key, p in live.named_parameters()}
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.add_(0.01)
        method.learned(before, {key: p.detach().clone() for key, p in live.named_parameters()})
        method.update()
    assert all(bool(answer.isfinite().all()) for answer in drive(method, batches[5:]))


@every_case
def test_the_order_of_rows_does_not_matter_to_answers(name: str, params: dict[str, Any], model: str) -> None:
    if params.keys() & DRAWN:
        pytest.skip("every row has views of its own")
    one, two = made(name, params, model), made(name, params, model)
    batch = next(stream(model, 1, rows=20))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two.adapt(batch.rows(order)), one.adapt(batch)[order], rtol=1e-4, atol=1e-5)


@every_case
def test_detach_leaves_the_model_as_it_was_found(name: str, params: dict[str, Any], model: str) -> None:
    method = made(name, params, model)
    live = method.context.model
    drive(method, stream(model, 8, rows_of(name)))
    weights = weights_of(live)
    method.detach()
    kinds = {key: type(module) for key, module in live.named_modules()}
    assert kinds == {key: type(module) for key, module in SOURCES[model].named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in live.modules())
    assert not any(callable(value) for module in live.modules() for value in vars(module).values())
    assert same_weights(weights_of(live), weights)


@pytest.mark.parametrize("name", known("adaptation"))
def test_memory_does_not_grow_with_the_stream(name: str) -> None:
    model = {"drm": "mlp_heads", "nhl": "conv_bn"}.get(name, "mlp_bn1d")
    method = made(name, EAGER.get(name, {}), model)
    sizes = []
    for number, batch in enumerate(stream(model, 60, 2 if name in COSTLY else 16)):
        drive(method, [batch])
        if number in (19, 59):
            sizes.append(size_of(method.state_dict()))
    assert sizes[1] <= 1.05 * sizes[0] + 32
