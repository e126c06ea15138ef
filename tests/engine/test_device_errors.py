"""A device that is lost or out of memory: the process ends, and the next one goes on as if nothing had happened.

What CUDA says is said by the model here, on the CPU; what the CPU's allocator says is said by itself.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from engine import cli
from engine.launch import run_policy
from engine.policyfile import load
from engine.scaffold import init

MODEL = """\
import torch
from torch import nn


class Lost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        FAIL


class Fragile(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        y = self.layers(x)
        if torch.is_grad_enabled() or not BACKWARD:
            Fragile.calls += 1
        if Fragile.calls < FIRST:
            return y
        if BACKWARD:
            return Lost.apply(y)
        FAIL


def build():
    return Fragile()
"""

EVENTS = 256

FAILURES = {
    "memory of a GPU": ('raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")', 75),
    "GPU": ('raise torch.AcceleratorError("CUDA error: device-side assert triggered")', 75),
    "memory of the CPU": ("torch.empty(1 << 60)", 70),
}
POLICY = {
    "adaptation: auto": "adaptation: tent",
    "learning: {": "learning: {mode: inline, ",
    "device: auto": "device: cpu",
    "max_size: 64": "max_size: 16",
    "port: 9464": "enabled: false",
}


def project(directory: Path) -> Path:
    init(directory)
    text = (directory / "policy.yaml").read_text()
    for old, new in POLICY.items():
        assert old in text
        text = text.replace(old, new)
    (directory / "policy.yaml").write_text(text)
    events = (directory / "events.jsonl").read_text().splitlines(keepends=True)
    (directory / "events.jsonl").write_text("".join(events[:EVENTS]))
    return directory


def write_model(directory: Path, failure: str, *, backward: bool, first: float) -> None:
    """Have the model fail from a call on: where it answers, or in the backward pass of a step."""
    words = {"FAIL": failure, "BACKWARD": str(backward), "FIRST": f"float('{first}')"}
    text = MODEL
    for word, given in words.items():
        text = text.replace(word, given)
    (directory / "model.py").write_text(text)


def live(directory: Path) -> None:
    run_policy(load(directory / "policy.yaml", environ={}))


def answers(directory: Path) -> dict[str, str]:
    """Answers by id; one that comes again is equal to the first."""
    found: dict[str, str] = {}
    for line in (directory / "predictions.jsonl").read_text().splitlines():
        assert found.setdefault(json.loads(line)["id"], line) == line
    return found


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "state").glob("ckpt-*"))


def weights(directory: Path) -> bytes:
    return (directory / "state" / checkpoints(directory)[-1] / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = project(tmp_path_factory.mktemp("undisturbed"))
    write_model(directory, "return", backward=False, first=math.inf)
    live(directory)
    assert len(answers(directory)) == EVENTS
    return directory


@pytest.mark.parametrize(("failure", "code"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("backward", [False, True], ids=["in an answer", "in a step"])
def test_where_a_device_fails_the_process_ends_and_the_next_one_ends_as_if_it_had_not(
    tmp_path: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    failure: str,
    code: int,
    backward: bool,
) -> None:
    directory = project(tmp_path)
    write_model(directory, failure, backward=backward, first=20)
    with pytest.raises(ExceptionGroup) as caught:
        live(directory)
    assert cli._explain(caught.value) == code
    assert "memory" in (told := capsys.readouterr().err) or "CUDA error" in told
    assert checkpoints(directory) == ["ckpt-000000000000"], "nothing of a lost device is saved"
    assert len(answers(directory)) < EVENTS
    write_model(directory, failure, backward=backward, first=math.inf)
    live(directory)
    assert answers(directory) == answers(undisturbed)
    assert weights(directory) == weights(undisturbed)
