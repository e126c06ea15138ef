from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn

from engine.checkpoint.errors import NoValidCheckpointError
from engine.core import Core
from engine.errors import StorageError
from engine.freeze import Freeze
from engine.methods import Choice
from policies.interfaces import Action
from tests.engine.cores import CLASSES, FEATURES, choice, make_core, tiny_model
from tests.engine.lives import Life

Make = Callable[[], Core]

RELEASES = (choice("interpolation", "linear"), choice("gate", "flips", budget=0.2))
ALL: tuple[Choice, ...] = (
    choice("adaptation", "rotta", capacity=16, interval=16, lr=0.01),
    choice("reweighting", "age", half_life=100.0),
    choice("reweighting", "loss", warmup=8, min_batch=4),
    choice("safeguard", "replay", capacity=64, batch=8),
    choice("safeguard", "ewc", every=1),
    choice("safeguard", "restore", rate=0.05, steps="all"),
    choice("safeguard", "collapse"),
    choice("safeguard", "finite"),
    *RELEASES,
)
RESETTING = choice("safeguard", "collapse", share=1.0, ratio=0.99, agreement=1.0, window=32, patience=1, cooldown=1)
POLICIES: dict[str, tuple[Choice, ...]] = {
    "everything": ALL,
    "none": (choice("adaptation", "none"), *RELEASES),
    "bn": (choice("adaptation", "bn", mode="ema"), choice("safeguard", "replay", capacity=64), *RELEASES),
    "bn and resets": (choice("adaptation", "bn", mode="prior"), choice("safeguard", "ewc", proximal=False), RESETTING),
    "tent and resets": (choice("adaptation", "tent", lr=0.05), choice("safeguard", "finite"), RESETTING),
    "tent with everything": (choice("adaptation", "tent", optimizer="sgd", lr=0.01), *ALL[1:]),
    "rotta and resets": (ALL[0], choice("safeguard", "restore", mode="pull"), RESETTING),
    "lame": (choice("adaptation", "lame"), choice("reweighting", "loss", strategy="extremes", warmup=0, min_batch=0)),
}

both_modes = pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])


def maker(policy: str, background: bool) -> Make:
    return lambda: make_core(*POLICIES[policy], background=background, release_every=60, audit_share=0.25)


@cache
def uninterrupted(policy: str, background: bool) -> tuple[dict[str, bytes], dict[str, tuple[bytes, int, int]]]:
    with TemporaryDirectory() as directory:
        life = Life(Path(directory), maker(policy, background), save_every=float("inf")).finish()
        state = life.state()
        life.crash()
    assert life.core.counts["updates.learning"] > 5
    assert ("resets" in policy) == (life.core.counts["resets"] > 0)
    return state, life.answered.rows


@pytest.mark.parametrize(
    ("policy", "background"),
    [("everything", False), ("tent and resets", False), *[(policy, True) for policy in POLICIES]],
)
def test_a_core_that_was_killed_often_ends_as_one_that_never_was(tmp_path: Path, policy: str, background: bool) -> None:
    make = maker(policy, background)
    expected, answers = uninterrupted(policy, background)
    replayed = 0
    for until in (1, 7, 9, 16, 25):
        life = Life(tmp_path / "killed", make).run(until)
        assert life.answered.rows.items() <= answers.items()
        replayed += life.runner.replayed
        life.crash()
    life = Life(tmp_path / "killed", make).finish()
    assert life.state() == expected
    assert life.answered.rows.items() <= answers.items()
    assert replayed > 5
    life.crash()


@both_modes
def test_past_a_damaged_checkpoint_a_longer_journal_leads_to_the_same_state(tmp_path: Path, background: bool) -> None:
    make = maker("everything", background)
    expected, _ = uninterrupted("everything", background)
    life = Life(tmp_path / "killed", make).run(30)
    newest = life.store.newest()
    life.crash()
    file = tmp_path / "killed" / f"ckpt-{newest:012d}" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    life = Life(tmp_path / "killed", make)
    assert life.keeper.fallbacks == 1
    assert life.keeper.saved_step is not None
    assert newest is not None
    assert life.keeper.saved_step < newest
    assert life.cutter.replaying == 30 - life.keeper.saved_step
    assert life.finish().state() == expected
    life.crash()


@both_modes
def test_saving_changes_nothing_of_what_follows(tmp_path: Path, background: bool) -> None:
    make = maker("everything", background)
    expected, answers = uninterrupted("everything", background)
    life = Life(tmp_path / "often", make, save_every=1).finish()
    assert life.state() == expected
    assert life.answered.rows == answers
    assert len(life.store.list()) == 3
    life.crash()


def test_a_snapshot_shares_nothing_with_what_goes_on(tmp_path: Path) -> None:
    life = Life(tmp_path, maker("everything", False), save_every=float("inf")).run(10)
    before = life.state()
    snapshot = life.runner.snapshot()
    life.run(20)
    assert life.state() != before
    life.keeper.write(snapshot)
    life.crash()
    again = Life(tmp_path, maker("everything", False))
    assert again.keeper.saved_step == 10
    assert again.cutter.replaying == 10
    again.crash()


