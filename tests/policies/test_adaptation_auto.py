"""Auto on small streams: what it enters, what it leaves, and what it returns to."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from policies.auto_params import AutoParams
from policies.interfaces import Adaptation, Batch
from policies.modes import Calm, Probe, Switch, Trials
from policies.safeguards.collapse import Collapse
from policies.streamview import StreamView
from tests.policies.models import batch_of, build, carried, context_for, same_weights, weights_of

CLASSES = 4


def points(classes: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """Rows of eight features around a corner for each class, moved by ``shift``."""
    corners = 2.5 * torch.eye(CLASSES).repeat(1, 2)
    direction = torch.tensor([2.0, -2.0, 1.0, 0.0, 2.0, -2.0, 1.0, 0.0])
    return corners[classes] + 0.8 * torch.randn(len(classes), 8, generator=generator) + shift * direction


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A model that has learned the four corners."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        classes = torch.randint(CLASSES, (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(points(classes, 0.0, generator)), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def stream(batches: int, shift: float, run: int, rows: int = 64, seed: int = 1) -> Iterator[tuple[Batch, Tensor]]:
    """Batches whose classes stay for ``run`` rows; independent ones where ``run`` is 0."""
    generator = torch.Generator().manual_seed(seed)
    total = batches * rows
    classes = torch.randint(CLASSES, (total,), generator=generator)
    if run:
        classes = (torch.arange(total) // run * 3 + torch.arange(total) // (run * CLASSES)) % CLASSES
    inputs = points(classes, shift, generator)
    for first in range(0, total, rows):
        yield batch_of(inputs[first : first + rows], first), classes[first : first + rows]


def errors(method: Adaptation, batches: Iterator[tuple[Batch, Tensor]]) -> float:
    """Share of wrong answers."""
    wrong = count = 0
    for batch, classes in batches:
        wrong += int((method.adapt(batch).argmax(1) != classes).sum())
        method.update()
        count += len(classes)
    return wrong / count


def auto(source: nn.Module, **params: Any) -> Adaptation:
    method: Adaptation = build("adaptation", "auto", params, source)
    return method


def plain(source: nn.Module) -> Adaptation:
    method: Adaptation = build("adaptation", "none", {}, source)
    return method


def test_without_drift_it_comes_to_rest_at_the_source_model(source: nn.Module) -> None:
    method = auto(source)
    error = errors(method, stream(40, 0.0, 0))
    assert error <= errors(plain(source), stream(40, 0.0, 0)) + 0.01
    assert not method.gauges["correlated"]


@pytest.mark.parametrize(("rows", "batches"), [(64, 3), (64, 60), (1, 1500)])
def test_without_drift_nothing_is_changed_and_few_rows_go_through_twice(
    source: nn.Module, rows: int, batches: int
) -> None:
    method, count = auto(source), [0]
    for model in (method.context.model, method.context.source):
        model.register_forward_pre_hook(lambda _, inputs: count.__setitem__(0, count[0] + len(inputs[0])))
    error = errors(method, stream(batches, 0.0, 0, rows=rows, seed=3))
    assert error == errors(plain(source), stream(batches, 0.0, 0, rows=rows, seed=3))
    assert method.gauges["changes"] == 0
    assert count[0] <= 1.2 * rows * batches


def test_the_first_answers_are_those_of_the_source_model(source: nn.Module) -> None:
    method = auto(source)
    for batch, _ in stream(1, 1.2, 0):
        assert torch.equal(method.adapt(batch).argmax(1), source(batch.inputs).argmax(1))
    assert not method.gauges["adapting"]


def test_drift_of_mixed_classes_is_adapted_to_with_steps(source: nn.Module) -> None:
    method = auto(source)
    error = errors(method, stream(40, 1.2, 0))
    assert error < 0.7 * errors(plain(source), stream(40, 1.2, 0))
    assert method.gauges["adapting"]
    assert not method.gauges["imbalanced"]
    changed = {
        key for key, p in method.context.model.named_parameters() if not torch.equal(p, source.state_dict()[key])
    }
    assert changed == method.adapted


def test_classes_in_runs_are_smoothed_and_no_steps_are_made(source: nn.Module) -> None:
    method = auto(source)
    error = errors(method, stream(60, 1.2, 40))
    assert error < 0.35 * errors(plain(source), stream(60, 1.2, 40))
    assert method.gauges["correlated"]
    assert method.gauges["imbalanced"]
    assert method.gauges["persistence"] > 0.5


def test_the_chain_is_not_trusted_where_rows_that_follow_one_another_are_alike(source: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = 64 * 40
    classes = torch.randint(CLASSES, (rows,), generator=generator)
    steps, wandering = torch.randn(rows, 8, generator=generator), torch.zeros(rows, 8)
    for t in range(1, rows):  # what is wrong with a row is wrong with the next one too
        wandering[t] = 0.97 * wandering[t - 1] + 0.6 * steps[t]
    inputs = 0.5 * points(classes, 0.0, generator) + wandering

    def batches() -> Iterator[tuple[Batch, Tensor]]:
        for first in range(0, rows, 64):
            yield batch_of(inputs[first : first + 64], first), classes[first : first + 64]

    trusting = auto(source, alike=2.0, every=0)
    careful = auto(source, every=0)
    plainly = errors(plain(source), batches())
    assert errors(trusting, batches()) > plainly + 0.02
    assert errors(careful, batches()) < plainly + 0.01
    assert careful.gauges["likeness"] > 0.3
    assert trusting.gauges["correlated"] == 1
    assert careful.gauges["correlated"] == 0


def test_modes_are_left_again_when_the_stream_changes_back(source: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    method = auto(source)
    with caplog.at_level(logging.INFO, logger="policies"):
        errors(method, stream(40, 1.2, 40))
        assert method.gauges["correlated"]
        assert method.gauges["imbalanced"]
        errors(method, stream(60, 1.2, 0, seed=2))
    assert not method.gauges["correlated"]
    assert not method.gauges["imbalanced"]
    changes = [record for record in caplog.records if "'auto': " in record.message]
    assert len(changes) == method.gauges["changes"] >= 4


def looked_at(source: nn.Module, classes: Tensor, inputs: Tensor) -> StreamView:
    """A view of windows of classes ``(n, 64)``, with features ``(n, 64, d)``."""
    view = StreamView(context_for(source), AutoParams(), own=False)
    for window, features in zip(classes, inputs, strict=True):
        view.add(torch.full((64, CLASSES), 1 / CLASSES), window, features, features)
        view.look(np.full(CLASSES, 1 / CLASSES))
    return view


def test_classes_that_come_bunched_are_told_from_independent_ones(source: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 64, 8, generator=generator)
    mixed = torch.randint(CLASSES, (60, 64), generator=generator)
    bunched = torch.where(
        torch.rand(60, 64, generator=generator) < 0.4, torch.arange(60)[:, None] // 4 % CLASSES, mixed
    )
    assert looked_at(source, bunched, inputs).bunching > 0.1 / CLASSES
    assert abs(looked_at(source, mixed, inputs).bunching) < 0.05 / CLASSES


def test_a_change_of_inputs_is_noticed_and_not_taken_for_bunching(source: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 64, 8, generator=generator)
    inputs[18:] += 1
    classes = torch.zeros(20, 64, dtype=torch.int64)
    assert not looked_at(source, classes[:18], inputs[:18]).moved
    view = looked_at(source, classes, inputs)
    assert view.moved or view.steady < 2
    assert view.bunching == 0


def test_the_calm_is_over_at_once_when_inputs_have_moved() -> None:
    calm = Calm(1.15, 10)
    assert not calm.over(0.3, False)
    assert calm.over(0.3, True)


def test_batches_of_one_are_smoothed_too(source: nn.Module) -> None:
    method = auto(source)
    error = errors(method, stream(1000, 1.2, 40, rows=1))
    assert error < 0.6 * errors(plain(source), stream(1000, 1.2, 40, rows=1))


def test_a_collapsed_model_goes_back_to_the_source_and_rests(
    source: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Collapse, "_bad", lambda _: True)
    method = auto(source, rest=5)
    for batch, _ in stream(150, 1.2, 0):
        method.adapt(batch)
        method.update()
        if method.gauges["falls"]:
            break
    assert method.gauges["falls"] == 1
    assert method.gauges["resting"] == 5
    assert same_weights(weights_of(method.context.model), weights_of(source))


def changed_to_one_class(model: nn.Module) -> None:
    """Move what the head takes in towards class 1."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        own["1.weight"].mul_(0.3)
        own["1.bias"].add_(own["3.weight"][1].sign())


