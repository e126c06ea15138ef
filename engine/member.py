"""The name under which the owner of a state directory joins a consumer group, the same in every life."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from engine.checkpoint.disk import Disk, LocalDisk
from engine.checkpoint.folder import write_file
from engine.checkpoint.layout import Layout
from engine.errors import StorageError

FILE = "member"
"""Its file in the state directory: 32 hexadecimal digits."""

_DIGITS = 32


def member_of(state: Path, disk: Disk | None = None) -> str:
    """Return the name, made where there is none yet; once this returns it survives a crash.

    The transactional id holds it too, so that a new life ends the transaction of the one before. It is therefore not
    replaced where checkpoints tell that there was one.

    Args:
        state: The state directory, locked.
        disk: What to keep it on.

    Raises:
        StorageError: It cannot be kept there, or the file is damaged.
    """
    disk = LocalDisk() if disk is None else disk
    file = state / FILE
    try:
        kept = _read(disk, file)
        if kept is None or not re.fullmatch(b"[0-9a-f]{%d}" % _DIGITS, kept):
            if kept is not None and Layout(disk, state).steps():
                raise StorageError(
                    f"{file} is damaged: the name that this state has in its group and in its transactions is lost, and"
                    " checkpoints show that it was in use. Put the file back from a backup; or make sure that no other"
                    " process works on this state or a copy of it, delete the file, and the next start takes a new name"
                )
            return _make(disk, file)
        disk.sync_dir(state)  # a life before this one may have ended between giving the file its name and this
    except OSError as error:
        raise StorageError(f"{file} cannot be used: {error.strerror}; check the state directory") from error
    return kept.decode()


def _read(disk: Disk, file: Path) -> bytes | None:
    if disk.kind(file) is None:
        return None
    with disk.open(file) as raw:
        return raw.read(_DIGITS + 2).removesuffix(b"\n")  # as an editor leaves it


def _make(disk: Disk, file: Path) -> str:
    name = uuid.uuid4().hex
    fresh = Layout(disk, file.parent).temporary(FILE)
    write_file(disk, fresh, lambda raw: raw.write(name.encode()))
    disk.rename(fresh, file)
    disk.sync_dir(file.parent)
    return name
