"""A model whose logits are far too large: gradients are huge, and what labels teach must not break it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.backtest import Options, report, run
from engine.build import build_core
from engine.policyfile import load
from streams.codec import InputSpec
from streams.npz import recorded
from tests.engine.policies import write

CLASSES, FEATURES, ROWS = 4, 8, 3000
BASE = 'version: 1\nmodel: {factory: "./model.py:build", inputs: {shape: [8]}}\n'


class Brittle(nn.Module):
    """An MLP that has learned its task, behind a factor that makes every mistake a catastrophe."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(64) if norm else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), middle, nn.ReLU())
        self.head = nn.Linear(64, CLASSES)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers(x))
        return self.scale * logits


def centres() -> np.ndarray[Any, np.dtype[np.float64]]:
    return 1.2 * np.random.default_rng(3).normal(size=(CLASSES, FEATURES))


def rows(seed: int, count: int, drift: float) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    return (centres()[labels] + rng.normal(size=(count, FEATURES)) + drift).astype(np.float32), labels


def brittle(*, norm: bool, scale: float) -> nn.Module:
    torch.manual_seed(0)
    model = Brittle(norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x, y = (torch.from_numpy(array) for array in rows(1, 4096, 0.0))
    for start in range(0, len(x), 64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[start : start + 64]), y[start : start + 64]).backward()
        optimizer.step()
    model.scale = scale
    return model.eval()


def backtest(directory: Path, model: nn.Module, text: str) -> dict[str, Any]:
    x, y = rows(2, ROWS, 0.2)
    np.savez(directory / "data.npz", x=x, y=y, t=np.arange(ROWS, dtype=np.float64))
    policy = load(write(directory, BASE + text), environ={}).policy
    core = build_core(policy, model, background=False, directory=None)
    data = recorded(directory / "data.npz", InputSpec((FEATURES,), np.dtype("<f4")))
    return report(core, data, run(core, data, Options(batch_size=64, label_delay=100)))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_with_the_defaults_labels_do_not_break_a_brittle_model(tmp_path: Path, scale: float) -> None:
    found = backtest(tmp_path, brittle(norm=False, scale=scale), "")
    assert found["updates_by_kind"]["learning"] > 30
    assert found["accuracy"] > found["source_accuracy"] - 0.01


def test_without_clipping_they_do(tmp_path: Path) -> None:
    found = backtest(tmp_path, brittle(norm=False, scale=1000.0), "learning: {clip_norm: null}\n")
    assert found["accuracy"] < found["source_accuracy"] - 0.1


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_guarded_preset_ends_no_worse_than_the_source_model(tmp_path: Path, scale: float) -> None:
    found = backtest(tmp_path, brittle(norm=True, scale=scale), "preset: guarded\naudit: {share: 0.2}\n")
    audited = found["release"]["accuracy"]
    assert found["updates_by_kind"]["learning"] > 30
    assert audited["live"] >= audited["source"] - 0.01
    assert audited["release"] >= audited["source"] - 0.01


EXPLOSION = "learning: {lr: 10}\n"
"""Ten thousand times the default."""
GUARDED = "preset: guarded\naudit: {share: 0.2}\n"


def test_a_learning_rate_that_breaks_a_bare_model_does_not_break_a_guarded_one(tmp_path: Path) -> None:
    bare = backtest(tmp_path, brittle(norm=True, scale=1.0), EXPLOSION)
    assert bare["accuracy"] < bare["source_accuracy"] - 0.3
    guarded = backtest(tmp_path, brittle(norm=True, scale=1.0), GUARDED + EXPLOSION)
    assert guarded["updates_by_kind"]["learning"] > 30
    assert guarded["accuracy"] > guarded["source_accuracy"] - 0.01


UNGUARDED = f"{GUARDED}{EXPLOSION}safeguards: []\n"


def test_weights_that_explode_without_safeguards_are_rolled_back_at_every_look_and_never_released(
    tmp_path: Path,
) -> None:
    found = backtest(tmp_path, brittle(norm=True, scale=1.0), f"{UNGUARDED}release: {{freeze_after: 0}}\n")
    assert found["rollbacks"] >= 3
    assert found["decisions"] == {"roll_back.live_worse": found["rollbacks"]}
    assert found["release"]["number"] == 0
    audited = found["release"]["accuracy"]
    assert audited["release"] == audited["source"] > audited["live"]


def test_rolled_back_too_often_it_answers_as_the_release_from_then_on(tmp_path: Path) -> None:
    text = f"preset: guarded\n{EXPLOSION}safeguards: []\naudit: {{share: 0.2, window: 100}}\n"
    loose, frozen = (
        backtest(tmp_path, brittle(norm=True, scale=1.0), f"{text}release: {{every: 200, freeze_after: {limit}}}\n")
        for limit in (0, 2)
    )
    assert loose["rollbacks"] > 4
    assert (frozen["rollbacks"], frozen["frozen"], loose["frozen"]) == (2, True, False)
    assert frozen["frozen_labels"] > 1000
    assert frozen["updates_by_kind"]["learning"] < loose["updates_by_kind"]["learning"] / 2
    assert frozen["accuracy"] > loose["accuracy"] + 0.2
    of_late = frozen["release"]["accuracy"]
    assert of_late["live"] == of_late["source"] > loose["release"]["accuracy"]["live"]
