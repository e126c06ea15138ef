from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from policies.adaptation.rotta import RoTTA, timeliness
from policies.interfaces import Context, Outcome, PolicyError, StepKind
from policies.memory import Bank, Timetable
from policies.norm import Blending
from policies.stepping import SafeStepper
from tests.policies.models import (
    applied,
    batch_of,
    context_for,
    draw,
    drive,
    same_weights,
    source_model,
    stream,
    weights_of,
)


def rotta(model: str = "conv_bn", **params: Any) -> tuple[RoTTA, Context]:
    context = context_for(source_model(model))
    return RoTTA(RoTTA.Params.model_validate(params), context), context


def after(capacity: int, classes: int, offered: list[tuple[int, float]]) -> dict[int, list[tuple[float, int]]]:
    table = Timetable(capacity, classes)
    for label, uncertainty in offered:
        table.insert(label, uncertainty)
    return table.items()


def test_timeliness_halves_the_newest_and_falls_with_age() -> None:
    torch.testing.assert_close(timeliness(torch.tensor([0.0, 1.0])), torch.tensor([0.5, 0.268941]), atol=1e-6, rtol=0)


def test_robust_batch_norm_moves_a_twentieth_of_the_way() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1)).eval()
    blending = Blending(model, share=0.05, unbiased=False, store=True)
    with blending.active():
        got = model(torch.tensor([[0.0], [4.0]]))  # mean 2, variance 4
    assert [float(t) for t in blending.statistics()] == pytest.approx([0.10, 1.15])
    torch.testing.assert_close(got, torch.tensor([[-0.1], [3.9]]) / math.sqrt(1.15 + 1e-5))


def test_scores_of_the_bank() -> None:
    table = Timetable(4, 2)
    scores = [table.score(2, 0.1), table.score(1, 0.2), table.score(0, 0.05)]
    assert scores == pytest.approx([0.766729, 0.850716, 0.572135], abs=1e-6)


def test_the_most_removable_of_a_full_class_gives_way() -> None:
    assert after(4, 2, [(0, 0.1), (0, 0.2), (0, 0.05)]) == {0: [(0.1, 3), (0.05, 1)]}


def test_a_class_at_its_quota_competes_within() -> None:
    assert after(2, 2, [(0, 0.1), (0, 0.2), (1, 0.3)]) == {0: [(0.1, 3)], 1: [(0.3, 1)]}


def test_a_refused_newcomer_still_ages_the_bank() -> None:
    assert after(2, 2, [(0, 0.1), (1, 0.2), (0, 0.69)]) == {0: [(0.1, 3)], 1: [(0.2, 2)]}


def test_a_quota_below_one_keeps_one_item_of_a_class() -> None:
    assert len(after(64, 100, [(7, 0.5)] * 10)[7]) == 1


def test_a_full_bank_gives_a_small_class_room_from_the_largest() -> None:
    kept = after(4, 3, [(0, 0.1), (0, 0.3), (1, 0.1), (1, 0.1), (2, 0.1)])
    assert kept == {0: [(0.1, 5)], 1: [(0.1, 3), (0.1, 2)], 2: [(0.1, 1)]}


def test_of_equal_scores_the_later_gives_way() -> None:
    table = Timetable(4, 3, lambda_t=0.0)
    for label in (0, 0, 1, 1, 2):
        table.insert(label, 0.5 if label < 2 else 0.1)
    assert {label: len(items) for label, items in table.items().items()} == {0: 2, 1: 1, 2: 1}
    assert table.items()[1] == [(0.5, 3)]


