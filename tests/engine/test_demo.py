from __future__ import annotations

import io
import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from engine.demo import main as demo
from engine.demo import stream as streams
from engine.demo.main import Outcome
from engine.demo.model import DigitNet, train
from engine.demo.report import write_report
from engine.errors import UsageError

pytestmark = pytest.mark.skipif(find_spec("sklearn") is None, reason="scikit-learn is not installed")

CLEAN = [number for number, name in enumerate(streams.PHASES) if name == "clean"]


@pytest.fixture(scope="module")
def digits() -> streams.Digits:
    return streams.load_digits()


@pytest.fixture(scope="module")
def stream(digits: streams.Digits) -> streams.Stream:
    return streams.make_stream(digits, 2000)


def test_the_model_never_sees_what_is_streamed(digits: streams.Digits) -> None:
    assert len(digits.train_x) + len(digits.test_x) == 1797
    assert digits.train_x.min() >= 0
    assert digits.train_x.max() == 1
    train = {row.tobytes() for row in digits.train_x}
    assert np.mean([row.tobytes() in train for row in digits.test_x]) < 0.01


def test_a_stream_follows_from_its_seed(digits: streams.Digits, stream: streams.Stream) -> None:
    again, other = streams.make_stream(digits, 2000), streams.make_stream(digits, 2000, seed=1)
    assert np.array_equal(again.x, stream.x)
    assert np.array_equal(again.label_at, stream.label_at)
    assert not np.array_equal(other.x, stream.x)


def test_phases_follow_one_another_and_corruption_changes_the_pictures(stream: streams.Stream) -> None:
    assert np.array_equal(np.unique(stream.domain), np.arange(len(streams.PHASES)))
    assert np.all(np.diff(stream.domain) >= 0)
    assert set(streams.PHASES) == set(streams.CORRUPTIONS)
    assert len(streams.PHASES) > len(streams.CORRUPTIONS), "some drifts come back"
    bright = [float(stream.x[stream.domain == number].mean()) for number in range(len(streams.PHASES))]
    contrast = streams.PHASES.index("contrast")
    assert max(bright) == bright[contrast] or bright[contrast] > np.mean([bright[number] for number in CLEAN])


def test_classes_come_in_bursts(stream: streams.Stream) -> None:
    repeats = float((np.diff(stream.y) == 0).mean())
    assert repeats > 0.5, "by chance it would be a tenth"


def test_a_fifth_of_the_labels_comes_and_late(digits: streams.Digits) -> None:
    stream = streams.make_stream(digits, 2000, feedback_share=0.2, delay=(1.0, 6.0))
    known = np.isfinite(stream.label_at)
    assert 0.15 < known.mean() < 0.25
    delay = (stream.label_at - stream.t)[known]
    assert delay.min() >= 1
    assert delay.max() <= 6


def test_an_order_in_bursts_is_an_order() -> None:
    y = np.random.default_rng(0).integers(0, 10, 500)
    order = streams.correlated_order(y, 0.3, np.random.default_rng(1))
    assert np.array_equal(np.sort(order), np.arange(500))


