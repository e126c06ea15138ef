from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from engine import backtest
from engine.backtest import Options, Result, command
from engine.core import Core
from engine.coretypes import Answers
from engine.errors import UsageError
from engine.policyfile import LoadedPolicy, load
from policies.interfaces import Batch
from streams.base import StreamError
from streams.codec import Event, Feedback
from streams.npz import Recorded
from tests.engine.cores import CLASSES, FEATURES, choice, label_of, make_core, rows
from tests.engine.policies import BASE, write

POLICY = """\
version: 1
model:
  factory: "./model.py:build"
  inputs: {shape: [4]}
batching: {max_size: 16}
adaptation: {method: bn, mode: ema}
learning: {optimizer: adam, lr: 0.02, batch_size: 8}
safeguards: [{method: replay, capacity: 64}, {method: finite}]
interpolation: {method: linear}
gate: {method: flips, budget: 0.1}
release: {every: 50}
"""
MODEL = """\
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
"""
PROMISED = {
    "events",
    "accuracy",
    "accuracy_by_domain",
    "source_accuracy",
    "events_per_second",
    "updates",
    "skipped",
    "resets",
    "release",
}
TIMINGS = ("events_per_second", "plain_events_per_second", "relative_speed")


def recorded(count: int = 200, **more: Any) -> Recorded:
    x = rows(0, count)
    y = np.array([label_of(row) for row in x])
    ids = [str(number) for number in range(count)]
    return replace(Recorded(x, np.arange(count, dtype=np.float64), ids, y), **more)


