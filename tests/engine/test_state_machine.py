"""Any order of records, checkpoints, crashes and faults: what the engine promises holds after every step.

The model beside it is small: how many records of each stream were applied, and what a run that nothing happened to
has answered and counted after as many journal entries.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.checkpoint.disk import LocalDisk
from engine.core import Core
from engine.errors import StorageError
from tests.engine.cores import choice, make_core
from tests.engine.lives import SIZE, Life

BATCHES = 12


def make() -> Core:
    adaptation = choice("adaptation", "bn", mode="ema", momentum=0.1)
    return make_core(adaptation, choice("safeguard", "replay", capacity=16), choice("safeguard", "finite"))


class BrokenDisk(LocalDisk):
    """Fails one of the coming operations of a save."""

    def __init__(self, at: int, code: int) -> None:
        super().__init__()
        self.left, self.code = at, code

    def _maybe(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))

    def fsync(self, file: object) -> None:
        self._maybe()
        super().fsync(file)  # type: ignore[arg-type]

    def rename(self, old: Path, new: Path) -> None:
        self._maybe()
        super().rename(old, new)

    def sync_dir(self, path: Path) -> None:
        self._maybe()
        super().sync_dir(path)

    def mkdir(self, path: Path) -> None:
        self._maybe()
        super().mkdir(path)


class Engine(RuleBasedStateMachine):
    """Core, keeper, journal and store over many lives."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="adaptd-machine-"))
        self.answers: dict[str, tuple[bytes, int, int]] = {}
        self.journaled = 0
        self.acknowledged = 0
        self.whole = Life(self.root / "whole", make, batches=BATCHES, save_every=float("inf"))
        self.counts = {0: dict(self.whole.core.counts)}
        while self.whole.step():
            self.counts[self.whole.keeper.sequence] = dict(self.whole.core.counts)

    @initialize()
    def begin(self) -> None:
        self.life = Life(self.root / "state", make, batches=BATCHES, save_every=float("inf"))

    # -- what may happen ----------------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 6))
    def records_come(self, steps: int) -> None:
        """Batches of data and of feedback, as the streams have them."""
        for _ in range(steps):
            self.life.step()
            self.note()

    @rule()
    def a_tick_comes(self) -> None:
        """What is left is learned from only when the streams end, so that a tick changes nothing before."""
        if self.life.cutter.exhausted():
            self.life.runner.finish()
            self.journaled = max(self.journaled, self.life.keeper.sequence)

    @precondition(lambda self: not self.life.cutter.replaying)
    @rule()
    def a_checkpoint_is_made(self) -> None:
        if self.life.keeper.sequence != self.life.keeper.saved_step:
            self.life.save()
            self.acknowledged = self.life.keeper.sequence

    @precondition(lambda self: not self.life.cutter.replaying)
    @rule(at=st.integers(1, 12), code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS]))
    def the_disk_fails_during_a_checkpoint(self, at: int, code: int) -> None:
        if self.life.keeper.sequence == self.life.keeper.saved_step:
            return
        store = self.life.store
        good, broken = store._disk, BrokenDisk(at, code)
        store._disk = store._layout.disk = broken
        try:
            self.life.save()
            self.acknowledged = self.life.keeper.sequence
        except StorageError:
            pass
        finally:
            store._disk = store._layout.disk = good

    @rule()
    def the_process_is_killed(self) -> None:
        self.live_again()
        assert self.life.keeper.saved_step is not None
        assert self.life.keeper.saved_step >= self.acknowledged, "an acknowledged checkpoint is gone"

    @rule(digest=st.sampled_from("abc"))
    def the_policy_is_changed(self, digest: str) -> None:
        """A restart under another policy; here one that differs in nothing that batches go by."""
        self.life.keeper._digest = digest * 64
        self.live_again()

    @rule(place=st.floats(0, 1, exclude_max=True))
    def the_newest_checkpoint_is_damaged(self, place: float) -> None:
        found = sorted((self.root / "state").glob("ckpt-*"))
        if len(found) < 2:
            return
        files = sorted(path for path in found[-1].iterdir() if path.stat().st_size)
        path = files[int(place * len(files))]
        data = bytearray(path.read_bytes())
        data[int(place * 1000) % len(data)] ^= 1
        path.write_bytes(data)
        self.live_again()
        assert self.life.keeper.fallbacks == 1
        assert self.life.keeper.saved_step == int(found[-2].name.removeprefix("ckpt-"))
        self.acknowledged = self.life.keeper.saved_step

    @rule()
    def a_write_of_the_journal_is_torn(self) -> None:
        self.life.crash()
        newest = max((self.root / "state").glob("journal-*.log"))
        with newest.open("ab") as file:
            file.write(newest.read_bytes()[29:49])
        self.live_again()

    # -- what must hold -----------------------------------------------------------------------------------------

    def live_again(self) -> None:
        self.life.crash()
        self.life.core.joins.close()
        self.life = Life(self.root / "state", make, batches=BATCHES, save_every=float("inf"))
        reached = self.life.keeper.sequence + self.life.cutter.replaying
        assert reached >= self.journaled, "what was journaled is not repeated"
        self.note()

    def note(self) -> None:
        self.journaled = max(self.journaled, self.life.keeper.sequence)
        for name, row in self.life.answered.rows.items():
            assert self.answers.setdefault(name, row) == row, f"{name} was answered in two ways"
        self.life.answered.rows.clear()

    @invariant()
    def state_is_the_fold_of_a_prefix(self) -> None:
        """No record is applied twice or left out: counts are those of an undisturbed run after as many entries."""
        if not hasattr(self, "life"):
            return
        at = self.life.keeper.sequence
        if at in self.counts:
            assert dict(self.life.core.counts) == self.counts[at]
        applied = self.life.runner.positions.get(("data", 0), 0)
        assert applied == self.life.core.counts["events"]
        assert applied % SIZE == 0

    @invariant()
    def every_answer_is_that_of_the_undisturbed_run(self) -> None:
        for name, row in self.answers.items():
            assert row == self.whole.answered.rows[name]

    @invariant()
    def the_directory_stays_bounded(self) -> None:
        if hasattr(self, "life"):
            names = os.listdir(self.root / "state")
            assert len([name for name in names if name.startswith("ckpt-")]) <= 4
            assert len([name for name in names if name.startswith("journal-")]) <= 16

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.run()
            self.note()
            assert self.answers == self.whole.answered.rows
            self.life.crash()
        self.whole.crash()
        shutil.rmtree(self.root)


Engine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestEngine = pytest.mark.filterwarnings("ignore")(Engine.TestCase)