def outcome(stream: streams.Stream) -> Outcome:
    """Adapted: always right. Frozen: right on clean data alone."""
    clean = np.isin(stream.domain, CLEAN)
    count = len(stream.y)
    frozen = np.where(clean, stream.y, (stream.y + 1) % 10)
    steps = np.arange(count) // 50
    return Outcome(stream, frozen, stream.y.copy(), steps, steps // 20, np.full(count, 0.9), 2.0, 0, count)


def test_the_summary_compares_both_models_by_phase(stream: streams.Stream) -> None:
    found = outcome(stream).summary()
    assert found["drifted"] == {"adapted": 1.0, "frozen": 0.0}
    assert found["clean"] == {"adapted": 1.0, "frozen": 1.0}
    assert (found["events"], found["events_per_second"]) == (2000, 1000.0)
    assert [row["phase"] for row in found["phases"]] == list(streams.PHASES)
    assert sum(row["events"] for row in found["phases"]) == 2000
    assert found["positive_flip_rate"] > 0.5
    assert found["negative_flip_rate"] == 0.0
    assert json.loads(json.dumps(found)) == found


def test_the_report_needs_nothing_else(tmp_path: Path, stream: streams.Stream) -> None:
    write_report(tmp_path / "report.html", outcome(stream))
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert "<script" not in page
    assert "100.0%" in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_demonstration_goes_from_end_to_end_and_does_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", partial(train, epochs=1))
    directory = tmp_path / "demo"
    for expected in (1000, 0):
        demo.demonstrate(directory, events=1000, seed=0, as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert (found["events"], found["answers_beyond_one"]) == (1000, 0)
        assert found["answered_now"] == expected
        assert (found["events_per_second"] is None) == (expected == 0)
        assert len((directory / "predictions.jsonl").read_text().splitlines()) == 1000
    assert found["updates"] > 0
    assert Path(found["report"]).read_text().startswith("<!doctype html>")
    with pytest.raises(UsageError, match="holds a demonstration with other options; choose another --dir"):
        demo.demonstrate(directory, events=1200, seed=0, as_json=True)
    answers = (directory / "predictions.jsonl").read_text().splitlines(keepends=True)
    (directory / "predictions.jsonl").write_text("".join(answers[:-7]))
    with pytest.raises(UsageError, match="7 of 1000 events have no answer yet"):
        demo._collect(directory, streams.make_stream(streams.load_digits(), 1000), 1.0, 1000)


def test_training_takes_one_thread_and_says_what_it_does_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen, told = torch.get_num_threads(), [], io.StringIO()

    def train_none(x: Tensor, y: Tensor) -> DigitNet:
        seen.append((torch.get_num_threads(), told.getvalue()))
        return DigitNet()

    monkeypatch.setattr(demo, "train", train_none)
    torch.set_num_threads(2)
    try:
        demo._prepare(tmp_path / "demo", 1000, 0, Console(file=told, width=20))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [(1, "training a small CNN on clean digits\n")]
    assert told.getvalue().endswith("writing 1000 events\n")


async def test_progress_off_a_terminal_is_a_line_each_however_narrow(tmp_path: Path) -> None:
    told = io.StringIO()
    with demo._bar(Console(file=told, width=20), 1000) as progress:
        daemon: Any = SimpleNamespace(
            core=SimpleNamespace(
                step=3,
                release=1,
                counts=Counter(events=0, labels=2),
                audit=SimpleNamespace(accuracies=lambda: {"source": 0.5, "live": 0.75}),
            )
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(demo._watcher(progress, 1000, []), daemon)
            await anyio.wait_all_tasks_blocked()
            daemon.core.counts["events"] = 500
            while not told.getvalue():
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert told.getvalue().splitlines()[0] == (
        "500 of 1000 events  updates 3  release 1  labels 2  audit: frozen 50%, live 75%"
    )


def test_a_file_in_the_place_of_the_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--dir .*file: File exists; name a directory that can be made"):
        demo.demonstrate(tmp_path / "file", events=1000, seed=0, as_json=True)


def test_without_its_extra_the_demonstration_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(seed: int = 0) -> streams.Digits:
        raise ImportError("No module named 'sklearn'")

    monkeypatch.setattr(streams, "load_digits", missing)
    with pytest.raises(UsageError, match=r"pip install 'adaptd\[demo\]'"):
        demo._prepare(tmp_path, 1000, 0, Console(quiet=True))
    assert not [*tmp_path.iterdir()]


def test_phases_without_change_have_no_flips(stream: streams.Stream) -> None:
    same = outcome(stream)
    found = replace(same, frozen=same.adapted).summary()
    assert (found["positive_flip_rate"], found["negative_flip_rate"]) == (0.0, 0.0)
