"""The store: saves checkpoints so that each exists entirely or not at all, keeps a few, and loads the newest good one.

The state directory holds::

    LOCK                  held by the process that uses it; names it
    ckpt-000000000042/    model.safetensors ... meta.json MANIFEST
    CURRENT               name of the newest checkpoint, for people; nothing relies on it
    pin-000000000042      keeps a checkpoint for good
    broken/               the last few checkpoints that were passed over, each with its reason
    .tmp-*  .trash-*      unfinished saves and deletions, swept at the next start

Anything else in it (the journal) is left alone. Why each step is there: `docs/decisions/0001-atomic-checkpoints.md`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from engine import __version__
from engine.checkpoint.disk import Disk, LocalDisk, remove_tree
from engine.checkpoint.errors import BadCheckpointError, NoSpaceError, NoValidCheckpointError, SaveInProgressError
from engine.checkpoint.folder import (
    Fallback,
    Info,
    Loaded,
    Part,
    Saved,
    files_of,
    load_folder,
    name_of,
    read_manifest,
    verify_folder,
    write_folder,
)
from engine.checkpoint.layout import BROKEN, Layout
from engine.checkpoint.manifest import FileEntry, Manifest
from engine.checkpoint.quarantine import Quarantine
from engine.checkpoint.strict import Json
from engine.errors import StorageError
from streams.seams import CLOCK

RESERVE_BYTES = 64 << 20
"""Room that a save leaves on the disk by default."""


class CheckpointStore:
    """The checkpoints of one state directory.

    `list`, `verify`, `newest` and `oldest_kept` only read and need no lock; everything else needs `lock` first, or
    ``with store:``. `save` may run in a thread of its own while those are called; one save runs at a time.

    Args:
        directory: The state directory; `lock` creates it.
        keep: How many verified checkpoints are kept, at least 3.
        disk: The operations on files.
        reserve_bytes: Room that a save must leave on the disk, besides twice the size of the last checkpoint.
        clock: Wall clock in seconds since the epoch; only noted down.

    Raises:
        ValueError: If ``keep`` is below 3.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 3,
        disk: Disk | None = None,
        reserve_bytes: int = RESERVE_BYTES,
        clock: Callable[[], float] = CLOCK.time,
    ) -> None:
        if keep < 3:
            raise ValueError(f"keep must be at least 3, not {keep}")
        self.directory = directory
        self.keep = keep
        self._disk: Disk = LocalDisk() if disk is None else disk
        self._reserve = reserve_bytes
        self._clock = clock
        self._unlock: Callable[[], None] | None = None
        self._saving = threading.Lock()
        self._verified: set[int] = set()
        self._last_bytes = 0
        self._epoch = 1
        self.pause: Callable[[float], object] | None = None  # how a save rests while it reads back: `streams.pace`
        self.covered: Any = []
        """The positions in the newest checkpoint that was saved or loaded, as its meta has them."""
        self._layout = Layout(self._disk, directory)
        self._quarantine = Quarantine(self._disk, directory / BROKEN)

    def lock(self) -> None:
        """Create the directory if need be and take it for this process.

        Raises:
            StateLockedError: Another process has it.
            StorageError: The directory must not or cannot be used.
        """
        if self._unlock is None:
            self._unlock = self._disk.lock(self.directory)

    def close(self) -> None:
        """Give the directory back, after a save that is running. Safe to call twice."""
        with self._saving:
            unlock, self._unlock = self._unlock, None
        if unlock is not None:
            unlock()

    def __enter__(self) -> Self:
        self.lock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def epoch(self) -> int:
        """How many times a daemon has started on the directory; known after `load`."""
        return self._epoch

    def sweep(self) -> int:
        """Remove what unfinished saves and deletions have left; return how many. To be called before the first save.

        Raises:
            StorageError: Something could not be removed.
        """
        self._require_lock()
        with self._storage("leftovers cannot be removed"):
            return self._layout.sweep(everything=True)

    def save(
        self, step: int, parts: Mapping[str, Part], meta: Mapping[str, Json], *, config_digest: str, parent: int | None
    ) -> Saved:
        """Save one checkpoint; once this returns, no crash loses it.

        1. Look at the room on the disk, and clear leftovers of a save that failed.
        2. Write all files and the manifest into a temporary folder, each synced, then the folder.
        3. Rename the folder and sync the directory: the commit point.
        4. Read everything back and compare, before any elder may go.
        5. Update ``CURRENT``, delete what is beyond ``keep``.

        Args:
            step: Larger than that of every checkpoint there is.
            parts: What writes each file, by file name; see `snapshot`.
            meta: Everything else, as JSON: positions, and the ``states`` of `snapshot`.
            config_digest: Digest of the policy in force.
            parent: The step that this run was loaded from, if any.

        Raises:
            SaveInProgressError: Another save is running; this one was not queued.
            NoSpaceError: The disk is too full; nothing was written.
            StorageError: The disk failed. Earlier checkpoints are as they were, and a later save starts afresh.
            ValueError: A file name or ``meta`` is impossible; nothing was done.
        """
        self._require_lock()
        if not self._saving.acquire(blocking=False):
            raise SaveInProgressError(f"checkpoint {step} skipped: the one before it is still being written")
        started = time.perf_counter()
        try:
            with self._storage(f"checkpoint {step} was not saved, the ones before it still stand"):
                self._require_newest(step)
                files = files_of(parts, meta)
                self._make_room()
                manifest = self._publish(step, files, config_digest, parent)
            self.covered = meta.get("positions", [])
            problems = self._settle(step, manifest)
        finally:
            self._saving.release()
        return Saved(self._layout.folder(step), step, manifest.size, time.perf_counter() - started, problems)

    def load(self, check: Callable[[Loaded], None] = lambda loaded: None) -> Loaded | None:
        """Load the newest checkpoint that verifies and passes ``check``; None if there never was any.

        Ones that were passed over are moved to ``broken/``, but only once a good one is found: while there is none,
        everything stays where it is and the next start says the same.

        Args:
            check: Raises `BadCheckpointError` to refuse a checkpoint in favour of an older one. Whatever else it
                raises ends the loading with nothing changed (a model that does not fit the policy, say).

        Raises:
            NoValidCheckpointError: There are or were checkpoints, and none can be used.
            NewerFormatError: A later version wrote the newest one; nothing was changed.
            StorageError: The disk failed.
        """
        self._require_lock()
        fallbacks: list[Fallback] = []
        with self._storage("no checkpoint can be loaded"):
            steps = self._layout.steps()
            for step in steps:
                try:
                    loaded = load_folder(self._disk, self._layout.folder(step))
                    check(loaded)
                except BadCheckpointError as error:
                    fallbacks.append(Fallback(name_of(step), str(error)))
                    continue
                self._continue_from(loaded, steps, fallbacks)
                return replace(loaded, fallbacks=tuple(fallbacks))
            reasons = {fallback.name: fallback.reason for fallback in fallbacks} or self._quarantine.reasons()
        if reasons:
            raise NoValidCheckpointError(self.directory, reasons)
        return None

    def list(self) -> Sequence[Info]:
        """What the manifests say, newest first. Files are not verified; see `verify`.

        Raises:
            StorageError: The directory cannot be read.
        """
        with self._storage("checkpoints cannot be listed"):
            pins = self._layout.pins()
            return [self._info(step, step in pins) for step in self._layout.steps()]

    def verify(self, name: str) -> Info:
        """Read a whole checkpoint and compare it with its manifest.

        Raises:
            BadCheckpointError: It is damaged, or there is none of that name.
            NewerFormatError: A later version wrote it.
            StorageError: It could not be read.
        """
        step = name.removeprefix("ckpt-")
        if not (step.isascii() and step.isdigit()) or name_of(int(step)) != name:
            raise BadCheckpointError(f"{name!r} is not the name of a checkpoint; they look like {name_of(42)}")
        with self._storage(f"{name} cannot be read"):
            try:
                manifest = verify_folder(self._disk, self._layout.folder(int(step)))
            except BadCheckpointError as error:
                raise BadCheckpointError(f"checkpoint {self.directory / name} cannot be used: {error}") from error
            return Info(name, manifest.step, manifest.step in self._layout.pins(), manifest)

    def newest(self) -> int | None:
        """The step of the newest checkpoint there is, verified or not."""
        return max(self._layout.steps(), default=None)

    def oldest_kept(self) -> int | None:
        """The step of the oldest checkpoint there is: the journal is needed from there on."""
        return min(self._layout.steps(), default=None)

    def pin(self, step: int) -> None:
        """Keep a checkpoint for good.

        Raises:
            StorageError: There is no such checkpoint, or the disk failed.
        """
        self._require_lock()
        with self._storage(f"{name_of(step)} cannot be pinned"):
            if step not in self._layout.steps():
                raise StorageError(f"there is no checkpoint {name_of(step)} in {self.directory} to pin")
            self._layout.pin(step)

    def unpin(self, step: int) -> None:
        """Let a checkpoint go the way of the others. Nothing happens if it is not pinned.

        Raises:
            StorageError: The disk failed.
        """
        self._require_lock()
        with self._storage(f"{name_of(step)} cannot be unpinned"):
            self._layout.unpin(step)

    def set_aside(self) -> Path | None:
        """Move every checkpoint, good or bad, into a new folder ``aside-N``, so that `load` starts anew.

        Returns:
            The folder, or None if there was nothing to move.

        Raises:
            StorageError: The disk failed.
        """
        self._require_lock()
        with self._storage("checkpoints cannot be set aside"):
            return self._layout.set_aside()

    def _require_newest(self, step: int) -> None:
        if not 0 <= step < 10**12:
            raise ValueError(f"step {step} is not between 0 and 10**12")
        if (newest := self.newest()) is not None and step <= newest:
            raise StorageError(f"checkpoint {step} was not saved: {name_of(newest)} is there already")

    def _make_room(self) -> None:
        # What cannot be removed stays until the next start; whether there is room all the same is asked next.
        with suppress(OSError):
            self._layout.sweep(everything=False)
        free, needed = self._disk.free_bytes(self.directory), 2 * self._last_bytes + self._reserve
        if free < needed:
            raise NoSpaceError(
                f"{free >> 20} MB are free in {self.directory} and a checkpoint needs {needed >> 20}; free some space"
            )

    def _publish(self, step: int, files: Mapping[str, Part], config_digest: str, parent: int | None) -> Manifest:
        def finish(entries: dict[str, FileEntry]) -> Manifest:
            return Manifest(
                step=step,
                epoch=self._epoch,
                parent=parent,
                created=self._clock(),
                adaptd=__version__,
                torch=str(torch.__version__),
                config_digest=config_digest,
                files={**entries},
            )

        temporary, folder = self._layout.temporary(name_of(step)), self._layout.folder(step)
        try:
            manifest = write_folder(self._disk, temporary, files, finish)
            self._disk.rename(temporary, folder)
            self._disk.sync_dir(self.directory)
            verify_folder(self._disk, folder, self.pause)
        except BadCheckpointError as error:
            self._give_up(step, temporary)
            raise StorageError(f"checkpoint {step} in {self.directory} reads back damaged: {error}") from error
        except BaseException:
            self._give_up(step, temporary)
            raise
        return manifest

    def _give_up(self, step: int, temporary: Path) -> None:
        """Remove a save that failed, as far as possible; a sweep finishes the rest."""
        with suppress(OSError):
            if self._disk.kind(temporary) is not None:
                remove_tree(self._disk, temporary)
        # Renamed, but not known to be durable: nobody was told of it, and the next save may be one of the same step.
        with suppress(OSError):
            if self._disk.kind(self._layout.folder(step)) is not None:
                self._layout.discard(step)

    def _settle(self, step: int, manifest: Manifest) -> tuple[str, ...]:
        """What follows the commit point. Its failures are told, and undo nothing."""
        self._verified.add(step)
        self._last_bytes = manifest.size
        problems = []
        try:
            self._layout.point_at(step)
        except OSError as error:
            problems.append(f"CURRENT could not be updated: {error}")
        try:
            self._prune()
        except OSError as error:
            problems.append(f"old checkpoints could not be deleted: {error}")
        return tuple(problems)

    def _prune(self) -> None:
        """Delete what is older than the ``keep`` newest verified checkpoints and not pinned."""
        pins, kept = self._layout.pins(), 0
        for step in self._layout.steps():
            if kept < self.keep:
                kept += self._is_verified(step)
            elif step not in pins:
                self._layout.discard(step)
                self._verified.discard(step)

    def _is_verified(self, step: int) -> bool:
        """Whether a checkpoint was proven good by this process; those of an earlier one are read once."""
        if step not in self._verified:
            try:
                verify_folder(self._disk, self._layout.folder(step))
            except StorageError:
                return False
            self._verified.add(step)
        return True

    def _continue_from(self, loaded: Loaded, steps: Sequence[int], fallbacks: Sequence[Fallback]) -> None:
        epochs = [loaded.manifest.epoch]
        for step in steps:
            with suppress(StorageError, OSError):
                epochs.append(read_manifest(self._disk, self._layout.folder(step)).epoch)
        # The newest goes last, so that it is among the few that are kept. All of them must go: being newer, they would
        # outrank what this run will save.
        for fallback in reversed(fallbacks):
            self._quarantine.put(self.directory / fallback.name, fallback.reason)
        self._epoch = max(epochs) + 1
        self._verified, self.covered = {loaded.step}, loaded.meta.get("positions", [])
        self._last_bytes = loaded.manifest.size

    def _info(self, step: int, pinned: bool) -> Info:
        try:
            return Info(name_of(step), step, pinned, read_manifest(self._disk, self._layout.folder(step)))
        except StorageError as error:
            return Info(name_of(step), step, pinned, None, str(error))

    def _require_lock(self) -> None:
        if self._unlock is None:
            raise RuntimeError("the store must be locked first")

    @contextmanager
    def _storage(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{what} (state directory {self.directory}): {error}") from error
