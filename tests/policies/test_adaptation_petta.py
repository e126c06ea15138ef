from __future__ import annotations

import math

import pytest
import torch

from policies.adaptation.petta import PeTTA, persistence
from tests.policies.models import applied, batch_of, build, drive, source_model, stream, weights_of
from tests.policies.scores import logits_of, on_scores


def petta(**params: float) -> PeTTA:
    method: PeTTA = build("adaptation", "petta", params, source_model("mlp_bn1d"))
    return method


def test_persistence_grows_with_the_drift() -> None:
    assert persistence(math.log(2), 10.0, 1e-3) == pytest.approx((5.0, 5e-4))
    assert persistence(0.0, 10.0, 1e-3) == (0.0, 1e-3)
    assert persistence(math.inf, 10.0, 1e-3) == (10.0, 0.0)


def test_the_drift_is_the_distance_of_class_means_in_units_of_the_source() -> None:
    method = petta(prototype_rows=4, follow=0.5)
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 0.0], [2.0, 4.0]]).double()
    labels = torch.tensor([0, 0, 1, 1])
    method._sums = torch.zeros(3, 4, 2, dtype=torch.float64)
    for held, term in zip(method._sums, (torch.ones_like(features), features, features.square()), strict=True):
        held.index_add_(0, labels, term)
    method._rows = 4
    # Class 0 has mean (2, 1), variance (1, 1); its running mean goes half of the way to (4, 1).
    drift = method._drifted(torch.tensor([[4.0, 1.0], [9.0, 9.0]]), torch.tensor([0, 2]))
    assert drift == pytest.approx((1.0 + 0.0) / 2, rel=1e-5)
    drift = method._drifted(torch.tensor([[4.0, 1.0]]), torch.tensor([0]))
    assert drift == pytest.approx(1.5**2 / 2, rel=1e-5)


def test_nothing_is_known_to_drift_before_the_source_was_measured() -> None:
    method = petta(prototype_rows=40, interval=16, capacity=16)
    drifts = []
    for batch in stream("mlp_bn1d", 5):
        drive(method, [batch])
        drifts.append(method.gauges["drift"])
    assert drifts[:2] == [0.0, 0.0]
    assert all(drift > 0 for drift in drifts[2:])
    assert method.gauges["prototype_rows"] == 48


def test_the_teacher_follows_at_the_rate_of_the_drift() -> None:
    method = petta(interval=16, capacity=16, nu=0.5, prototype_rows=2)
    batches = list(stream("mlp_bn1d", 2))
    drive(method, batches[:1])
    teacher = weights_of(method.context.model)
    method.adapt(batches[1])
    assert applied(method.update())
    student = method.state_dict()["student"]
    assert 0 < method._rate < 0.5
    for name in method.adapted:
        wanted = torch.lerp(teacher[name], student[name], method._rate)
        torch.testing.assert_close(weights_of(method.context.model)[name], wanted)


def test_labelled_learning_moves_the_source_copy() -> None:
    method = petta()
    before = {"1.bias": torch.zeros(8)}
    method.learned(before, {"1.bias": torch.ones(8)})
    wanted = method.context.source.state_dict()["1.bias"] + 1
    torch.testing.assert_close(method.state_dict()["source"]["1.bias"], wanted)


def test_rdumb_starts_over_every_so_many_batches() -> None:
    method = on_scores("rdumb", every=2, margin=1.0, similarity=1.0, lr=0.1)
    source = weights_of(method.context.source)
    moved = []
    for _ in range(5):
        drive(method, [batch_of(logits_of([0.9, 0.1], [0.3, 0.7]))])
        moved.append(not torch.equal(weights_of(method.context.model)["norm.bias"], source["norm.bias"]))
    assert moved == [True, False, True, False, True]
    assert method.gauges["resets"] == 2
    assert method.state_dict()["mean"] is not None


def test_rdumb_keeps_what_was_learned_from_labels() -> None:
    method = on_scores("rdumb", every=1, margin=1.0, similarity=1.0, lr=0.1)
    method.learned({"norm.bias": torch.zeros(2)}, {"norm.bias": torch.ones(2)})
    drive(method, [batch_of(logits_of([0.9, 0.1]))])
    state = method.state_dict()
    assert weights_of(method.context.model)["norm.bias"].tolist() == [1.0, 1.0]
    assert state["mean"] is None
    assert state["optimizer"] == {}
