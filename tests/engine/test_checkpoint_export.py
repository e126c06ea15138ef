from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.errors import BadCheckpointError
from engine.checkpoint.export import export
from engine.checkpoint.folder import name_of
from engine.checkpoint.state import snapshot
from engine.checkpoint.store import CheckpointStore
from engine.errors import StorageError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """A store whose live weights are not finite, and whose release is."""
    store = CheckpointStore(tmp_path / "state")
    states = {"model": {"w": torch.tensor([1.0, float("nan")])}, "release": {"w": torch.tensor([1.0, 2.0])}}
    parts, trees = snapshot(states)
    with store:
        store.save(7, parts, {"states": trees, "release": 3, "model_step": 40}, config_digest="0" * 64, parent=None)
    return store


def test_weights_that_are_not_finite_are_not_exported_but_a_release_beside_them_is(
    tmp_path: Path, store: CheckpointStore
) -> None:
    with pytest.raises(BadCheckpointError, match="w holds values that are not finite"):
        export(store, name_of(7), "live", tmp_path / "live")
    found = export(store, name_of(7), "release", tmp_path / "release")
    assert (found.release, found.step, found.tensors) == (3, 40, 1)
    assert load_file(tmp_path / "release")["w"].tolist() == [1.0, 2.0]
    assert {path.name for path in tmp_path.iterdir()} == {"state", "release"}


def test_a_disk_that_fails_half_way_leaves_the_old_file(
    tmp_path: Path, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    file = tmp_path / "release"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="release cannot be written: No space left on device; choose another place"):
        export(store, name_of(7), "release", file, force=True)
    assert file.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"state", "release"}
