import json
from pathlib import Path

import pytest
import torch

from engine import reference
from engine.errors import StorageError, UsageError
from engine.factory import build_model
from engine.policyfile import load
from engine.scaffold import EVENTS, init


def test_what_init_writes_is_a_policy_that_loads_with_a_model_that_builds(tmp_path: Path) -> None:
    written = init(tmp_path / "new")
    loaded = load(tmp_path / "new" / "policy.yaml", environ={})
    assert {file.name for file in written} == {"policy.yaml", "model.py", "events.jsonl", "feedback.jsonl"}
    model = build_model(loaded.policy.model, loaded.base).eval()
    lines = (tmp_path / "new" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    inputs = torch.tensor([json.loads(line)["inputs"] for line in lines])
    assert inputs.shape == (EVENTS, *loaded.policy.model.inputs.shape)
    assert model(inputs).shape == (EVENTS, 3)


def test_labels_of_the_sample_stream_come_later_and_for_some(tmp_path: Path) -> None:
    init(tmp_path)
    events = {
        (one := json.loads(line))["id"]: one
        for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    }
    feedback = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < len(feedback) < len(events)
    assert all(one["time"] > events[one["id"]]["time"] and one["label"] in (0, 1, 2) for one in feedback)


@pytest.mark.parametrize("name", ["policy.yaml", "model.py", "events.jsonl", "feedback.jsonl"])
def test_init_overwrites_nothing_and_then_writes_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=rf"{name} exists and is left as it is"):
        init(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"


def test_init_tells_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match=r"file/new cannot be written: Not a directory"):
        init(tmp_path / "file" / "new")


def test_the_policy_reference_is_up_to_date() -> None:
    assert reference.main(["--check"]) == 0, "run: python -m engine.reference"


def test_an_outdated_policy_reference_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "PLACE", tmp_path / "policy.md")
    monkeypatch.setattr(reference, "reference", lambda: "new")  # making the real one takes half a second
    (tmp_path / "policy.md").write_text("old", encoding="utf-8")
    assert reference.main(["--check"]) == 1
    assert "is not up to date" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0


def test_the_policy_reference_describes_every_parameter_of_every_method() -> None:
    from policies import registry

    for kind, methods in registry.METHODS.items():
        for name in methods:
            params = registry.find(kind, name).Params
            assert set(params.model_fields) <= set(reference.descriptions(params)), f"{kind} {name}"
