"""Every adaptation has a preset of its name, which is a whole policy and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.demo.model import DigitNet
from engine.policyfile import load, presets
from policies.interfaces import Adaptation
from policies.registry import METHODS, find
from tests.policies.models import batch_of, context_for

MODEL = ["model.factory=./model.py:build", "model.inputs.shape=[1, 8, 8]"]


class TwoHeads(DigitNet):
    """The model of the demonstration with a second head."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(self.fc.in_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        logits: Tensor = self.fc(features) + self.other(features)
        return logits


def test_every_method_has_a_preset() -> None:
    assert presets() == sorted([*METHODS["adaptation"], "guarded"])


@pytest.mark.parametrize("name", presets())
def test_a_preset_adapts_the_model_of_the_demonstration(name: str) -> None:
    policy = load(name, MODEL, {}).policy
    ((method, params),) = ((method, params) for kind, method, params in policy.methods() if kind == "adaptation")
    assert method == ("rotta" if name == "guarded" else name)
    torch.manual_seed(0)
    model = (TwoHeads if name == "drm" else DigitNet)().eval()
    adaptation: Adaptation = find("adaptation", method)(params, context_for(model, classes=10))
    rows = policy.batching.max_size
    for number in range(3):
        logits = adaptation.adapt(batch_of(torch.rand(rows, 1, 8, 8), number * rows))
        adaptation.update()
        assert logits.shape == (rows, 10)
        assert bool(logits.isfinite().all())
    live = adaptation.context.model
    assert all(bool(tensor.isfinite().all()) for tensor in live.state_dict().values())


def test_the_page_of_methods_names_each_once() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "methods.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(METHODS["adaptation"])