def test_answers_estimated_to_be_of_no_use_end_adapting(source: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    method = auto(source, every=0)
    errors(method, stream(20, 1.2, 0))
    assert method.gauges["adapting"]
    assert method.gauges["falls"] == 0
    assert method.gauges["disagreement"] > 0.2
    assert method.gauges["estimated_error"] < 0.2
    changed_to_one_class(method.context.model)
    with caplog.at_level(logging.WARNING, logger="policies"):
        fell = next(number for number in range(32) if told(method, number, every=0))
    assert fell < 24
    assert method.gauges["falls"] == 1
    assert method.gauges["resting"] > 0
    assert same_weights(weights_of(method.context.model), weights_of(source))
    assert ["estimated at" in record.message for record in caplog.records] == [True]


def told(method: Adaptation, number: int, every: int) -> bool:
    """One batch, and labels of every so-many-th batch where ``every`` is not 0; whether all has been given up.

    The labels are of a class that neither way has answered: rows are judged by them, but nothing is decided.
    """
    batch, _ = next(iter(stream(1, 1.2, 0, seed=100 + number)))
    batch = replace(batch, ids=tuple(f"{number}-{row}" for row in range(len(batch))))
    method.adapt(batch)
    if every and number % every == 0:
        method.labelled(batch.ids, [CLASSES] * len(batch), [None] * len(batch))
    method.update()
    return bool(method.gauges["falls"])


@pytest.mark.parametrize(("every", "judged"), [(1, True), (64, False)])
def test_labels_judge_instead_of_the_estimate_only_while_they_come_for_rows_answered_both_ways(
    source: nn.Module, every: int, judged: bool
) -> None:
    method = auto(source, every=0)
    errors(method, stream(20, 1.2, 0))
    changed_to_one_class(method.context.model)
    fallen = [told(method, number, every) for number in range(28)]
    assert any(fallen) is not judged
    if judged:
        assert method.gauges["labels_adapting"] > 0
        assert method.gauges["adapting"]
        assert method.gauges["estimated_error"] > 0.6


def test_labels_of_rows_that_nobody_answered_leave_the_estimate_to_judge(source: nn.Module) -> None:
    method = auto(source, every=0)
    errors(method, stream(20, 1.2, 0))
    changed_to_one_class(method.context.model)
    for number in range(28):
        method.labelled(["nobody"], [0], [None])
        if told(method, number, every=0):
            return
    pytest.fail("labels that say nothing have switched the guard off")


def test_a_fall_leaves_what_is_counted_as_it_was(source: nn.Module) -> None:
    method = auto(source, every=0)
    method._view.count_falls(3)  # type: ignore[attr-defined]
    errors(method, stream(20, 1.2, 0))
    before = dict(method.gauges)
    method._fall("it was told to")  # type: ignore[attr-defined]
    assert before["accuracy_falls"] >= 3
    assert method.gauges["accuracy_falls"] == before["accuracy_falls"]
    assert method.gauges["changes"] == before["changes"] + 1
    method.reset()
    assert method.gauges["accuracy_falls"] == 0


def test_a_state_from_before_there_was_an_estimate_goes_on(source: nn.Module) -> None:
    one, two = auto(source), auto(source)
    errors(one, stream(20, 1.2, 0))
    state = carried(one.state_dict())
    del state["parts"]["view"]["estimate"], state["parts"]["view"]["disagreement"]
    two.context.model.load_state_dict(carried(one.context.model.state_dict()))
    two.load_state_dict(state)
    assert math.isnan(two.gauges["estimated_error"])
    for batch, _ in stream(10, 1.2, 0, seed=2):
        assert torch.equal(one.adapt(batch), two.adapt(batch))
        one.update()
        two.update()
    assert two.gauges["estimated_error"] == pytest.approx(one.gauges["estimated_error"], abs=0.1)


@pytest.mark.parametrize("cut", [10, 31])
def test_a_restored_run_goes_on_as_before(source: nn.Module, cut: int) -> None:
    batches = [batch for batch, _ in stream(50, 1.2, 3)]
    one, two = auto(source), auto(source)
    for batch in batches[:cut]:
        one.adapt(batch)
        one.update()
    one.adapt(batches[cut])
    two.context.model.load_state_dict(carried(one.context.model.state_dict()))
    two.load_state_dict(carried(one.state_dict()))
    for method in (one, two):
        method.update()
    for batch in batches[cut + 1 :]:
        assert torch.equal(one.adapt(batch), two.adapt(batch))
        one.update()
        two.update()
    assert one.gauges == two.gauges


def test_a_switch_changes_only_where_the_evidence_stays() -> None:
    switch = Switch("test", 0.4, 3)
    seen = [switch.see(value) for value in (0.5, 0.5, 0.1, 0.5, 0.5, 0.5, 0.3, 0.3, 0.3, 0.1, 0.1, 0.1)]
    assert seen == [False] * 5 + [True] * 6 + [False]
    assert switch.changes == 2


def test_trials_tell_the_way_with_less_information_and_grow_rare() -> None:
    trials = Trials(3, 4, 0.1, 2)
    sure, unsure = 5 * torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 1, 2, 0]]
    for _ in range(2):
        trials.see(unsure, sure)
    assert trials.worse(0.1)
    trials = Trials(3, 4, 0.1, 2)
    waits = []
    for number in range(200):
        if trials.due(4):
            waits.append(number)
            trials.see(sure, unsure)
    assert not trials.worse(0.1)
    assert [later - earlier for earlier, later in pairwise(waits)][:5] == [2, 4, 8, 16, 16]


