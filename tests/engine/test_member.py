from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import pytest

from engine.checkpoint import CheckpointStore
from engine.errors import StorageError
from engine.member import member_of
from tests.crash.enumerator import MemoryDisk, Tree
from tests.engine.test_checkpoint_crash_states import ROOT, save, states_during, store_with


def test_a_state_directory_keeps_the_name_of_its_member(tmp_path: Path) -> None:
    name = member_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{32}", name)
    assert member_of(tmp_path) == name
    assert [path.name for path in tmp_path.iterdir()] == ["member"]


def test_a_name_that_cannot_be_read_or_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "member").mkdir()
    with pytest.raises(StorageError, match="member cannot be used: not a regular file; check the state directory"):
        member_of(tmp_path)
    with pytest.raises(StorageError, match="member cannot be used: No such file or directory"):
        member_of(tmp_path / "missing")


@pytest.mark.parametrize("content", ["", "0" * 31, "0" * 33, "0" * 31 + "\n", "G" * 32, "\0" * 32])
def test_a_damaged_name_is_replaced_only_where_there_are_no_checkpoints(tmp_path: Path, content: str) -> None:
    (tmp_path / "member").write_text(content)
    name = member_of(tmp_path)
    assert name != content
    assert member_of(tmp_path) == name
    with CheckpointStore(tmp_path, reserve_bytes=0) as store:
        save(store, 1)
    assert member_of(tmp_path) == name
    (tmp_path / "member").write_text(content)
    with pytest.raises(
        StorageError, match=r"member is damaged: .*no other process works on this state.*delete the file"
    ):
        member_of(tmp_path)
    assert (tmp_path / "member").read_text() == content
    (tmp_path / "member").unlink()
    assert member_of(tmp_path) not in (name, content)


def test_a_name_that_was_put_back_with_an_editor_is_taken(tmp_path: Path) -> None:
    (tmp_path / "member").write_text("0" * 32 + "\n")
    assert member_of(tmp_path) == "0" * 32


def begin(disk: MemoryDisk) -> None:
    """What a start does: it takes the name, and its work leads to a checkpoint."""
    member_of(ROOT, disk)
    save(store_with(range(0), disk), 1)


def life(tree: Tree) -> None:
    """In whatever a crash leaves, the name is whole, or there is none and nothing has been done under it."""
    disk = MemoryDisk(ROOT, tree)
    checkpoints = CheckpointStore(ROOT, disk=disk).list()
    kept = tree.get("member")
    assert kept is not None or not checkpoints
    name = member_of(ROOT, disk)
    assert kept is None or kept == name.encode()


def test_whatever_a_crash_leaves_the_name_is_whole_or_was_never_used() -> None:
    disk = MemoryDisk(ROOT)
    states = [tree for _, tree in states_during(disk, lambda: begin(disk))]
    assert any("member" not in tree for tree in states)
    for tree in states:
        life(tree)


def test_a_name_that_was_given_out_survives_every_crash() -> None:
    disk = MemoryDisk(ROOT)
    name = member_of(ROOT, disk)
    assert [tree["member"] for tree in disk.crash_states()] == [name.encode()]


def test_while_a_damaged_name_is_replaced_either_it_or_the_whole_new_one_is_there() -> None:
    disk = MemoryDisk(ROOT, {"member": b""})
    found = {tree["member"] for _, tree in states_during(disk, lambda: cast("None", member_of(ROOT, disk)))}
    assert found == {b"", member_of(ROOT, disk).encode()}


def test_a_name_whose_last_sync_did_not_happen_is_durable_once_the_next_life_has_it() -> None:
    disk = MemoryDisk(ROOT)
    sync, disk.sync_dir = disk.sync_dir, killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        member_of(ROOT, disk)
    assert any("member" not in tree for tree in disk.crash_states())
    disk.sync_dir = sync  # type: ignore[method-assign]
    name = member_of(ROOT, disk)
    assert [tree["member"] for tree in disk.crash_states()] == [name.encode()]


def killed(path: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("operation", ["fsync", "sync_dir"])
def test_without_one_of_its_syncs_a_crash_leaves_no_name(operation: str) -> None:
    disk = MemoryDisk(ROOT)
    setattr(disk, operation, lambda target: None)
    name = member_of(ROOT, disk)
    assert any(tree.get("member") != name.encode() for tree in disk.crash_states())