class Spy:
    """Notes how many events had been answered when each label came."""

    def __init__(self, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answered = 0
        self.came: dict[int, int] = {}
        self.batches: list[Batch] = []
        answer, feedback, adapt = core.answer, core.feedback, core.methods.adaptation.adapt

        def spied_answer(events: Sequence[Event]) -> Answers:
            self.answered += len(events)
            return answer(events)

        def spied_feedback(items: Sequence[Feedback]) -> None:
            for item in items:
                assert item.record.offset not in self.came
                self.came[item.record.offset] = self.answered
            feedback(items)

        def spied_adapt(batch: Batch) -> Any:
            self.batches.append(batch)
            return adapt(batch)

        monkeypatch.setattr(core, "answer", spied_answer)
        monkeypatch.setattr(core, "feedback", spied_feedback)
        monkeypatch.setattr(core.methods.adaptation, "adapt", spied_adapt)


@pytest.mark.parametrize("delay", [0, 1, 7, 16, 50])
def test_a_label_comes_so_many_events_after_its_event_and_no_sooner(
    delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core()
    spy = Spy(core, monkeypatch)
    backtest.run(core, recorded(120), Options(batch_size=16, label_delay=delay))
    assert all(answered >= row + 1 + delay for row, answered in spy.came.items())
    assert all(answered < row + 1 + delay + 16 for row, answered in spy.came.items())
    assert sorted(spy.came) == list(range(120 - delay))


def test_a_label_is_timed_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    times: list[tuple[float, int]] = []
    feedback = core.feedback

    def spied(items: Sequence[Feedback]) -> None:
        times.extend((item.time, item.record.offset) for item in items)
        feedback(items)

    monkeypatch.setattr(core, "feedback", spied)
    backtest.run(core, recorded(60), Options(batch_size=10, label_delay=5))
    assert all(time == row + 5 for time, row in times)


def test_without_feedback_no_label_is_ever_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    monkeypatch.setattr(core, "feedback", pytest.fail)
    monkeypatch.setattr(core.learner, "run", pytest.fail)
    data = recorded()
    result = backtest.run(core, data, Options(batch_size=16, feedback_share=0.0))
    assert (core.counts["labels"], core.counts["updates.learning"]) == (0, 0)
    assert backtest.report(core, data, result)["source_accuracy"] > 0


def test_a_share_of_the_labels_is_chosen_by_id_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    came = []
    for seed in (0, 0, 1):
        core = make_core()
        spy = Spy(core, monkeypatch)
        backtest.run(core, recorded(400), Options(batch_size=32, feedback_share=0.25, seed=seed))
        came.append(sorted(spy.came))
    assert came[0] == came[1] != came[2]
    assert all(60 <= len(rows) <= 140 for rows in came)


def test_rows_without_a_label_give_none(monkeypatch: pytest.MonkeyPatch) -> None:
    core, data = make_core(), recorded(50)
    assert data.y is not None
    data.y[::2] = -1
    spy = Spy(core, monkeypatch)
    backtest.run(core, data, Options(batch_size=16))
    assert sorted(spy.came) == list(range(1, 50, 2))


def test_methods_see_groups_and_never_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [f"tenant-{number % 3}" for number in range(200)]
    found: list[Result] = []
    for domain in (np.zeros(200, np.int64), np.arange(200) % 5):
        core = make_core(choice("adaptation", "tent", lr=0.01), choice("safeguard", "replay"))
        spy = Spy(core, monkeypatch)
        data = recorded(group=groups, domain=domain, domains=("a", "b", "c", "d", "e"))
        found.append(backtest.run(core, data, Options(batch_size=16, label_delay=3)))
        assert [group for batch in spy.batches for group in batch.groups] == groups
        assert spy.batches[0].__slots__ == ("ids", "inputs", "times", "groups", "now")
    assert np.array_equal(found[0].predicted, found[1].predicted)


def test_the_report_scores_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    data = recorded(10, domain=np.array([1] * 4 + [0] * 6), domains=("noise", "clean"))
    assert data.y is not None
    right = np.array([1, 1, 1, 0, 1, 1, 1, 0, 0, 0], dtype=bool)
    was = np.array([1, 0, 0, 0, 1, 1, 1, 1, 1, 1], dtype=bool)
    predicted, source = (np.where(good, data.y, (data.y + 1) % CLASSES) for good in (right, was))
    found = backtest.report(core, data, Result(predicted, source, seconds=2.0, plain_seconds=1.0))
    assert found["accuracy"] == pytest.approx(0.6)
    assert found["source_accuracy"] == pytest.approx(0.7)
    assert found["negative_flip_rate"] == pytest.approx(0.3)
    assert found["positive_flip_rate"] == pytest.approx(0.2)
    assert found["accuracy_by_domain"] == {"clean": pytest.approx(0.75), "noise": pytest.approx(0.5)}
    assert list(found["accuracy_by_domain"]) == ["clean", "noise"], "in order of appearance"
    assert (found["events_per_second"], found["relative_speed"]) == (5.0, 0.5)


def test_without_labels_there_is_no_accuracy() -> None:
    core, data = make_core(), recorded(20, y=None)
    found = backtest.report(core, data, backtest.run(core, data, Options(batch_size=16)))
    assert (found["accuracy"], found["source_accuracy"], found["accuracy_by_domain"]) == (None, None, {})
    assert found["events"] == 20


# -- from files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedPolicy:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "model.py").write_text(MODEL)
    return load(tmp_path / "policy.yaml", environ={})


def save(path: Path, data: Recorded) -> Path:
    assert data.y is not None
    assert data.domain is not None
    if path.suffix == ".npz":
        np.savez(path, x=data.x, y=data.y, t=data.t, domain=data.domain, domains=np.array(data.domains))
        return path
    lines = [
        {
            "id": data.ids[row],
            "inputs": data.x[row].tolist(),
            "time": float(data.t[row]),
            "label": int(data.y[row]),
            "domain": data.domains[data.domain[row]],
        }
        for row in range(len(data))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def figures(loaded: LoadedPolicy, path: Path, **more: Any) -> dict[str, Any]:
    options = {"label_delay": 10, "feedback_share": 1.0, "seed": 0} | more
    found = backtest.command(loaded, path, **options)
    assert found.keys() >= PROMISED
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return {name: value for name, value in found.items() if name not in TIMINGS}


def domains(count: int) -> Recorded:
    return recorded(count, domain=np.arange(count) * 3 // count, domains=("clean", "noise", "blur"))


def test_equal_seeds_give_equal_figures_from_either_form_of_file(tmp_path: Path, loaded: LoadedPolicy) -> None:
    data = domains(300)
    first = figures(loaded, save(tmp_path / "a.npz", data))
    assert figures(loaded, tmp_path / "a.npz") == first
    assert figures(loaded, save(tmp_path / "a.jsonl", data)) == first | {"data": "a.jsonl"}
    assert first["events"] == 300
    assert first["updates"] > 20
    assert first["accuracy"] > first["source_accuracy"]
    assert list(first["accuracy_by_domain"]) == ["clean", "noise", "blur"]


def test_other_seeds_choose_other_labels(tmp_path: Path, loaded: LoadedPolicy) -> None:
    path = save(tmp_path / "a.npz", domains(300))
    assert figures(loaded, path, feedback_share=0.3) != figures(loaded, path, feedback_share=0.3, seed=1)


def test_without_feedback_the_figures_say_so(tmp_path: Path, loaded: LoadedPolicy) -> None:
    found = figures(loaded, save(tmp_path / "a.npz", domains(100)), feedback_share=0.0)
    assert (found["labels"], found["updates"], found["release"]["number"]) == (0, 0, 0)


@pytest.mark.parametrize("shape", [(10, FEATURES + 1), (10,)])
def test_a_stream_of_another_shape_is_refused(tmp_path: Path, loaded: LoadedPolicy, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(shape, np.float32))
    with pytest.raises(StreamError, match=r"a\.npz"):
        figures(loaded, tmp_path / "a.npz")


def test_a_stream_of_no_rows_is_refused(tmp_path: Path, loaded: LoadedPolicy) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((0, FEATURES), np.float32))
    (tmp_path / "a.jsonl").write_text("")
    for name in ("a.npz", "a.jsonl"):
        with pytest.raises(StreamError, match=name):
            figures(loaded, tmp_path / name)


def test_a_stream_that_is_missing_is_refused(tmp_path: Path, loaded: LoadedPolicy) -> None:
    with pytest.raises(StreamError, match=r"nothing\.npz"):
        figures(loaded, tmp_path / "nothing.npz")


def test_labels_that_the_model_has_no_class_for_are_counted_and_not_learned_from(
    tmp_path: Path, loaded: LoadedPolicy
) -> None:
    data = domains(100)
    assert data.y is not None
    y = data.y + CLASSES
    y[:1] = 0
    found = figures(loaded, save(tmp_path / "a.npz", replace(data, y=y)))
    assert (found["labelled"], found["unusable_labels"], found["labels"]) == (1, 99, 1)


def small(directory: Path, labels: object, **more: object) -> Path:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    np.savez(directory / "small.npz", x=x, y=np.asarray(labels), t=np.arange(64.0), **more)  # type: ignore[arg-type]
    (directory / "model.py").write_text("from torch import nn\ndef build(): return nn.Linear(4, 3)\n")
    return directory / "small.npz"


def of_command(directory: Path, data: Path) -> dict[str, Any]:
    loaded = load(write(directory, BASE + "learning: {enabled: false}\n"), environ={})
    return command(loaded, data, label_delay=0, feedback_share=1.0, seed=5)


def test_labels_none_of_which_is_a_class_of_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="64 of 64 labels are no class of the model, which has 3"):
        of_command(tmp_path, small(tmp_path, [7] * 64))


def test_some_labels_that_are_no_class_and_rows_without_one_count_for_nothing(tmp_path: Path) -> None:
    found = of_command(tmp_path, small(tmp_path, [0, 1, 2, 9, -1, 0, 1, 2] * 8))
    assert (found["labelled"], found["unusable_labels"]) == (48, 8)
    assert found["accuracy"] == found["source_accuracy"]


def test_a_report_tells_what_it_is_of_and_accuracy_by_group(tmp_path: Path) -> None:
    data = small(tmp_path, [0, 1] * 32, group=np.array(["a", "b"] * 32))
    found = of_command(tmp_path, data)
    assert (found["data"], found["seed"], found["feedback_seed"]) == ("small.npz", 0, 5)
    assert len(found["policy_digest"]) == 64
    assert set(found["accuracy_by_group"]) == {"a", "b"}
    assert sum(found["accuracy_by_group"].values()) / 2 == pytest.approx(found["accuracy"])


def test_a_stream_without_labels_is_told_of_with_where_they_would_go(tmp_path: Path, loaded: LoadedPolicy) -> None:
    data = domains(100)
    path = tmp_path / "a.npz"
    for given in ({}, {"y": np.full(100, -1)}):
        np.savez(path, x=data.x, **given)  # type: ignore[arg-type]
        with capture_logs() as logs:
            found = command(loaded, path, label_delay=0, feedback_share=1.0, seed=0)
        assert (found["accuracy"], found["labels"]) == (None, 0)
        assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["no_labels"]
        assert 'add an array "y" to an .npz, or "label" to the lines of a .jsonl' in logs[-1]["text"]