def probed(probe: Probe, ours: Tensor, other: Tensor, *, caution: bool = False) -> bool | None:
    probe.begin()
    probe.measured()
    probe.see(ours, other)
    assert probe.done
    return probe.decide(caution=caution)


def test_a_probe_decides_only_where_rows_agree_on_what_tells_more() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(32, 3, generator=generator)
    assert probed(Probe(32, 1.645, 0.05), logits, 1.5 * logits) is True
    assert probed(Probe(32, 1.645, 0.05), 1.5 * logits, logits) is False
    noise = 0.1 * torch.randn(16, 3, generator=generator)
    assert (
        probed(Probe(32, 1.645, 0.05), logits[:16].repeat(2, 1), logits[:16].repeat(2, 1) + torch.cat([noise, -noise]))
        is None
    )


def test_rows_of_probes_that_were_not_sure_count_in_the_next_one_unless_it_begins_anew() -> None:
    logits = 2 * torch.eye(4)
    mostly = logits * torch.tensor([1.3, 1.2, 1.0, 0.85])[:, None]
    probe, alone = Probe(4, 1.645, 0.05), Probe(4, 1.645, 0.05)
    assert probed(probe, logits, mostly) is None
    assert probe.promising
    assert probed(probe, logits, mostly) is True
    assert probed(alone, logits, mostly) is None
    alone.begin(anew=True)
    assert probed(alone, logits, mostly) is None


