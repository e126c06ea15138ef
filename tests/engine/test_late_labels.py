"""Late labels on their way to the adaptation method: in the order of the journal, and the same after a crash."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import Core
from tests.engine.cores import CLASSES, choice, drive, events, feedback, make_core
from tests.engine.lives import Life


def make(**params: Any) -> Core:
    """A core whose labels decide soon; beside adaptation it learns from them."""
    return make_core(choice("adaptation", "auto", window=16, every=1, alike=9.0, **params), background=True)


def heard_by(core: Core, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str | None]]:
    heard: list[tuple[str, int, str | None]] = []
    inner = core.methods.adaptation.labelled

    def labelled(ids: Sequence[str], labels: Sequence[int], groups: Sequence[str | None]) -> None:
        heard.extend(zip(ids, labels, groups, strict=True))
        inner(ids, labels, groups)

    monkeypatch.setattr(core.methods.adaptation, "labelled", labelled)
    return heard


def test_all_usable_labels_but_rewards_reach_adaptation_in_the_order_in_which_they_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = make()
    heard = heard_by(core, monkeypatch)
    core.feedback(feedback(0, 4))  # before their events
    core.answer(events(0, 16))
    core.follow()
    items = feedback(4, 12)
    items[3] = items[3]._replace(label=CLASSES)
    items[5] = items[5]._replace(id="never answered")
    items[7] = items[7]._replace(label=None, reward=1.0)
    core.feedback(items)
    expected = feedback(0, 4) + [item for number, item in enumerate(items) if number not in (3, 5, 7)]
    assert heard == [(item.id, item.label, None) for item in expected]
    assert core.counts["unusable_labels"] == 1
    assert core.counts["labels"] == len(expected) + 1


def test_a_method_that_does_not_listen_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core(choice("adaptation", "none"))
    heard = heard_by(core, monkeypatch)
    drive(core, range(3))
    assert core.counts["labels"] == 48
    assert heard == []


def test_the_same_entries_give_the_same_answers_with_labels() -> None:
    one, two = (drive(make(), range(30)) for _ in range(2))
    for left, right in zip(one, two, strict=True):
        assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("at", [13, 27])
def test_a_life_after_a_crash_goes_on_bit_for_bit_with_labels(tmp_path: Path, at: int) -> None:
    whole = Life(tmp_path / "whole", make, batches=24).finish()
    Life(tmp_path / "cut", make, batches=24).run(until=at).crash()
    life = Life(tmp_path / "cut", make, batches=24).finish()
    gauges = life.core.methods.adaptation.gauges
    assert gauges == whole.core.methods.adaptation.gauges
    assert gauges["labels_chain"] + gauges["labels_adapting"] > 0
    assert life.answered.rows.items() <= whole.answered.rows.items()
    for name, tensor in whole.core.host.live.state_dict().items():
        assert torch.equal(life.core.host.live.state_dict()[name], tensor)
    life.crash()
    whole.crash()
