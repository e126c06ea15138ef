"""What the runner tells of: releases and dead letters."""

from pathlib import Path

import pytest
import structlog

from streams.codec import encode_event, encode_feedback
from streams.memory import MemorySink, MemorySource
from tests.engine.cores import choice, events, feedback, make_core, rows
from tests.engine.parts import daemon_on, fill, memory, run


async def test_every_decision_on_a_release_is_logged_with_its_figures(tmp_path: Path) -> None:
    core = make_core(choice("interpolation", "linear"), choice("gate", "flips"), release_every=100)
    with structlog.testing.capture_logs() as logs, daemon_on(tmp_path, memory(300), core=core, by_time=True) as daemon:
        await run(daemon)
    told = [line for line in logs if line["event"] == "release_decided"]
    assert len(told) == sum(count for name, count in core.counts.items() if name.startswith("decisions."))
    assert told
    assert {"action", "reason", "release", "accuracy_live"} <= told[0].keys()


@pytest.mark.parametrize("by_time", [True, False], ids=["learning between batches", "learning beside serving"])
async def test_every_job_is_seen_with_its_time_and_every_label_with_its_delay(tmp_path: Path, by_time: bool) -> None:
    core = make_core(background=not by_time, batch_size=4)
    with daemon_on(tmp_path, memory(300), core=core, by_time=by_time) as daemon:
        await run(daemon)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in daemon.metrics.registry.collect()
        for sample in family.samples
    }
    assert core.counts["updates.learning"] > 50
    assert found["adaptd_label_delay_seconds_count",] == core.counts["labels"] == 300
    assert found["adaptd_stage_duration_seconds_count", "learn"] >= core.counts["updates.learning"]


async def test_many_dead_letters_are_counted_and_one_is_described(tmp_path: Path) -> None:
    source = MemorySource({"data": 1, "feedback": 1})
    for _ in range(40):
        source.append("data", b"what is this?")
    fill(source, 0, 10)
    with structlog.testing.capture_logs() as logs, daemon_on(tmp_path, source, letters=MemorySink()) as daemon:
        await run(daemon)
    (told,) = [line for line in logs if line["event"] == "dead_letter"]
    assert told["record"] == "data-0-0"
    assert "not_json" in told["error"]
    assert "what is this?" not in str(logs)
    assert daemon.runner.dead_letters == 40


async def test_many_labels_that_name_no_class_are_counted_and_one_is_described(tmp_path: Path) -> None:
    source = MemorySource({"data": 1, "feedback": 1})
    for number, row in enumerate(rows(0, 40)):
        source.append("data", encode_event(f"e{number}", row, time=float(number)))
        source.append("feedback", encode_feedback(f"e{number}", label=10 + number, time=float(number + 1)))
    source.append("feedback", encode_feedback("nobody", label=1, time=42.0))
    source.append("data", b"what is this?")
    with structlog.testing.capture_logs() as logs, daemon_on(tmp_path, source) as daemon:
        await run(daemon)
    (told,) = [line for line in logs if line["event"] == "unusable_label"]
    classes = daemon.core.host.num_classes
    number = int(told["id"][1:])
    assert (told["label"], told["model_has"]) == (10 + number, f"classes 0 to {classes - 1}")
    daemon.metrics.look(daemon)
    assert b"adaptd_foreign_labels_total 40.0" in daemon.metrics.exposition()
    (drained,) = [line for line in logs if line["event"] == "drained"]
    expected = {"events": 40, "dead_letters": 1, "unusable_labels": 40, "orphans": 0, "late": 0, "still_waiting": 1}
    assert expected.items() <= drained.items()


def test_batches_that_share_a_step_of_adaptation_are_counted() -> None:
    core = make_core(choice("adaptation", "tent"), background=True, audit_share=0.0)
    core.answer(events(0, 16))
    core.follow()
    core.feedback(feedback(0, 16))
    assert core.job is not None
    for number in range(1, 4):
        core.answer(events(16 * number, 16))
        core.follow()
    core.learner.run(core.job)
    core.done()
    assert core.counts["merged_batches"] == 2
