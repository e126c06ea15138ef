"""Any order of records, checkpoints, crashes and faults: what the engine promises holds after every step.

The model beside it is small: how many records of each stream were applied, and what a run that nothing happened to
has answered, counted and audited after as many journal entries.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import anyio
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine import reload
from engine.build import build_core
from engine.checkpoint.disk import LocalDisk
from engine.core import Core
from engine.daemon import Daemon
from engine.errors import StorageError
from engine.metrics import Metrics
from engine.policyfile import LoadedPolicy, load
from engine.writer import Writer
from tests.engine.cores import tiny_model
from tests.engine.lives import SIZE, Life
from tests.engine.policies import BASE, write

BATCHES = 24
POLICY = (
    BASE
    + """\
batching: {max_size: 16}
join: {max_disk_bytes: 0}
adaptation: {method: bn, mode: ema, momentum: 0.1}
safeguards: [{method: replay, capacity: 16}, {method: finite}]
learning: {mode: inline, optimizer: adam, lr: 0.05, batch_size: 8, max_delay: 1000d}
audit: {share: 0.25}
checkpoint: {every: 60s}
"""
)
OTHERS = ("every: 60s", "every: 61s", "every: 62s, keep: 4")
"""Policies that differ in nothing that batches or weights go by."""
STEPS = st.integers(0, 6)
"""Batches before something else happens."""
BROKEN = ("every: soon", "every: 60s}\nmodle: {", "every: 60s}\nseed: 7\n#{", "every: 60s}\ngate: {method: gone")


AuditState = tuple[int, list[list[int]], bytes]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing that handles exceptions handles it."""


def kill(_: str) -> None:
    """Stands for a failpoint that is armed."""
    raise KilledError


class Reloaded(NamedTuple):
    """What became of a reload."""

    result: str
    error: str | None
    loaded: LoadedPolicy
    """The policy in force."""
    failures: float
    """Checkpoints that could not be written meanwhile."""


async def reload_in(life: Life, loaded: LoadedPolicy) -> Reloaded:
    """Have the reloader of a daemon around a life read the policy again."""
    async with anyio.create_task_group() as tasks:
        writer, metrics = cast("Writer", life.answered), Metrics()
        daemon = Daemon(
            runner=life.runner,
            cutter=life.cutter,
            readers=[],
            writer=writer,
            metrics=metrics,
            checkpoint_every=float("inf"),
        )
        daemon.state, daemon._tasks = "serving", tasks
        assert loaded.path is not None
        read = functools.partial(load, loaded.path, environ={})
        shown: dict[str, Any] = {}
        reloader = reload.Reloader(daemon, loaded, read, lambda _: None, shown)
        result = await reloader.reload("a rule")
    life.core = daemon.core
    failures = metrics.registry.get_sample_value("adaptd_checkpoint_failures_total")
    assert failures is not None
    return Reloaded(result, shown["reload"]["error"], reloader.loaded, failures)


def fold(core: Core) -> tuple[dict[str, int], AuditState]:
    """What batches made of a core, beside what its answers show."""
    state = core.audit.state_dict()
    return dict(core.counts), (state["seen"], state["classes"].tolist(), state["bytes"].numpy().tobytes())


def begin_life(root: Path, name: str) -> tuple[Life, LoadedPolicy]:
    """A life in a folder of the root, and the policy that it found there."""
    loaded = load(root / "policy.yaml", environ={})

    def make() -> Core:
        return build_core(loaded.policy, tiny_model(), background=False, directory=None)

    return Life(root / name, make, batches=BATCHES, save_every=float("inf"), digest=loaded.digest), loaded


class Whole(NamedTuple):
    """What a run made that nothing happened to."""

    answers: dict[str, tuple[bytes, int, int]]
    folds: dict[int, tuple[dict[str, int], AuditState]]
    """By the number of journal entries applied."""


