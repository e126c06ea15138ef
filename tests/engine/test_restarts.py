"""What a restart with another policy, and streams of an unusual cut, come to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import StorageError
from engine.launch import run_policy
from engine.policyfile import load

POLICY = """\
version: 1
model: {factory: "./model.py:build", inputs: {shape: [4]}, threads: 1}
streams:
  data: {file: ./events}
  feedback: {file: ./feedback.jsonl}
  predictions: {file: ./predictions.jsonl}
learning: {batch_size: 16}
metrics: {enabled: false}
log: {level: error}
"""

MODEL = """\
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "events").mkdir()
    write_events(tmp_path, "a", 0, 100)
    with (tmp_path / "feedback.jsonl").open("w") as file:
        for row in range(100):
            file.write(json.dumps({"id": f"e{row}", "label": row % 3, "time": row + 5}) + "\n")
    return tmp_path


def write_events(place: Path, name: str, start: int, count: int) -> None:
    with (place / "events" / f"{name}.jsonl").open("w") as file:
        for row in range(start, start + count):
            file.write(json.dumps({"id": f"e{row}", "inputs": [row % 3, 1.5, -0.25, 0.125], "time": row}) + "\n")


def run(place: Path, *overrides: str) -> list[str]:
    run_policy(load(str(place / "policy.yaml"), overrides, {}))
    return [json.loads(line)["id"] for line in (place / "predictions.jsonl").read_text().splitlines()]


def test_files_that_follow_one_another_in_time_are_read_to_the_end(place: Path) -> None:
    write_events(place, "a", 0, 3000)
    write_events(place, "b", 10_000, 3000)
    answered = run(place)
    assert answered == [f"e{row}" for row in (*range(3000), *range(10_000, 13_000))]


def test_another_optimizer_starts_afresh_and_learns(place: Path) -> None:
    run(place, "learning.optimizer=sgd")
    write_events(place, "a", 0, 200)
    with (place / "feedback.jsonl").open("a") as file:
        for row in range(100, 200):
            file.write(json.dumps({"id": f"e{row}", "label": row % 3, "time": row + 5}) + "\n")
    assert len(run(place, "learning.optimizer=adam")) == 200


def test_state_of_another_form_of_inputs_is_refused_with_the_key(place: Path) -> None:
    run(place)
    with pytest.raises(StorageError, match=r"model\.inputs\.dtype: the state was made with float32.*--fresh"):
        run(place, "model.inputs.dtype=float64")


def test_a_time_in_milliseconds_is_a_bad_record_and_spoils_nothing(place: Path) -> None:
    with (place / "events" / "a.jsonl").open("a") as file:
        file.write(json.dumps({"id": "odd", "inputs": [0, 0, 0, 0], "time": 1_700_000_000_000}) + "\n")
    assert "odd" not in run(place)
    assert len(run(place)) == 100
