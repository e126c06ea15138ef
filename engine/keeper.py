"""The keeper: what goes into a checkpoint and comes out of it again.

A checkpoint holds the whole state between two batches and the positions that it covers; the journal holds the order
of the batches since. Taking the state is quick and happens where the model is owned; writing it happens elsewhere.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, BinaryIO

import numpy as np
import structlog
import torch
from torch import Tensor

from engine.checkpoint.disk import LocalDisk
from engine.checkpoint.errors import BadCheckpointError
from engine.checkpoint.folder import Loaded, Saved, load_folder, name_of
from engine.checkpoint.positions import check, positions_of
from engine.checkpoint.state import snapshot as copy_states
from engine.checkpoint.store import CheckpointStore
from engine.core import Core
from engine.errors import StorageError
from policies.interfaces import State, load_weights
from streams.base import Positions, StreamError
from streams.join import JoinError
from streams.journal import Entry, Journal, JournalUnavailableError
from streams.pace import Hurry
from streams.seams import CLOCK, Clock, failpoint

BACKOFF_SECONDS = (0.05, 0.2, 0.5, 1.0, 2.0)

log = structlog.get_logger("adaptd")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of one instant, sharing nothing with what goes on changing."""

    step: int
    parts: Mapping[str, Callable[[BinaryIO], object]]
    meta: Mapping[str, Any]
    problem: JournalUnavailableError | None = None
    """Why it cannot become a checkpoint: its segment of the journal could not be begun."""


