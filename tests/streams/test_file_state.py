from __future__ import annotations

import os
from pathlib import Path

import pytest

from streams.file_state import FileState, PartitionState


def test_offsets_are_durable_before_they_take_the_place_of_the_old_ones_and_the_name_is_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str, bytes]] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("sync", path.name, path.read_bytes() if path.is_file() else b""))
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        done.append(("replace", target.name, path.read_bytes()))
        return replace(path, target)

    state = FileState(tmp_path)
    state.load()
    state.partitions["data", 0] = PartitionState("a.jsonl", committed=7)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    state.save()
    whole = (tmp_path / "offsets.json").read_bytes()
    assert done == [("sync", "offsets.tmp", whole), ("replace", "offsets.json", whole), ("sync", tmp_path.name, b"")]
    again = FileState(tmp_path)
    again.load()
    assert again.partitions == state.partitions
