"""What README.md and the pages of docs show is what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.policyfile import load
from engine.scaffold import EVENTS, init
from streams.codec import InputSpec
from streams.npz import recorded
from tests.broker.daemons import POLICY

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def policy_shown() -> str:
    (found,) = re.findall(r"```yaml\n(version: .*?)```", README.read_text(), re.DOTALL)
    return str(found)


def test_the_policy_shown_is_the_one_that_the_tests_against_a_broker_run_but_for_its_method() -> None:
    shown = policy_shown()
    assert "adaptation: auto\n" in shown
    assert shown.replace("adaptation: auto\n", "adaptation: {method: rotta}\n") == POLICY


def test_the_policy_shown_is_valid(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(policy_shown())
    assert load(tmp_path / "policy.yaml", environ={}).policy.adaptation.method == "auto"


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        file = page.parent / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings}, target


def test_the_guide_tells_how_events_and_feedback_become_a_recorded_stream(tmp_path: Path) -> None:
    init(tmp_path)
    (code,) = re.findall(r"```python\n(import json\n.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    found = recorded(tmp_path / "recorded.jsonl", InputSpec((4,), np.dtype("float32")))
    assert found.y is not None
    assert len(found) == EVENTS
    assert (found.y >= 0).sum() == EVENTS // 2