class Keeper:
    """Saves and restores a core.

    Args:
        store: Where checkpoints are.
        journal: The journal beside them.
        digest: Digest of the policy in force, recorded with every checkpoint.
        patience: Seconds for which journal or checkpoints may be impossible to write.
        clock: Tells how long that has lasted.
    """

    def __init__(
        self,
        store: CheckpointStore,
        journal: Journal,
        digest: str,
        *,
        patience: float = math.inf,
        clock: Clock = CLOCK,
    ) -> None:
        self.store = store
        self.journal = journal
        self.stopping = threading.Event()
        """Set to wait for the disk no longer."""
        self.hurry = Hurry()
        """Whether anybody waits for a checkpoint; it is written with rests while nobody does."""
        store.pause = self.hurry.pause
        self.trouble = ""
        """What keeps the journal from being written, in words; empty while nothing does."""
        self._digest = digest
        self._patience = patience
        self._clock = clock
        self._failing_since: float | None = None
        self.sequence = 0
        self.saved_step: int | None = None
        self.identities: dict[str, str] = {}
        """What tells each stream from another of the same name."""
        self.membership: Mapping[str, Any] = {}
        """What the checkpoint that was restored says of partitions that moved."""
        self.fallbacks = 0
        """Checkpoints found bad and passed over by `restore`."""

    def restore(self, core: Core) -> tuple[Positions, list[Entry]] | None:
        """Load the newest valid checkpoint into ``core`` and read the journal since.

        Returns:
            The positions that the checkpoint covers and the journal's entries after it; None for an empty directory.

        Raises:
            NoValidCheckpointError: If there were checkpoints but none is valid.
            StorageError: If there is a journal without a checkpoint, or the model is another one.
        """
        loaded = self.store.load(lambda found: self._fits(found, core))
        if loaded is None:
            self.journal.reopen()
            if self.journal.next_sequence is not None:
                raise StorageError(
                    f"{self.store.directory} holds a journal and no checkpoint that it belongs to; put the checkpoints"
                    " back, or start anew with --fresh, which keeps what is there in a folder aside-N"
                )
            return None
        self.fallbacks = len(loaded.fallbacks)
        for fallback in loaded.fallbacks:
            log.error("checkpoint_passed_over", name=fallback.name, reason=fallback.reason)
        failpoint("restore.loaded")
        self._apply(loaded, core, strict=False)
        failpoint("restore.applied")
        self.sequence = self.saved_step = loaded.step
        self.identities = dict(loaded.meta.get("identities", {}))
        self.membership = loaded.meta.get("membership", {})
        entries = list(self.journal.read(loaded.step, after=loaded.step))
        self.journal.reopen(after=loaded.step)
        for path in self.journal.set_aside(loaded.step):
            log.error("journal_set_aside", path=str(path), reason="damaged, and not needed by the checkpoint loaded")
        core.make_job()  # a checkpoint may lie between the end of a job and the start of the next
        return positions_of(loaded.meta), entries

    @staticmethod
    def _fits(loaded: Loaded, core: Core) -> None:
        """Refuse positions and the like that are none, and weights that do not fit the model or are not finite."""
        check(loaded.meta)
        form = _form(core)
        for key, value in loaded.meta.get("form", form).items():
            if value != form.get(key):
                raise StorageError(
                    f"{key}: the state was made with {value}, the policy says {form.get(key)}; change it back, or start"
                    " anew with --fresh, which keeps what is there in a folder aside-N"
                )
        weights = loaded.state("model")
        own = core.host.live.state_dict()
        if weights.keys() != own.keys():
            raise StorageError("its weights belong to another model: the names of their tensors differ")
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                raise StorageError(
                    f"its weights belong to another model: {name} is {tuple(tensor.shape)} {tensor.dtype}"
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise BadCheckpointError(f"{name} holds values that are not finite")

    def _apply(self, loaded: Loaded, core: Core, *, strict: bool) -> None:
        device = core.host.device
        load_weights(core.host.live, loaded.state("model"))
        core.host.release = _to(loaded.state("release"), device)
        _load_optimizer(core, _to(loaded.state("optimizer"), device))
        policy = loaded.state("policy")
        unused = core.methods.load_state_dict(_to(policy["methods"], device), strict=strict)
        for reason in dict.fromkeys(unused.values()):
            methods = [place for place, why in unused.items() if why == reason]
            log.warning("method_state_not_used", methods=methods, reason=reason)
        if loaded.manifest.config_digest != self._digest:
            log.warning("policy_changed", step=loaded.step)
        core.audit.load_state_dict(policy["audit"])
        core.load_state_dict(policy["core"])
        if loaded.manifest.config_digest != self._digest:
            core.freeze.thaw()
        _set_random(policy["random"])
        with loaded.open("join.bin") as file:
            try:
                core.joins.restore(file)
            except JoinError as error:
                raise StorageError(f"{loaded.path / 'join.bin'} cannot be taken over: {error}") from error

    def hand_on(self, core: Core, digest: str) -> None:
        """Give a new core what the checkpoint just made holds, and go on under its policy. No batch came since.

        Args:
            core: Of another policy, on the same model.
            digest: Of this policy.

        Raises:
            StorageError: The checkpoint cannot be read back, or holds another model.
            Exception: A method cannot take over its state. What runs goes on, so nothing need start afresh.
        """
        assert self.saved_step is not None
        assert self.saved_step == self.sequence
        loaded = load_folder(LocalDisk(), self.store.directory / name_of(self.saved_step))
        self._fits(loaded, core)
        self._apply(loaded, core, strict=True)
        core.freeze.thaw()
        self._digest = digest

    def append(self, entry: Entry) -> None:
        """Write an entry into the journal; what it is about may be done once this returns.

        While the disk is full or fails, this waits and tries again: nothing is applied that is not journaled.

        Raises:
            StorageError: It has not worked for longer than the patience, or checkpoints have not, or `stopping` is
                set meanwhile.
            JournalError: The journal is closed, or the entry is not the next one.
        """
        if self._failing_since is not None:
            self._be_patient("no checkpoint could be written")
        for attempt in count():
            try:
                self.journal.append(entry)
            except JournalUnavailableError as error:
                if not self.trouble:
                    log.error("journal_unavailable", error=str(error))
                self.trouble = str(error)
                self._be_patient(str(error))
                if self.stopping.wait(BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)]):
                    raise StorageError(f"{error}; nothing is lost, the next start goes on from there") from error
            else:
                break
        if self.trouble:
            self.trouble, self._failing_since = "", None
            log.info("journal_available")

    def _be_patient(self, problem: str) -> None:
        """Note since when nothing durable can be written, and end that when it has lasted too long."""
        now = self._clock.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since > self._patience:
            raise StorageError(
                f"{problem} for {now - self._failing_since:.0f} s, which is more than checkpoint.patience; nothing is"
                f" lost. Look after the disk of {self.store.directory} and start again"
            )

    def check(self, identities: Mapping[str, str]) -> None:
        """Compare streams as they were found with those that the state was made on, and remember them.

        Raises:
            StreamError: One was made anew meanwhile, so that positions mean nothing in it.
        """
        for name, identity in identities.items():
            before = self.identities.get(name, identity)
            if before != identity:
                raise StreamError(
                    f"{name} was made anew since the last checkpoint: it was {before} and is {identity} now, so the"
                    " positions in the state mean other records. Bring the old one back, or start anew with --fresh,"
                    " which keeps what is there in a folder aside-N"
                )
        self.identities.update(identities)

    def snapshot(self, core: Core, positions: Positions, membership: Mapping[str, Any] | None = None) -> Snapshot:
        """Copy the state of this instant, which lies between two batches, and begin a new segment of the journal."""
        states: dict[str, State] = {
            "model": core.host.live.state_dict(),
            "release": core.host.release,
            "optimizer": _optimizer(core),
            "policy": {
                "methods": core.methods.state_dict(),
                "audit": core.audit.state_dict(),
                "core": core.state_dict(),
                "random": _random(),
            },
        }
        parts, trees = copy_states(states)
        meta: dict[str, Any] = {
            "positions": [[*partition, offset] for partition, offset in sorted(positions.items())],
            "states": trees,
            "form": _form(core),
            "release": core.release,
            "model_step": core.step,
            "alpha": core.alpha,
            "events": core.counts["events"],
            "identities": dict(self.identities),
            "membership": dict(membership or {}),
        }
        joins = core.joins.snapshot()
        parts["join.bin"] = partial(joins.write, pause=self.hurry.pause)
        failpoint("snapshot")
        try:
            self.journal.start(self.sequence)
        except JournalUnavailableError as error:
            joins.close()
            return Snapshot(self.sequence, {}, {}, error)
        return Snapshot(self.sequence, parts, meta)

    def write(self, snapshot: Snapshot) -> Saved:
        """Write a snapshot as a checkpoint, then drop what no kept checkpoint needs. Runs on any one thread.

        Raises:
            StorageError: It could not be written; the ones before it still stand.
        """
        try:
            saved = self._save(snapshot)
        except StorageError:
            if self._failing_since is None:
                self._failing_since = self._clock.monotonic()
            raise
        self._failing_since = None
        failpoint("checkpoint.saved")
        self.saved_step = snapshot.step
        oldest = self.store.oldest_kept()
        if oldest is not None:
            self.journal.drop_before(oldest)
        return saved

    def _save(self, snapshot: Snapshot) -> Saved:
        if snapshot.problem is not None:
            raise StorageError(f"checkpoint {snapshot.step} was not saved: {snapshot.problem}") from snapshot.problem
        return self.store.save(
            snapshot.step, snapshot.parts, snapshot.meta, config_digest=self._digest, parent=self.saved_step
        )


