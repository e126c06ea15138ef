"""docs/faults.md has every row of the matrix, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.metrics import Metrics

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "faults.md").read_text()
ROWS = re.split(r"^## (?=\d+\. )", TEXT, flags=re.MULTILINE)[1:]
NAMES = re.findall(r"^- Test: `([^`]+)`$", TEXT, re.MULTILINE)


def test_every_line_that_names_a_test_is_looked_at() -> None:
    assert TEXT.count("- Test:") == len(NAMES)


def test_every_row_is_there_once_and_in_order() -> None:
    assert [int(row.partition(".")[0]) for row in ROWS] == list(range(1, 37))


@pytest.mark.parametrize("row", ROWS, ids=[row.partition("\n")[0] for row in ROWS])
def test_a_row_names_a_test_or_says_why_there_is_none(row: str) -> None:
    assert "- Test: " in row or "- Not yet: " in row


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_a_named_test_exists(name: str) -> None:
    path, _, test = name.partition("::")
    assert re.search(rf"^(async )?def {test}\(", (ROOT / "tests" / path).read_text(), re.MULTILINE)


def test_metrics_and_alerts_that_are_named_exist() -> None:
    alerts = set(re.findall(r"alert: (\w+)", (ROOT / "ops" / "prometheus" / "alerts.yml").read_text()))
    families = set(re.findall(rb"^# TYPE (\w+)", Metrics().exposition(), re.MULTILINE))
    for line in re.findall(r"^- Watch: (.*)$", TEXT, re.MULTILINE):
        assert set(re.findall(r"Adaptd\w+", line)) <= alerts
        for name in re.findall(r"`([a-z_]+)(?:\{[^`]*\})?`", line):
            if name in ("waiting_for", "partitions"):
                continue
            assert {f"adaptd_{name}".encode(), name.encode()} & families, name
