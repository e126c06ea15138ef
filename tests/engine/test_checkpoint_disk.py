from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.checkpoint import CheckpointStore, LocalDisk
from engine.checkpoint.disk import remove_tree


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inodes in the order in which they were synced."""
    inodes: list[int] = []
    original = os.fsync

    def fsync(handle: int) -> None:
        inodes.append(os.fstat(handle).st_ino)
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return inodes


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_save_syncs_files_then_their_folder_then_the_directory(tmp_path: Path, synced: list[int]) -> None:
    with CheckpointStore(tmp_path) as store:
        saved = store.save(1, {"a.bin": lambda file: file.write(b"a")}, {}, config_digest="", parent=None)
    files = [saved.path / name for name in ("a.bin", "meta.json", "MANIFEST")]
    hint = tmp_path / "CURRENT"
    assert synced == [inode(path) for path in (*files, saved.path, tmp_path, hint, tmp_path)]


def test_the_names_of_new_state_directories_are_synced(tmp_path: Path, synced: list[int]) -> None:
    with CheckpointStore(tmp_path / "a" / "b"):
        assert synced == [inode(tmp_path), inode(tmp_path / "a")]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    disk = LocalDisk()
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with disk.open(tmp_path / "file") as file:
        assert file.read() == b"x"
    for name in ("link", "fifo", "folder"):
        with pytest.raises(OSError, match=r"symbolic links|not a regular file"):
            disk.open(tmp_path / name)
    kinds = {name: disk.kind(tmp_path / name) for name in ("file", "link", "fifo", "folder", "nothing")}
    assert kinds == {"file": "file", "link": "link", "fifo": "other", "folder": "directory", "nothing": None}


def test_creating_never_touches_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            LocalDisk().create(tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"x"
    assert not (tmp_path / "new").exists()


def test_removing_a_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "tree" / "below").mkdir(parents=True)
    (tmp_path / "tree" / "below" / "link").symlink_to(tmp_path / "kept")
    remove_tree(LocalDisk(), tmp_path / "tree")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


def test_the_room_on_a_disk_is_a_number_of_bytes(tmp_path: Path) -> None:
    assert LocalDisk().free_bytes(tmp_path) > 0