def reference_insert(
    bank: dict[int, list[list[Any]]], capacity: int, classes: int, row: tuple[int, float, int]
) -> None:
    """The rule in its plainest form: lists of ``[age, uncertainty, payload]`` by class."""
    label, uncertainty, payload = row

    def score(age: int, u: float) -> float:
        return 1 / (1 + math.exp(-age / capacity)) + u / math.log(classes)

    full = len(bank[label]) >= capacity / classes
    crowded = sum(map(len, bank.values())) >= capacity
    most = max(map(len, bank.values()))
    candidates = [label] if full else [c for c in sorted(bank) if len(bank[c]) == most] if crowded else []
    best: tuple[float, int, int] | None = None
    for c in candidates:
        for index, (age, u, _) in enumerate(bank[c]):
            if best is None or score(age, u) >= best[0]:
                best = (score(age, u), c, index)
    if best is None or best[0] > score(0, uncertainty):
        if best is not None:
            bank[best[1]].pop(best[2])
        bank[label].append([0, uncertainty, payload])
    for items in bank.values():
        for item in items:
            item[0] += 1


@pytest.mark.parametrize(("capacity", "classes"), [(16, 4), (10, 4), (8, 20)])
def test_the_bank_equals_the_rule_row_by_row(capacity: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(capacity)
    bank, plain = Bank(Timetable(capacity, classes)), {c: list[list[Any]]() for c in range(classes)}
    payload = 0
    for size in (1, 7, 64, 30, 64):
        weights = torch.rand(classes, generator=generator) ** 4 + 1e-3
        labels = torch.multinomial(weights, size, replacement=True, generator=generator).tolist()
        entropies = (torch.rand(size, generator=generator).double() * math.log(classes)).tolist()
        inputs = torch.arange(payload, payload + size).float().view(-1, 1)
        bank.insert(inputs, list(zip(labels, entropies, strict=True)))
        for label, entropy in zip(labels, entropies, strict=True):
            reference_insert(plain, capacity, classes, (label, entropy, payload))
            payload += 1
        wanted = sorted((item[2], item[0]) for items in plain.values() for item in items)
        ages = (bank.ages() * capacity).round().int().tolist()
        assert sorted(zip(bank.inputs.flatten().int().tolist(), ages, strict=True)) == wanted


def test_rows_of_another_shape_are_refused_with_a_sentence() -> None:
    bank = Bank(Timetable(4, 2))
    bank.insert(torch.zeros(1, 3), [(0, 0.1)])
    with pytest.raises(PolicyError, match="one shape and type"):
        bank.insert(torch.zeros(1, 4), [(1, 0.1)])


def test_a_smaller_bank_starts_empty() -> None:
    large, small = Bank(Timetable(4, 2)), Bank(Timetable(1, 2))
    large.insert(torch.zeros(2, 3), [(0, 0.1), (1, 0.1)])
    small.load_state_dict(large.state_dict(), torch.device("cpu"))
    assert len(small) == 0
    small.insert(torch.ones(1, 3), [(1, 0.1)])
    assert small.inputs.tolist() == [[1.0, 1.0, 1.0]]


class Recorder(SafeStepper):
    """Counts steps and keeps the last loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, kind: StepKind) -> Outcome:
        self.losses.append(float(loss.detach()))
        return super().step(model, optimizer, loss, kind)


@pytest.mark.parametrize("size", [1, 7, 64, 150])
def test_an_update_follows_every_interval_of_rows_whatever_the_batches(size: int) -> None:
    recorder = Recorder()
    base = context_for(source_model("mlp_bn1d"))
    context = Context(model=base.model, source=base.source, num_classes=4, seed=1, stepper=recorder)
    method = RoTTA(RoTTA.Params(), context)
    torch.manual_seed(0)
    rows = draw("mlp_bn1d", 200)
    drive(method, [batch_of(rows[start : start + size]) for start in range(0, 200, size)])
    assert len(recorder.losses) == 3


def test_one_update_is_the_equation() -> None:
    torch.manual_seed(0)
    rows = draw("mlp_bn1d", 8)
    method, context = rotta("mlp_bn1d", capacity=8, interval=8, augmentation="none", nu=0.25, lr=0.01)
    source = source_model("mlp_bn1d")
    assert isinstance(source, nn.Sequential)
    teacher = weights_of(source)
    student = {**teacher, "1.weight": teacher["1.weight"] * 2, "1.bias": teacher["1.bias"] - 0.5}
    method.load_state_dict({**method.state_dict(), "student": student})
    assert torch.equal(method.adapt(batch_of(rows)), source(rows).detach())
    assert applied(method.update())
    kept, ages = method._bank.inputs.clone(), method._bank.ages()

    hidden = source[0](kept).detach()
    mean = 0.95 * teacher["1.running_mean"] + 0.05 * hidden.mean(0)
    var = 0.95 * teacher["1.running_var"] + 0.05 * hidden.var(0, correction=0)
    normal = (hidden - mean) / (var + 1e-5).sqrt()
    target = source[3](torch.relu(normal * teacher["1.weight"] + teacher["1.bias"])).softmax(1).detach()
    weight, bias = (nn.Parameter(student[key].clone()) for key in ("1.weight", "1.bias"))
    z = source[3](torch.relu(normal * weight + bias))
    cross_entropy = -(target * z.log_softmax(1)).sum(1)
    loss = (torch.exp(-ages) / (1 + torch.exp(-ages)) * cross_entropy).sum() / len(kept)
    assert method.gauges["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)

    optimizer = torch.optim.Adam([weight, bias], lr=0.01)
    loss.backward()
    optimizer.step()
    now = context.model.state_dict()
    torch.testing.assert_close(now["1.weight"], 0.75 * teacher["1.weight"] + 0.25 * weight.detach())
    torch.testing.assert_close(now["1.bias"], 0.75 * teacher["1.bias"] + 0.25 * bias.detach())
    torch.testing.assert_close(now["1.running_mean"], mean)
    torch.testing.assert_close(now["1.running_var"], var)


def test_frozen_weights_of_the_student_need_no_gradient() -> None:
    method, _ = rotta()
    wanting = {name for name, p in method._student_model.named_parameters() if p.requires_grad}
    assert wanting == method.adapted == {"1.weight", "1.bias", "4.weight", "4.bias"}


def test_a_labelled_step_moves_the_student_alike() -> None:
    method, context = rotta(interval=16)
    drive(method, stream("conv_bn", 3))
    before = weights_of(context.model)
    gap = before["1.weight"] - method.state_dict()["student"]["1.weight"]
    with torch.no_grad():
        for parameter in context.model.parameters():
            parameter.add_(0.5)
    names = dict(context.model.named_parameters())
    now = weights_of(context.model)
    method.learned({key: before[key] for key in names}, {key: now[key] for key in names})
    student = method.state_dict()["student"]
    torch.testing.assert_close(now["1.weight"] - student["1.weight"], gap)
    assert torch.equal(now["0.weight"], student["0.weight"])


class Veto(SafeStepper):
    """Refuses every step."""

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, kind: StepKind) -> Outcome:
        return Outcome(False, "vetoed")


def test_a_veto_leaves_weights_statistics_and_bank() -> None:
    base = context_for(source_model("conv_bn"))
    context = Context(model=base.model, source=base.source, num_classes=4, seed=1, stepper=Veto())
    method = RoTTA(RoTTA.Params(interval=16), context)
    drive(method, stream("conv_bn", 2))
    assert same_weights(weights_of(context.model), weights_of(context.source))
    assert same_weights(method.state_dict()["student"], weights_of(context.source))
    assert len(method._bank) > 0


def test_a_bank_that_overflows_statistics_is_emptied() -> None:
    method, context = rotta("mlp_bn1d", interval=4)
    inputs = torch.ones(4, 6)
    inputs[0] = 1e25
    method.adapt(batch_of(inputs))
    outcome = method.update()
    assert outcome is not None
    assert outcome.reason == "nonfinite_statistics"
    assert len(method._bank) == 0
    assert method.gauges["bank_emptied"] == 1
    assert same_weights(weights_of(context.model), weights_of(context.source))


def test_a_layout_of_memory_does_not_change_what_is_learned() -> None:
    one, two = rotta(interval=16), rotta(interval=16)
    for batch in stream("conv_bn", 4):
        drive(one[0], [batch])
        last = batch_of(batch.inputs.contiguous(memory_format=torch.channels_last))
        drive(two[0], [last])
    for left, right in zip(weights_of(one[1].model).values(), weights_of(two[1].model).values(), strict=True):
        torch.testing.assert_close(left, right)
