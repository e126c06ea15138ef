"""What lies where in a state directory, and the moves that must not leave half a checkpoint behind."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from engine.checkpoint.disk import Disk, remove_tree
from engine.checkpoint.folder import name_of, write_file

CURRENT = "CURRENT"
BROKEN = "broken"

_CHECKPOINT = re.compile(r"ckpt-([0-9]{12})")
_PIN = re.compile(r"pin-([0-9]{12})")
_LEFTOVER = re.compile(r"\.(tmp|trash)-.*", re.DOTALL)
_OWN_LEFTOVER = re.compile(r"\.(tmp|trash)-(ckpt-|CURRENT-).*", re.DOTALL)


class Layout:
    """Names in one state directory. Every method may raise `OSError`."""

    def __init__(self, disk: Disk, directory: Path) -> None:
        self.disk = disk
        self.directory = directory

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.directory / name_of(step)

    def temporary(self, name: str) -> Path:
        """A new name for something that will become ``name``."""
        return self.directory / f".tmp-{name}-{secrets.token_hex(4)}"

    def steps(self) -> list[int]:
        """Steps that have a folder, newest first; good or bad. None where there is no directory."""
        return sorted(self._numbers(_CHECKPOINT), reverse=True)

    def pins(self) -> set[int]:
        """Steps that are pinned."""
        return self._numbers(_PIN)

    def pin(self, step: int) -> None:
        """Make a pin, durably."""
        if step not in self.pins():
            write_file(self.disk, self._pin(step), lambda file: None)
        self.disk.sync_dir(self.directory)

    def unpin(self, step: int) -> None:
        """Remove a pin, if there is one."""
        if step in self.pins():
            self.disk.unlink(self._pin(step))
            self.disk.sync_dir(self.directory)

    def sweep(self, *, everything: bool) -> int:
        """Remove leftovers: of saves alone, or of everybody and pins of checkpoints that are gone; return how many."""
        pattern = _LEFTOVER if everything else _OWN_LEFTOVER
        names = [name for name in self.disk.listdir(self.directory) if pattern.fullmatch(name)]
        for name in names:
            remove_tree(self.disk, self.directory / name)
        if everything:
            for step in self.pins() - set(self.steps()):
                self.disk.unlink(self._pin(step))
        return len(names)

    def discard(self, step: int) -> None:
        """Delete the checkpoint of a step.

        It loses its name first, durably, and its files after that: a crash half way must not leave a folder that
        looks like a checkpoint and lacks files.
        """
        trash = self.directory / f".trash-{name_of(step)}-{secrets.token_hex(4)}"
        self.disk.rename(self.folder(step), trash)
        self.disk.sync_dir(self.directory)
        remove_tree(self.disk, trash)

    def point_at(self, step: int) -> None:
        """Write ``CURRENT``."""
        temporary = self.temporary(CURRENT)
        text = name_of(step).encode("ascii") + b"\n"
        write_file(self.disk, temporary, lambda file: file.write(text))
        self.disk.rename(temporary, self.directory / CURRENT)
        self.disk.sync_dir(self.directory)

    def set_aside(self) -> Path | None:
        """Move all checkpoints, pins and ``broken/`` into a new folder ``aside-N``; None if there are none."""
        present = set(self.disk.listdir(self.directory))
        old = [name for name in sorted(present) if _CHECKPOINT.fullmatch(name) or name == BROKEN]
        if not old:
            return None
        old += [name for name in present if _PIN.fullmatch(name) or name == CURRENT]
        number = next(n for n in range(1, len(present) + 2) if f"aside-{n}" not in present)
        aside = self.directory / f"aside-{number}"
        self.disk.mkdir(aside)
        for name in old:
            self.disk.rename(self.directory / name, aside / name)
        self.disk.sync_dir(aside)
        self.disk.sync_dir(self.directory)
        return aside

    def _pin(self, step: int) -> Path:
        return self.directory / f"pin-{step:012d}"

    def _numbers(self, pattern: re.Pattern[str]) -> set[int]:
        if self.disk.kind(self.directory) is None:
            return set()
        return {int(found[1]) for name in self.disk.listdir(self.directory) if (found := pattern.fullmatch(name))}
