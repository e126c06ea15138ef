"""Checkpoints: live weights, states and positions as one atomic, verified thing on disk.

`snapshot` copies states at the consistency point; `CheckpointStore` writes, keeps, verifies and loads them.
"""

from engine.checkpoint.disk import Disk, LocalDisk
from engine.checkpoint.errors import (
    BadCheckpointError,
    NewerFormatError,
    NoSpaceError,
    NoValidCheckpointError,
    SaveInProgressError,
    StateError,
    StateLockedError,
)
from engine.checkpoint.folder import Fallback, Info, Loaded, Part, Saved
from engine.checkpoint.state import flatten, snapshot, unflatten
from engine.checkpoint.store import CheckpointStore
from engine.checkpoint.tensors import read_tensors, write_tensors

__all__ = [
    "BadCheckpointError",
    "CheckpointStore",
    "Disk",
    "Fallback",
    "Info",
    "Loaded",
    "LocalDisk",
    "NewerFormatError",
    "NoSpaceError",
    "NoValidCheckpointError",
    "Part",
    "SaveInProgressError",
    "Saved",
    "StateError",
    "StateLockedError",
    "flatten",
    "read_tensors",
    "snapshot",
    "unflatten",
    "write_tensors",
]
