"""Reloading the policy while the daemon runs: at SIGHUP, or when its file has changed.

The new policy is read, compared, built and tried on copies beside serving; while anything is wrong with it, the old one
runs on. A good one is taken over between two batches: the background job is finished, a durable checkpoint is made, and
a new core is given the state in it, just as at a restart under a changed policy. The journal goes on behind that
checkpoint, so a process that is killed at any moment loses nothing.
"""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

import anyio
import numpy as np
import structlog
from anyio import to_thread
from torch import nn

from engine.build import build_core
from engine.core import Core
from engine.errors import PolicyFileError, StorageError
from engine.keeper import same_generators
from engine.learner import Job
from engine.policy import Policy
from engine.policyfile import LoadedPolicy
from streams.base import Record
from streams.codec import Event, Feedback
from streams.seams import failpoint

if TYPE_CHECKING:
    from engine.daemon import Daemon

log = structlog.get_logger("adaptd")

POLL_SECONDS: Final = 1.0
"""Time between two looks at the policy file; a change counts once two of them agree, so that no half of it is read."""

RESTART: Final = ("version", "state", "seed", "model", "streams", "delivery", "order", "metrics", "join.mode")
"""Keys, with everything below them, that a running daemon cannot change."""

TRIAL_ROWS: Final = 32
HIGH_BATCHES: Final = 16
"""Full batches of one stream that may wait before the stream is paused."""