def _form(core: Core) -> dict[str, Any]:
    """What rows that wait in a state must agree with, by the key of the policy."""
    inputs = core.host.inputs
    return {
        "model.inputs.shape": list(inputs.shape),
        "model.inputs.dtype": inputs.dtype.name,
        "model.inputs.layout": "hwc" if inputs.channels_last else "chw",
    }


def _to(value: Any, device: torch.device) -> Any:
    """The same nesting with floating tensors on ``device``; float64 and integers stay on the CPU, as do times."""
    if device.type == "cpu":
        return value
    if isinstance(value, Tensor):
        return value.to(device) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return [_to(item, device) for item in value] if isinstance(value, list) else value


def _optimizer(core: Core) -> State:
    """The optimizer's state by parameter name."""
    names: dict[Any, str] = {parameter: name for name, parameter in core.host.learner.named_parameters()}
    kept = core.learner.optimizer.state.items()
    return {"kind": type(core.learner.optimizer).__name__, "state": {names[p]: dict(state) for p, state in kept}}


def _load_optimizer(core: Core, state: State) -> None:
    own = dict(core.host.learner.named_parameters())
    optimizer = core.learner.optimizer
    optimizer.state.clear()
    if state["kind"] != type(optimizer).__name__:
        log.warning("optimizer_state_not_used", was=state["kind"], now=type(optimizer).__name__)
        return
    for name, values in state["state"].items():
        if "step" in values and isinstance(values["step"], Tensor):
            values["step"] = values["step"].cpu()  # where PyTorch keeps it
        if name in own:
            core.learner.optimizer.state[own[name]] = values


def seed_generators(seed: int) -> None:
    """Seed the global generators, so that a model that draws from them does the same in every run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def same_generators() -> Iterator[None]:
    """Leave the global generators as they were, whatever is drawn from them inside."""
    state = _random()
    try:
        yield
    finally:
        _set_random(state)


def _random() -> State:
    """State of the global generators, for models that draw from them."""
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, place, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {"kind": kind, "keys": torch.from_numpy(keys.astype(np.int64)), "rest": [place, has_gauss, gauss]},
        "python": {"version": version, "internal": torch.tensor(internal, dtype=torch.int64), "gauss": gauss_next},
    }


def _set_random(state: State) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy, python = state["numpy"], state["python"]
    place, has_gauss, gauss = numpy["rest"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, place, has_gauss, gauss))
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
