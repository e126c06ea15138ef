"""What many sweeps found becomes one result."""

from collections import Counter

from streams.seams import FAILPOINTS
from tests.crash.results import summary
from tests.crash.sweep import Report, phase_of


def test_every_failpoint_belongs_to_a_phase() -> None:
    assert {phase_of(f"{name}:1") for name in FAILPOINTS} | {phase_of("random")} == {
        *("reading", "journal", "answering", "learning", "sending", "checkpoint", "restoring", "reload", "leaving"),
        "any moment",
    }


def test_totals_are_by_phase_client_and_delivery() -> None:
    files = Report("files", "files", "at_least_once", 1, Counter({"cut:1": 2, "random": 3, "replay:2": 1}), compound=1)
    exact = Report("exact", "confluent", "exactly_once", 1, Counter({"disk.fsync:2": 4}))
    files.findings.duplicates = 7
    made = summary({report.name: report.as_json() for report in (files, exact)})
    assert (made["kills"], made["kills_while_restoring_after_a_kill"]) == (10, 1)
    assert made["by_phase"] == {"any moment": 3, "checkpoint": 4, "journal": 2, "restoring": 1}
    assert made["by_client"] == {"confluent": 4, "files": 6}
    assert made["by_delivery"] == {"at_least_once": 6, "exactly_once": 4}
    assert (made["duplicates"], made["duplicates_in_exactly_once"]) == (7, 0)
    assert list(made["sweeps"]) == ["exact", "files"]
