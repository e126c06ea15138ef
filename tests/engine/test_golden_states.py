"""State directories of every format there was: each is taken up where it was left."""

import shutil
from pathlib import Path

import pytest
import torch

from engine.checkpoint.manifest import FORMAT
from engine.checkpoint.migrate import migrate
from engine.core import Core
from tests.engine.cores import choice, make_core
from tests.engine.lives import Life

GOLDEN = Path(__file__).parent.parent / "golden"
FORMATS = sorted(int(path.name.removeprefix("state-")) for path in GOLDEN.glob("state-*"))


def make() -> Core:
    """What made the golden states; it must never change."""
    adaptation = choice("adaptation", "bn", mode="ema", momentum=0.1)
    return make_core(adaptation, choice("safeguard", "replay", capacity=20))


def test_there_is_a_state_of_every_format() -> None:
    assert list(range(1, FORMAT + 1)) == FORMATS


@pytest.mark.parametrize("number", FORMATS)
def test_a_state_of_every_format_goes_on_as_if_it_had_been_written_today(number: int, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / f"state-{number}", tmp_path / "state")
    life = Life(tmp_path / "state", make)
    assert (life.keeper.saved_step, life.cutter.replaying) == (16, 5)
    assert len(life.core.learner.optimizer.state) == 6
    life.finish()
    whole = Life(tmp_path / "whole", make).finish()
    assert life.core.counts == whole.core.counts
    assert life.core.joins.counts == whole.core.joins.counts
    for name, tensor in whole.core.host.live.state_dict().items():
        # Not bit for bit: the golden states may be of another machine.
        torch.testing.assert_close(life.core.host.live.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    life.crash()
    whole.crash()


@pytest.mark.parametrize(
    ("tree", "kind"),
    [({}, "SGD"), ({"w": {"momentum_buffer": {}}}, "SGD"), ({"w": {"step": {}, "exp_avg": {}}}, "Adam")],
)
def test_the_optimizer_of_format_1_is_told_from_the_names_of_its_values(tree: dict[str, object], kind: str) -> None:
    meta = {"states": {"optimizer": tree, "model": {"w": 1}}, "positions": []}
    before = repr(meta)
    assert migrate(meta, 1) == {
        "states": {"optimizer": {"kind": kind, "state": tree}, "model": {"w": 1}},
        "positions": [],
    }
    assert repr(meta) == before
    assert migrate(migrate(meta, 1), 1) == migrate(meta, 1)
    assert migrate(meta, FORMAT) == meta


def test_the_methods_of_format_1_get_the_places_that_they_have_today() -> None:
    methods = {"adaptation": {"name": "bn"}, "safeguard0": {"name": "replay"}, "reweighting12": {"name": "age"}}
    found = migrate({"states": {"policy": {"methods": methods, "core": 1}}}, 1)
    named = {"adaptation": {"name": "bn"}, "safeguard.replay": {"name": "replay"}, "reweighting.age": {"name": "age"}}
    assert found == {"states": {"policy": {"methods": named, "core": 1}}}
