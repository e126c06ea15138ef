"""Every state that a crash may leave behind, at every operation of saving, deleting and falling back."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from engine.checkpoint import BadCheckpointError, CheckpointStore, Loaded
from engine.checkpoint.disk import remove_tree
from engine.checkpoint.layout import Layout
from engine.errors import StorageError
from tests.crash.enumerator import MemoryDisk, Tree, freeze

ROOT = Path("/state")


def part(step: int) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        file.write(f"weights of {step}: ".encode())
        file.write(bytes(range(1, 40)))

    return write


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, {"model.safetensors": part(step)}, {"step": step}, config_digest="c", parent=None)


def whole(loaded: Loaded) -> None:
    """The oracle: the content is that of the step, whatever the manifest says."""
    expected = f"weights of {loaded.step}: ".encode() + bytes(range(1, 40))
    with loaded.open("model.safetensors") as file:
        assert file.read() == expected, "a damaged checkpoint was accepted"
    assert loaded.meta == {"step": loaded.step}


def store_with(steps: range, disk: MemoryDisk) -> CheckpointStore:
    store = CheckpointStore(ROOT, disk=disk)
    store.lock()
    for step in steps:
        save(store, step)
    return store


def states_during(disk: MemoryDisk, act: Callable[[], None]) -> Iterator[tuple[int, Tree]]:
    """Distinct crash states before each operation of ``act`` and after the last, with how many operations were done."""
    found: dict[object, tuple[int, Tree]] = {}
    count = 0

    def look(operation: str) -> None:
        nonlocal count
        for tree in disk.crash_states():
            found.setdefault(freeze(tree), (count, tree))
        count += 1

    disk.watch = look
    act()
    look("end")
    yield from found.values()


def recover(tree: Tree) -> int | None:
    """What a new process makes of a state: it sweeps, loads, saves the next step, and that is then the newest."""
    disk = MemoryDisk(ROOT, tree)
    store = CheckpointStore(ROOT, disk=disk)
    store.lock()
    store.sweep()
    assert not [name for name in disk.listdir(ROOT) if name.startswith((".tmp-", ".trash-"))]
    loaded = store.load(whole)
    save(store, 100)
    again = CheckpointStore(ROOT, disk=disk)
    again.lock()
    newest = again.load(whole)
    assert newest is not None
    assert newest.step == 100
    assert newest.fallbacks == ()
    return None if loaded is None else loaded.step


def published(tree: Tree) -> None:
    """No folder that looks like a checkpoint is anything less than one."""
    store = CheckpointStore(ROOT, disk=MemoryDisk(ROOT, tree))
    for info in store.list():
        store.verify(info.name)


def bad_states(
    disk: MemoryDisk, act: Callable[[], None], acknowledged: int | None, coming: int, *, damaged: bool = False
) -> Iterator[str]:
    for count, tree in states_during(disk, act):
        try:
            if not damaged:
                published(tree)
            step = recover(tree)
        except (AssertionError, StorageError) as error:
            yield f"after {count} operations: {error}"
        else:
            if step not in (acknowledged, coming):
                yield f"after {count} operations: recovered {step}"


def durable(disk: MemoryDisk) -> Iterator[int | None]:
    """What is recovered from each state that a crash may leave now, when nothing is under way."""
    for tree in disk.crash_states():
        try:
            yield recover(tree)
        except (AssertionError, StorageError):
            yield -1


def test_a_crash_while_saving_and_deleting_loses_nothing_acknowledged() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 5), disk)  # three are kept: the next save deletes one
    assert list(bad_states(disk, lambda: save(store, 5), acknowledged=4, coming=5)) == []
    assert set(durable(disk)) == {5}


def test_a_crash_during_the_first_save_starts_anew_or_finds_it_whole() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(0), disk)
    assert list(bad_states(disk, lambda: save(store, 1), acknowledged=None, coming=1)) == []
    assert set(durable(disk)) == {1}


def test_the_states_are_many_and_only_the_commit_point_moves_on() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 5), disk)
    recovered = [recover(tree) for _, tree in states_during(disk, lambda: save(store, 5))]
    assert len(recovered) > 100
    assert {4, 5} == set(recovered)


def test_a_crash_while_falling_back_finds_the_same_older_checkpoint() -> None:
    disk = MemoryDisk(ROOT)
    store_with(range(1, 4), disk)
    damage(disk, 3)
    damage(disk, 2)

    def fall_back() -> None:
        store = CheckpointStore(ROOT, disk=disk)
        store.lock()
        assert store.load(whole) is not None

    assert list(bad_states(disk, fall_back, acknowledged=1, coming=1, damaged=True)) == []


def test_after_falling_back_the_evidence_is_durable() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 3), disk)
    damage(disk, 2)
    store.load(whole)
    for tree in disk.crash_states():
        evidence = CheckpointStore(ROOT, disk=MemoryDisk(ROOT, tree))._quarantine.reasons()
        assert list(evidence) == ["broken/0001-ckpt-000000000002"]
        assert "model.safetensors is damaged" in evidence["broken/0001-ckpt-000000000002"]


def test_a_crash_while_setting_aside_never_shows_a_torn_checkpoint() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 4), disk)
    found = [recover(tree) for _, tree in states_during(disk, lambda: cast("None", store.set_aside()))]
    assert set(found) <= {None, 1, 2, 3}


@pytest.mark.parametrize("skipped", range(3), ids=["model", "meta", "manifest"])
def test_without_one_fsync_of_a_file_the_enumeration_finds_a_loss(skipped: int) -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 2), disk)
    skip(disk, "fsync", skipped)
    save(store, 2)
    assert set(durable(disk)) != {2}


@pytest.mark.parametrize(("skipped", "expected"), [(None, {2}), (0, {1, 2}), (1, {1, 2})])
def test_the_syncs_of_both_directories_make_a_save_durable_even_if_the_hint_fails(
    skipped: int | None, expected: set[int]
) -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 2), disk)
    refuse(disk, "CURRENT")
    if skipped is not None:
        skip(disk, "sync_dir", skipped)
    saved = store.save(2, {"model.safetensors": part(2)}, {"step": 2}, config_digest="c", parent=None)
    assert "CURRENT could not be updated" in saved.problems[0]
    assert set(durable(disk)) == expected


def test_without_the_sync_after_renaming_to_trash_the_enumeration_finds_a_half_deleted_checkpoint() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 5), disk)
    skip(disk, "sync_dir", 3)  # after the temporary folder, the state directory and the hint
    assert any("is missing" in problem for problem in bad_states(disk, lambda: save(store, 5), 4, 5))


def test_without_the_trash_the_enumeration_finds_a_half_deleted_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 5), disk)
    monkeypatch.setattr(Layout, "discard", lambda self, step: remove_tree(self.disk, self.folder(step)))
    assert any("is missing" in problem for problem in bad_states(disk, lambda: save(store, 5), 4, 5))


def test_without_hashes_the_enumeration_finds_garbage_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 2), disk)
    skip(disk, "fsync", 0)
    save(store, 2)
    monkeypatch.setattr("engine.checkpoint.folder._verify_file", lambda *_: None)
    assert -1 in set(durable(disk))


def test_a_save_that_reads_back_damaged_is_not_acknowledged_and_leaves_the_elder() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(1, 2), disk)

    def corrupt(operation: str) -> None:
        if operation == "rename":
            folder = next(name for name in disk.listdir(ROOT) if name.startswith(".tmp-ckpt-"))
            node = disk._find(ROOT / folder / "model.safetensors")
            node.written[3] ^= 1  # type: ignore[union-attr]
            disk.watch = lambda operation: None

    disk.watch = corrupt
    with pytest.raises(StorageError, match="reads back damaged"):
        save(store, 2)
    assert set(durable(disk)) == {1}
    save(store, 2)
    assert set(durable(disk)) == {2}


def damage(disk: MemoryDisk, step: int) -> None:
    node = disk._find(ROOT / f"ckpt-{step:012d}" / "model.safetensors")
    node.written[0] ^= 1  # type: ignore[union-attr]
    node.durable = bytes(node.written)  # type: ignore[union-attr]


def refuse(disk: MemoryDisk, word: str) -> None:
    """Let the creation of files with ``word`` in their name fail."""
    original = disk.create

    def create(path: Path) -> BinaryIO:
        if word in path.name:
            raise OSError(errno.EIO, "input/output error", str(path))
        return original(path)

    disk.create = create  # type: ignore[method-assign]


def skip(disk: MemoryDisk, operation: str, number: int) -> None:
    """Let the ``number``-th sync do nothing."""
    original = getattr(disk, operation)
    count = -1

    def sync(target: object) -> None:
        nonlocal count
        count += 1
        if count != number:
            original(target)

    setattr(disk, operation, sync)


def test_the_oracle_refuses_wrong_content() -> None:
    disk = MemoryDisk(ROOT)
    store = store_with(range(0), disk)
    store.save(1, {"model.safetensors": part(2)}, {"step": 1}, config_digest="c", parent=None)
    with pytest.raises(AssertionError, match="accepted"):
        store.load(whole)
    with pytest.raises(BadCheckpointError):
        store.verify("ckpt-000000000002")