def test_a_probe_tries_every_other_row_across_batches() -> None:
    probe = Probe(4, 1.645, 0.05)
    probe.begin()
    probe.measured()
    rows, tried = torch.arange(12.0)[:, None].repeat(1, 3), []
    for part in rows.split(3):
        chosen = part[probe.choose(len(part))]
        tried += chosen[:, 0].tolist()
        probe.see(chosen, chosen)
    assert tried == [0, 2, 4, 6]


def test_where_groups_come_mixed_a_probe_and_trials_ask_for_a_gain() -> None:
    logits = 2 * torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    slightly = 1.1 * logits
    assert probed(Probe(32, 1.645, 0.05), logits, slightly) is True
    assert probed(Probe(32, 1.645, 0.05), logits, slightly, caution=True) is False
    trials = Trials(3, 32, 0.1, 1)
    trials.see(slightly, logits)
    assert not trials.worse(0.1)
    assert trials.worse(-0.1)


def test_one_class_for_all_rows_is_not_taken_for_surety() -> None:
    trials = Trials(3, 4, 0.1, 1)
    trials.see(torch.eye(3)[[0, 1, 2, 0]] * 3, torch.tensor([[9.0, 0, 0]] * 4))
    assert trials.loss < 0


def test_the_calm_is_over_when_answers_become_unsure_or_after_a_while() -> None:
    calm = Calm(1.15, 10)
    assert [calm.over(0.3, False) for _ in range(10)] == [False] * 9 + [True]
    calm.begin()
    assert not any(calm.over(0.3, False) for _ in range(15))
    assert any(calm.over(0.5, False) for _ in range(4))