@functools.cache
def undisturbed() -> Whole:
    """The same for every example, so that it is made once."""
    with tempfile.TemporaryDirectory(prefix="adaptd-machine-") as root:
        write(Path(root), POLICY)
        life, _ = begin_life(Path(root), "whole")
        folds = {0: fold(life.core)}
        while life.step():
            folds[life.keeper.sequence] = fold(life.core)
        life.crash()
    return Whole(life.answered.rows, folds)


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
        self.whole = undisturbed()
        self.write(OTHERS[0])

    @initialize()
    def begin(self) -> None:
        self.begin_life()

    def write(self, words: str) -> None:
        write(self.root, POLICY.replace(OTHERS[0], words))

    def begin_life(self) -> None:
        self.life, self.loaded = begin_life(self.root, "state")

    # -- what may happen ----------------------------------------------------------------------------------------

    @rule(steps=STEPS)
    def records_come(self, steps: int) -> None:
        """Batches of data and of feedback, as the streams have them."""
        for _ in range(steps):
            self.life.step()
            self.note()

    def go_on(self, steps: int) -> None:
        """Take so many batches, and what is left of a replay: checkpoints and reloads wait for its end."""
        self.records_come(steps)
        while self.life.cutter.replaying:
            self.records_come(1)

    @rule()
    def a_tick_comes(self) -> None:
        """What is left is learned from only when the streams end, so that a tick changes nothing before."""
        if self.life.cutter.exhausted():
            self.life.runner.finish()
            self.journaled = max(self.journaled, self.life.keeper.sequence)

    @rule(steps=STEPS)
    def a_checkpoint_is_made(self, steps: int) -> None:
        self.go_on(steps)
        if self.life.keeper.sequence != self.life.keeper.saved_step:
            self.life.save()
            self.acknowledged = self.life.keeper.sequence

    @rule(steps=STEPS, at=st.integers(1, 12), code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS]))
    def the_disk_fails_during_a_checkpoint(self, steps: int, at: int, code: int) -> None:
        self.go_on(steps)
        if self.life.keeper.sequence == self.life.keeper.saved_step:
            return
        with self.broken_disk(at, code), contextlib.suppress(StorageError):
            self.life.save()
            self.acknowledged = self.life.keeper.sequence

    @contextlib.contextmanager
    def broken_disk(self, at: int, code: int) -> Iterator[None]:
        store = self.life.store
        good, broken = store._disk, BrokenDisk(at, code)
        store._disk = store._layout.disk = broken
        try:
            yield
        finally:
            store._disk = store._layout.disk = good

    @rule(steps=STEPS)
    def the_process_is_killed(self, steps: int) -> None:
        self.records_come(steps)
        self.die()

    def die(self) -> None:
        self.live_again()
        assert self.life.keeper.saved_step is not None
        assert self.life.keeper.saved_step >= self.acknowledged, "an acknowledged checkpoint is gone"

    @rule(steps=STEPS, words=st.sampled_from(OTHERS))
    def the_policy_is_changed_between_two_lives(self, steps: int, words: str) -> None:
        self.records_come(steps)
        self.write(words)
        self.live_again()

    @rule(steps=STEPS, words=st.sampled_from(OTHERS))
    def the_policy_is_reloaded(self, steps: int, words: str) -> None:
        self.go_on(steps)
        self.write(words)
        core, digest = self.life.core, self.loaded.digest
        told = self.reload()
        assert told.result == ("unchanged" if self.loaded.digest == digest else "applied")
        assert told.failures == 0, "what is saved already is not saved again"
        if self.loaded.digest != digest:
            assert self.life.core is self.life.runner.core is not core
            assert self.life.keeper.saved_step == self.life.keeper.sequence

    @rule(steps=STEPS, words=st.sampled_from(BROKEN))
    def a_broken_policy_is_refused(self, steps: int, words: str) -> None:
        self.go_on(steps)
        before = self.life.core, self.loaded, self.life.keeper.saved_step
        self.write(words)
        assert self.reload().result == "rejected"
        assert (self.life.core, self.loaded, self.life.keeper.saved_step) == before
        self.write(OTHERS[0])  # for the next life

    @rule(steps=STEPS, words=st.sampled_from(OTHERS), at=st.integers(1, 12))
    def the_disk_fails_during_a_reload(self, steps: int, words: str, at: int) -> None:
        self.go_on(steps)
        self.write(words)
        core = self.life.core
        with self.broken_disk(at, errno.ENOSPC):
            told = self.reload()
        assert (self.life.core is core) == (told.result != "applied")
        if told.result == "rejected":
            assert told.error is not None
            assert "checkpoint to go on from" in told.error
            assert told.failures == 1

    @rule(steps=STEPS, words=st.sampled_from(OTHERS))
    def the_process_is_killed_during_a_reload(self, steps: int, words: str) -> None:
        self.go_on(steps)
        self.write(words)
        if load(self.root / "policy.yaml", environ={}).digest != self.loaded.digest:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reload, "failpoint", kill)
                with pytest.raises(BaseExceptionGroup) as caught:
                    self.reload()
            assert caught.group_contains(KilledError)
        self.die()

    def reload(self) -> Reloaded:
        told = anyio.run(reload_in, self.life, self.loaded)
        self.loaded = told.loaded
        if told.result == "applied":
            self.acknowledged = self.life.keeper.sequence
        assert self.life.keeper._digest == self.loaded.digest
        return told

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

    @rule(steps=STEPS)
    def a_write_of_the_journal_is_torn(self, steps: int) -> None:
        self.records_come(steps)
        self.life.crash()
        newest = max((self.root / "state").glob("journal-*.log"))
        with newest.open("ab") as file:
            file.write(newest.read_bytes()[29:49])
        self.live_again()

    # -- what must hold -----------------------------------------------------------------------------------------

    def live_again(self) -> None:
        self.life.crash()
        self.life.core.joins.close()
        self.begin_life()
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
        """No record is applied twice or left out: counts and audit window are those of an undisturbed run after as
        many entries."""
        if not hasattr(self, "life"):
            return
        at = self.life.keeper.sequence
        if at in self.whole.folds:
            assert fold(self.life.core) == self.whole.folds[at]
        applied = self.life.runner.positions.get(("data", 0), 0)
        assert applied == self.life.core.counts["events"]
        assert applied % SIZE == 0

    @invariant()
    def every_answer_is_that_of_the_undisturbed_run(self) -> None:
        for name, row in self.answers.items():
            assert row == self.whole.answers[name]

    @invariant()
    def the_directory_stays_bounded(self) -> None:
        if hasattr(self, "life"):
            names = os.listdir(self.root / "state")
            assert len([name for name in names if name.startswith("ckpt-")]) <= 5
            assert len([name for name in names if name.startswith("journal-")]) <= 16

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.run()
            self.note()
            assert self.answers == self.whole.answers
            self.life.crash()
        shutil.rmtree(self.root)


Engine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestEngine = pytest.mark.filterwarnings("ignore")(Engine.TestCase)
