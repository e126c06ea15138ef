"""Of which events the inputs wait for a label, and that nothing is missed where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.audit import held_out
from engine.core import Core
from tests.engine.cores import choice, drive, events, feedback, make_core

SHARE = 0.25


def watching(**settings: object) -> Core:
    """A core that neither adapts nor learns nor releases."""
    return with_settings(make_core(learn=False, audit_share=SHARE), **settings)


def adapting(**settings: object) -> Core:
    """A core that adapts without labels."""
    return with_settings(make_core(choice("adaptation", "tent"), learn=False, audit_share=SHARE), **settings)


def with_settings(core: Core, **settings: object) -> Core:
    again = replace(core.settings, **settings)  # type: ignore[arg-type]
    return Core(again, core.host, core.methods, core.learner, core.audit, core.joins)


def after_a_batch(core: Core) -> Core:
    core.answer(events(100, 16))
    core.follow()
    return core


def waiting(core: Core, count: int = 32) -> dict[str, bytes]:
    """Answer events, and return the inputs that wait."""
    core.answer(events(0, count))
    core.follow()
    return {name: core.joins._waiting.get(name)[0] for name in (e.id for e in events(0, count))}  # type: ignore[index]


def test_all_inputs_wait_where_labels_are_learned_from() -> None:
    assert waiting(make_core()) == {event.id: event.inputs for event in events(0, 32)}


def test_none_waits_where_one_model_answers_everything() -> None:
    assert set(waiting(watching()).values()) == {b""}


@pytest.mark.parametrize("because", ["adapts", "guards", "releases", "has adapted", "other weights", "other release"])
def test_those_that_are_held_out_wait_where_source_and_live_may_differ(because: str) -> None:
    made: dict[str, Callable[[], Core]] = {
        "adapts": adapting,
        "guards": lambda: make_core(choice("safeguard", "finite"), learn=False, audit_share=SHARE),
        "releases": lambda: watching(release_every=9),
    }
    core = made.get(because, watching)()
    if because == "has adapted":
        core.load_state_dict(after_a_batch(adapting()).state_dict())
    with torch.no_grad():
        next(core.host.live.parameters()).add_(float(because == "other weights"))
        next(iter(core.host.release.values())).add_(float(because == "other release"))
    kept = waiting(core)
    assert kept == {e.id: e.inputs if held_out(e.id, SHARE) else b"" for e in events(0, 32)}
    assert 0 < sum(map(bool, kept.values())) < 32


@pytest.mark.parametrize("make", [watching, adapting])
def test_all_wait_where_the_policy_says_so(make: Callable[..., Core]) -> None:
    assert waiting(make(all_inputs=True)) == {event.id: event.inputs for event in events(0, 32)}


@pytest.mark.parametrize("make", [watching, adapting])
def test_what_is_counted_and_audited_is_the_same_as_with_all_inputs(make: Callable[..., Core]) -> None:
    few, every = make(), make(all_inputs=True)
    for core in (few, every):
        drive(core, range(12))
        core.finish()
    assert few.audit.accuracies() == every.audit.accuracies()
    assert few.audit.flips() == every.audit.flips()
    assert (len(few.audit), few.counts, few.joins.counts) == (len(every.audit), every.counts, every.joins.counts)
    assert len(few.audit) > 20
    assert few.joins.bytes <= every.joins.bytes


def test_what_others_answered_waits_with_its_inputs_as_their_answers_are_not_known() -> None:
    core = watching()
    core.seen(events(0, 32))
    core.feedback(feedback(0, 32))
    core.finish()
    held = sum(held_out(event.id, SHARE) for event in events(0, 32))
    assert len(core.audit) == core.audit.evidence == held > 0
    assert core.counts["labels_without_inputs"] == 0


def test_where_learning_begins_labels_of_what_was_answered_before_are_counted_as_lost() -> None:
    before, after = watching(), make_core(audit_share=SHARE)
    waiting(before)
    after.joins = before.joins
    after.feedback(feedback(0, 32))
    assert (after.counts["labels"], after.counts["labels_without_inputs"]) == (32, 32)
    assert not after.unfinished
    assert after.step == 0
    drive(after, range(2, 6))
    assert after.counts["labels_without_inputs"] == 32
    assert after.step > 0


def test_rows_that_wait_for_their_audit_without_inputs_are_counted_as_lost_where_learning_begins() -> None:
    before, after = watching(), make_core(audit_share=SHARE)
    waiting(before, 8)
    before.feedback(feedback(0, 8))
    waits = len(before._to_audit)
    assert waits
    after.load_state_dict(before.state_dict())
    after.finish()
    assert (len(after.audit), after.counts["labels_without_inputs"]) == (0, waits)


def test_what_another_method_answered_is_not_taken_for_the_answer_of_the_source() -> None:
    before = make_core(choice("adaptation", "bn", alpha=1.0), learn=False, audit_share=0.0)
    after = make_core(learn=False, audit_share=1.0)  # one that holds out what the other did not
    waiting(before)
    after.load_state_dict(before.state_dict())
    after.joins = before.joins
    after.feedback(feedback(0, 32))
    after.finish()
    assert (len(after.audit), after.counts["labels_without_inputs"]) == (0, 32)


def test_a_state_that_does_not_say_who_answered_is_not_trusted() -> None:
    old, core = after_a_batch(watching()).state_dict(), watching()
    assert old.pop("plain")
    core.load_state_dict(old)
    assert any(waiting(core).values())


def test_a_restored_core_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = watching(), watching(), watching()
    drive(whole, range(6))
    drive(first, range(3))
    with (tmp_path / "joins").open("wb") as file:
        first.joins.snapshot().write(file)
    with (tmp_path / "joins").open("rb") as file:
        second.joins.restore(file)
    second.load_state_dict(first.state_dict())
    second.audit.load_state_dict(first.audit.state_dict())
    drive(second, range(3, 6))
    assert second.state_dict()["counts"] == whole.state_dict()["counts"]
    assert second.audit.accuracies() == whole.audit.accuracies()