def test_the_journal_is_kept_back_to_the_oldest_checkpoint(tmp_path: Path) -> None:
    life = Life(tmp_path, maker("none", False)).finish()
    oldest = life.store.oldest_kept()
    segments = sorted(int(path.stem.removeprefix("journal-")) for path in tmp_path.glob("journal-*.log"))
    assert segments[0] == oldest
    assert len(life.store.list()) == 3
    life.crash()


@both_modes
def test_what_was_done_at_the_end_of_the_streams_is_done_again_in_a_replay(tmp_path: Path, background: bool) -> None:
    make = maker("everything", background)
    life = Life(tmp_path, make).finish()
    expected = life.state()
    saved, last = life.keeper.saved_step, life.keeper.sequence
    life.crash()
    again = Life(tmp_path, make)
    assert again.keeper.saved_step == saved
    assert again.finish().state() == expected
    assert again.keeper.sequence == last
    assert not again.core.unfinished
    again.crash()


def test_positions_come_back(tmp_path: Path) -> None:
    life = Life(tmp_path, maker("none", False)).run(8)
    life.save()
    positions = dict(life.runner.positions)
    life.crash()
    again = Life(tmp_path, maker("none", False))
    assert again.runner.positions == positions
    assert positions == {("data", 0): 64, ("feedback", 0): 63}
    again.crash()


def plain(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, width), nn.Linear(width, CLASSES))


@pytest.mark.parametrize("model", [plain(8), plain(9), nn.Sequential(tiny_model(), nn.Linear(CLASSES, CLASSES))])
def test_weights_of_another_model_are_refused_and_nothing_is_touched(tmp_path: Path, model: nn.Module) -> None:
    Life(tmp_path, maker("none", False)).run(5).crash()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(StorageError, match="belong to another model"):
        Life(tmp_path, lambda: make_core(model=model))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_weights_that_are_not_finite_are_passed_over(tmp_path: Path) -> None:
    life = Life(tmp_path, maker("none", False)).run(6)
    life.save()
    life.run(8)
    with torch.no_grad():
        next(life.core.host.live.parameters())[0, 0] = float("nan")
    life.save()
    life.crash()
    again = Life(tmp_path, maker("none", False))
    assert again.keeper.saved_step == 6
    assert again.keeper.fallbacks == 1
    again.crash()


def test_a_directory_without_any_valid_checkpoint_is_refused(tmp_path: Path) -> None:
    Life(tmp_path, maker("none", False)).run(5).crash()
    for file in tmp_path.glob("ckpt-*/MANIFEST"):
        file.write_bytes(b"")
    with pytest.raises(NoValidCheckpointError, match="--fresh"):
        Life(tmp_path, maker("none", False))


def test_a_journal_without_its_checkpoints_is_refused(tmp_path: Path) -> None:
    Life(tmp_path / "state", maker("none", False)).run(5).crash()
    for folder in (tmp_path / "state").glob("ckpt-*"):
        folder.rename(tmp_path / folder.name)
    with pytest.raises(StorageError, match=r"a journal and no checkpoint that it belongs to.*--fresh"):
        Life(tmp_path / "state", maker("none", False))


def test_a_method_that_the_policy_did_not_have_before_starts_afresh(tmp_path: Path) -> None:
    life = Life(tmp_path, maker("bn", False)).run(12)
    life.save()
    life.crash()
    again = Life(tmp_path, maker("tent with everything", False))
    assert again.core.step == life.core.step
    again.finish().crash()
    assert again.core.counts["updates.learning"] > life.core.counts["updates.learning"]


def test_a_damaged_journal_that_the_newest_checkpoint_does_not_need_is_set_aside(tmp_path: Path) -> None:
    make = maker("bn", False)
    life = Life(tmp_path, make).run(14)
    life.save()
    life.crash()
    oldest = min(tmp_path.glob("journal-*.log"))
    oldest.write_bytes(oldest.read_bytes()[:40] + b"?" + oldest.read_bytes()[41:])
    again = Life(tmp_path, make).finish()
    assert (tmp_path / "broken" / oldest.name).exists()
    assert not oldest.exists()
    assert again.core.counts == Life(tmp_path / "whole", make).finish().core.counts


@pytest.mark.parametrize(("digest", "on"), [("0", True), ("1", False)])
def test_what_was_frozen_stays_so_until_the_policy_changes(tmp_path: Path, digest: str, on: bool) -> None:
    def make() -> Core:
        core = maker("none", False)()
        core.freeze = Freeze(core.host, 2)
        return core

    life = Life(tmp_path, make).run(12)
    for _ in range(2):
        life.core.freeze.see(Action.ROLL_BACK)
    life.save()
    life.crash()
    again = Life(tmp_path, make, digest=64 * digest)
    assert again.core.freeze.on is on
    again.crash()
