"""README.md says of adaptation what the committed measurement gives."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.results import DIRECTORY
from benchmarks.tta_table import BEGIN, END, README, markdown, replaced, section, summary


def cell(error: float, source: float, images: int = 200) -> dict[str, Any]:
    return {"error_percent": error, "source_error_percent": source, "images": images}


def result() -> dict[str, Any]:
    results: dict[str, Any] = {
        "specs": {"correlated": {}, "iid": {}},
        "cells": {
            "correlated": {"none": cell(45, 45), "sar": cell(66, 45), "bn": {"refused": "no BatchNorm"}},
            "iid": {"none": cell(40, 40), "sar": cell(27, 41, images=100), "bn": {"skipped": "no time"}},
        },
        "speed": {
            "correlated": {"sar": {"share_of_plain_speed": 0.2, "forwards_per_event": 2.0, "peak_mib_over_plain": 7.0}}
        },
        "skipped": ["cells iid bn"],
    }
    results["summary"] = summary(results, ["none", "sar", "bn"])
    machine = {"processor": "one", "load_before": [0.1], "load_after": [1.0]}
    return {"command": "measure", "date": "today", "machine": machine, "results": results}


def test_readme_holds_the_table_of_the_committed_result() -> None:
    readme = README.read_text()
    committed = DIRECTORY / "tta.json"
    found = json.loads(committed.read_text())
    assert readme == replaced(readme, found), "run python -m benchmarks.tta_table"
    assert committed.with_suffix(".md").read_text() == markdown(found)


def test_the_worst_regret_is_that_of_the_worst_stream() -> None:
    short = result()["results"]["summary"]
    assert (short["sar"]["worst_regret_points"], short["sar"]["worst_regret_on"]) == (21, "correlated")
    assert short["none"]["worst_regret_points"] == 0
    assert short["sar"]["share_of_floor"] == pytest.approx(0.8)
    assert "worst_regret_points" not in short["bn"]


def test_the_table_tells_fewer_images_refusals_and_what_there_was_no_time_for() -> None:
    text = markdown(result())
    assert "| `sar` | 66.0 | 27.0 (41.0) | +21.0 (correlated) | 0.20 | 0.25 (80 %) | 7 |" in text
    assert "| `bn` | - | no time | - | - | 1.00 | - |" in text
    assert "No time was left for: cells iid bn." in text


def test_the_table_of_the_readme_has_few_rows_and_columns_and_says_how_auto_does() -> None:
    found = result()
    found["results"]["cells"]["correlated"]["auto"] = cell(46, 45)
    found["results"]["cells"]["correlated"]["foa"] = cell(44, 45)
    found["results"]["summary"] = summary(found["results"], ["none", "auto", "sar", "foa"])
    text = section(found)
    assert "| method | correlated | iid | worst regret | speed |" in text
    assert "| `sar` | 66.0 | 27.0 (41.0) | +21.0 (correlated) | 0.20 |" in text
    assert "foa" not in text
    assert "`auto` is on none of 1 streams more than 1.0 points worse than the source model." in text
    assert "All 4 methods on all 2 streams" in text


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="put both where the table is to be"):
        replaced(f"text {BEGIN} but no end", result())
    assert replaced(f"a {BEGIN} old {END} b", result()).count("old") == 0
