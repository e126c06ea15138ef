"""What can go wrong with checkpoints, by what the caller can do about it."""

from __future__ import annotations

from pathlib import Path

from engine.errors import AdaptdError, LockedError, StorageError


class StateError(AdaptdError):
    """A state holds something that a checkpoint cannot keep; the message names the place inside the state."""


class StateLockedError(LockedError):
    """Another process holds the state directory.

    Attributes:
        directory: The state directory.
        pid: The process that holds it, where that is known.
    """

    def __init__(self, directory: Path, pid: int | None) -> None:
        self.directory = directory
        self.pid = pid
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(f"state directory {directory} is in use by {holder}; stop it or choose another `state`")


class BadCheckpointError(StorageError):
    """One checkpoint must not be used: damaged, incomplete, or refused by the caller's check."""


class NewerFormatError(StorageError):
    """A checkpoint was written in a format that this version cannot read. Nothing is wrong with the checkpoint."""


class NoValidCheckpointError(StorageError):
    """There are checkpoints, and none of them can be used.

    Attributes:
        directory: The state directory.
        reasons: What is wrong, by checkpoint name, newest first.
    """

    def __init__(self, directory: Path, reasons: dict[str, str]) -> None:
        self.directory = directory
        self.reasons = reasons
        found = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        super().__init__(
            f"no checkpoint in {directory} can be used, and starting anew would forget what was learnt:{found}\n"
            "Choose one:\n"
            f"  put a copy of {directory} from a backup in its place, and start again;\n"
            "  start again with the policy, model and version that wrote them, if those have changed;\n"
            "  start anew with --fresh, which keeps what is there in a folder aside-N."
        )


class SaveInProgressError(StorageError):
    """A save was asked for while another one runs. It was not queued: the next one covers more."""


class NoSpaceError(StorageError):
    """A save was refused beforehand because the disk has too little room for it."""
