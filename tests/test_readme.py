"""What README.md shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from engine.policyfile import load
from tests.broker.daemons import POLICY

README = Path(__file__).parents[1] / "README.md"


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
