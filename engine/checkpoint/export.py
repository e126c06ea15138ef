"""Weights out of a checkpoint, as a file that other programs read and that `model.weights` of a policy takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from torch import Tensor

from engine.checkpoint.disk import LocalDisk
from engine.checkpoint.errors import BadCheckpointError
from engine.checkpoint.folder import load_folder
from engine.checkpoint.store import CheckpointStore
from engine.checkpoint.tensors import write_tensors
from engine.errors import StorageError, UsageError

Which = Literal["release", "live"]

_STATES: Final = {"release": "release", "live": "model"}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        name: The checkpoint it was taken from.
        release: Number of the release then in force; 0 is the source model.
        step: Updates that the live weights had seen.
        tensors: How many there are.
    """

    name: str
    release: int
    step: int
    tensors: int


def export(store: CheckpointStore, name: str, which: Which, file: Path, *, force: bool = False) -> Exported:
    """Write the weights of a checkpoint as safetensors: the file is there as a whole or not at all.

    Every byte of the checkpoint is compared with its manifest first. A daemon may be running on the state directory.

    Args:
        store: The state directory; it need not be locked.
        name: The checkpoint.
        which: The release in force then, or the live weights, which are what answers.
        file: Where to write; its permissions are those that the umask leaves.
        force: Replace a file that is there.

    Raises:
        UsageError: The file is there already, or is a directory.
        BadCheckpointError: There is no such checkpoint, or it is damaged.
        StorageError: The file cannot be written, or the checkpoint not be read.
    """
    if file.is_dir():
        raise UsageError(f"{file} is a directory; name a file in it, {file / 'model.safetensors'}")
    if file.exists() and not force:
        raise UsageError(f"{file} exists and is left as it is; choose another name, or replace it with --force")
    store.verify(name)
    try:
        loaded = load_folder(LocalDisk(), store.directory / name)
        weights = loaded.state(_STATES[which])
    except OSError as error:
        raise StorageError(f"{store.directory / name} cannot be read: {error.strerror}") from error
    _write(file, _finite(weights, name))
    return Exported(name, int(loaded.meta.get("release", 0)), int(loaded.meta.get("model_step", 0)), len(weights))


def _finite(weights: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Refuse weights that a daemon would not start from either."""
    for tensor_name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadCheckpointError(f"{name}: {tensor_name} holds values that are not finite; name an older one")
    return weights


def _write(file: Path, weights: dict[str, Tensor]) -> None:
    part = file.with_name(f".{file.name}.part-{os.getpid()}")
    try:
        try:
            with part.open("xb") as opened:
                write_tensors(opened, weights)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror}; choose another place") from error
