"""Where checkpoints that were passed over go, so that somebody can find out what happened to them."""

from __future__ import annotations

import re
from pathlib import Path

from engine.checkpoint.disk import Disk, remove_tree
from engine.checkpoint.folder import write_file

KEEP = 2
"""How many are kept; they are as large as good ones."""

_NAME = re.compile(r"([0-9]{4,})-(ckpt-[0-9]{12})(\.reason)?")
_REASON_LIMIT = 4096


class Quarantine:
    """The folder ``broken/``: ``0007-ckpt-000000000042/`` and, beside it, ``0007-ckpt-000000000042.reason``."""

    def __init__(self, disk: Disk, root: Path) -> None:
        self._disk = disk
        self._root = root

    def put(self, folder: Path, reason: str) -> None:
        """Move ``folder`` here and note the reason; the oldest ones make room.

        Raises:
            OSError: From the disk; calling again is fine.
        """
        if self._disk.kind(self._root) is None:
            self._disk.mkdir(self._root)
        number = max(self._numbers(), default=0) + 1
        place = self._root / f"{number:04d}-{folder.name}"
        text = reason.encode("utf-8", "backslashreplace")[:_REASON_LIMIT] + b"\n"
        write_file(self._disk, place.with_name(place.name + ".reason"), lambda file: file.write(text))
        self._disk.rename(folder, place)
        self._disk.sync_dir(self._root)
        self._disk.sync_dir(self._root.parent)
        for old in sorted(self._numbers(), reverse=True)[KEEP:]:
            for name in self._names():
                if name.startswith(f"{old:04d}-"):
                    remove_tree(self._disk, self._root / name)

    def reasons(self) -> dict[str, str]:
        """Why each one is here, by its place."""
        return {f"broken/{name}": self._reason(name) for name in sorted(self._names()) if not name.endswith(".reason")}

    def _reason(self, name: str) -> str:
        path = self._root / f"{name}.reason"
        if self._disk.kind(path) != "file":
            return "set aside earlier"
        with self._disk.open(path) as file:
            return "set aside earlier: " + file.read(_REASON_LIMIT).decode("utf-8", "backslashreplace").strip()

    def _numbers(self) -> set[int]:
        return {int(name.partition("-")[0]) for name in self._names()}

    def _names(self) -> list[str]:
        if self._disk.kind(self._root) is None:
            return []
        return [name for name in self._disk.listdir(self._root) if _NAME.fullmatch(name)]