class Reloader:
    """Reloads the policy of one daemon.

    Args:
        daemon: Whose.
        loaded: The policy in force.
        read: Reads the policy again, with the flags and variables that it was started with.
        applied: Called with a new policy once it is in force, for what is none of the daemon's (logs).
        shown: The part of ``/status`` that tells of the policy; kept up to date here.

    Attributes:
        loaded: The policy in force.
    """

    def __init__(
        self,
        daemon: Daemon,
        loaded: LoadedPolicy,
        read: Callable[[], LoadedPolicy],
        applied: Callable[[Policy], None],
        shown: dict[str, Any],
    ) -> None:
        self.loaded = loaded
        self._daemon = daemon
        self._read = read
        self._applied = applied
        self._shown = shown
        self._one = anyio.Lock()
        self._spill = 0
        self._refusal: Exception | None = None
        daemon.metrics.policy.info({"digest": loaded.digest})

    async def run(self) -> None:
        """Reload at every SIGHUP and every change of the file. Runs until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._signals)
            if self.loaded.path is not None:
                tasks.start_soon(self._watch, self.loaded.path)

    async def _signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGHUP) as signals:
            async for _ in signals:
                await self.reload("SIGHUP")

    async def _watch(self, path: Path) -> None:
        seen = before = _mark(path)
        await self.reload("file changed", quietly=True)  # it may have since it was read first
        while True:
            await anyio.sleep(POLL_SECONDS)
            now = _mark(path)
            if now == before and now not in (seen, None):
                seen = now
                await self.reload("file changed")
            before = now

    async def reload(self, why: str, *, quietly: bool = False) -> str:
        """Read the policy again and put it in force if it is good. Called on the event loop.

        Args:
            why: What asked for it, for the log.
            quietly: Whether to say nothing where the policy is the same.

        Returns:
            ``applied``, ``rejected`` or ``unchanged``.

        Raises:
            StreamUnavailableError: The daemon failed meanwhile, not the policy.
        """
        async with self._one:
            problem: Exception | None = None
            try:
                found = await to_thread.run_sync(self._read)
                if found.digest == self.loaded.digest:
                    return "unchanged" if quietly else self._record("unchanged", why)
                core = await self._prepared(found)
            except Exception as error:  # noqa: BLE001 - factories and methods may raise anything
                problem = error
            else:
                problem = await self._exchange(found, core)
            return self._record("applied" if problem is None else "rejected", why, problem)

    def _record(self, result: str, why: str, problem: Exception | None = None) -> str:
        """Tell what became of a reload: a metric, ``/status`` and the log."""
        self._daemon.metrics.reloads.labels(result).inc()
        error = None if problem is None else _told(problem)
        self._shown["digest"] = self.loaded.digest
        self._shown["reload"] = {"result": result, "time": round(self._daemon.metrics.clock.time(), 3), "error": error}
        if error is None:
            log.info(
                "policy_applied" if result == "applied" else "policy_unchanged", why=why, digest=self.loaded.digest
            )
        else:
            log.error("policy_rejected", why=why, error=error, kept=self.loaded.digest)
        return result

    # -- beside serving -----------------------------------------------------------------------------------------

    async def _prepared(self, found: LoadedPolicy) -> Core:
        """What `_prepare` gives, beside serving unless that would draw from the same generators and must repeat."""
        daemon = self._daemon
        if self.loaded.policy.in_background:
            return await to_thread.run_sync(daemon.affinity.apart, self._prepare, found)
        async with daemon.turn:
            return await daemon.on_model(self._prepare, found)

    def _prepare(self, found: LoadedPolicy) -> Core:
        """A core of the new policy, after another one like it was tried. Runs on a thread of its own.

        Raises:
            PolicyFileError: The policy needs a restart, or cannot be built.
        """
        _same_house(self.loaded, found)
        try:
            with same_generators():
                trial = self._build(found, None)
                _try(trial)
                directory = self._daemon.runner.keeper.store.directory / f"spill-{1 - self._spill}"
                return self._build(found, directory)
        except PolicyFileError as error:
            raise found.locate(error) from error

    def _build(self, found: LoadedPolicy, directory: Path | None) -> Core:
        return build_core(
            found.policy, _model_of(self._daemon.core), background=found.policy.in_background, directory=directory
        )

    # -- between two batches ------------------------------------------------------------------------------------

    async def _exchange(self, found: LoadedPolicy, core: Core) -> Exception | None:
        """Put a core in the place of the one that serves; why not, if that cannot be."""
        daemon = self._daemon
        old = daemon.core
        while True:
            async with daemon.turn:
                if not daemon.state.startswith("starting") and not daemon.cutter.replaying:
                    self._refusal = StorageError("the daemon is stopping; the next start reads the new policy")
                    await daemon.settle(take=lambda: self._take(core, found))
                    break
            await anyio.sleep(POLL_SECONDS / 4)
        taken = daemon.core is core
        (old if taken else core).joins.close()
        if not taken:
            return self._refusal
        self._spill = 1 - self._spill
        self.loaded = found
        self._put_in_force(found)
        return None

    def _take(self, core: Core, found: LoadedPolicy) -> Core:
        """The core to go on with. Runs on the thread that owns the model, right after a checkpoint."""
        keeper = self._daemon.runner.keeper
        try:
            if keeper.saved_step != keeper.sequence:
                raise StorageError("the checkpoint to go on from could not be written; the log says why")
            failpoint("reload.take")
            keeper.hand_on(core, found.digest)
        except Exception as error:  # noqa: BLE001 - methods may raise anything at a state that they do not know
            self._refusal = error
            return self._daemon.core
        return core

    def _put_in_force(self, found: LoadedPolicy) -> None:
        """Change what reads the policy outside the core."""
        daemon, policy = self._daemon, found.policy
        daemon.saver.every = policy.checkpoint.every
        daemon.runner.keeper.store.keep = policy.checkpoint.keep
        daemon.cutter.resize(policy.batching.max_size, policy.batching.max_delay)
        daemon.runner.floors.resize(policy.join.window)
        for reader in daemon.readers:
            reader.resize(**reading(policy))
        daemon.metrics.reloaded(found.digest)
        self._applied(policy)


class Reading(TypedDict):
    """What `Reader.resize` is given."""

    high: int
    max_size: int
    max_delay: float


def reading(policy: Policy) -> Reading:
    """The limits of readers under a policy. Of the clients, librdkafka alone fetches between two polls."""
    kafka = policy.streams.kafka if policy.streams is not None else None
    ahead = kafka is not None and kafka.client == "confluent"
    size, delay = policy.batching.max_size, policy.batching.max_delay
    return Reading(high=HIGH_BATCHES * size, max_size=size if ahead else 0, max_delay=delay)


def _mark(path: Path) -> tuple[int, ...] | None:
    """What changes with a file: number, size and time of change; None while it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _told(error: Exception) -> str:
    if isinstance(error, PolicyFileError | StorageError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _same_house(old: LoadedPolicy, new: LoadedPolicy) -> None:
    """Refuse what cannot change while running.

    Raises:
        PolicyFileError: With a line for each such key.
    """
    before, after = dict(_leaves(_plain(old.policy))), dict(_leaves(_plain(new.policy)))
    changed = [key for key in (before | after) if before.get(key) != after.get(key)]
    wrong = [key for key in changed if any(f"{key}.".startswith(f"{above}.") for above in RESTART)]
    if wrong:
        text = "cannot change while the daemon runs; put it back, or restart the daemon"
        raise new.locate(PolicyFileError("\n".join(f"{key}: {text}" for key in sorted(wrong))))


def _plain(policy: Policy) -> dict[str, Any]:
    plain: dict[str, Any] = policy.model_dump(mode="json")
    return plain


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", json.dumps(value)


def _model_of(core: Core) -> nn.Module:
    """A copy of the source model as its factory gave it: which parameters may learn is what the learner's copy says."""
    model = copy.deepcopy(core.host.source)
    for parameter, own in zip(model.parameters(), core.host.learner.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    return model


def _try(core: Core) -> None:
    """Send made-up rows and labels through a core: answer, adapt, join, learn, audit, attempt a release.

    Raises:
        PolicyFileError: The answers are not finite.
    """
    record = Record("data", 0, 0, 1, 0.0, None, b"")
    rows = _rows(core)
    core.answer([Event(f"trial-{n}", row, float(n), None, record) for n, row in enumerate(rows)])
    core.follow()
    labels = [
        Feedback(f"trial-{n}", n % core.host.num_classes, None, n + 1.0, row, record) for n, row in enumerate(rows)
    ]
    core.feedback(labels)
    if core.job is not None:
        core.learner.run(core.job)
        core.done()
    core.finish()
    if core.audit.evidence:
        core.job = Job([], [], True, core.watermark)
        core.learner.prepare(core.job)
        core.learner.run(core.job)
        core.done()
    answers = core.answer([Event("trial", rows[0], float(len(rows)), None, record)])
    if not np.isfinite(answers.probabilities).all():
        raise PolicyFileError("adaptation: the answers to a batch of noise are not finite after one step")


def _rows(core: Core) -> list[bytes]:
    """Rows of noise in the form of the model's inputs; zeros where they may be indices into a table."""
    inputs = core.host.inputs
    shape = (TRIAL_ROWS, *inputs.record_shape)
    if np.issubdtype(inputs.dtype, np.floating):
        noise = np.random.default_rng(0).normal(size=shape)
    else:
        noise = np.zeros(shape)
    return [row.tobytes() for row in noise.astype(inputs.dtype)]
