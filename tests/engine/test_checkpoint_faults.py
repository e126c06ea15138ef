"""A disk that fails at its n-th operation, for every n."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from engine.checkpoint import BadCheckpointError, CheckpointStore, Loaded
from engine.checkpoint.disk import Kind
from engine.errors import StorageError
from tests.crash.enumerator import MemoryDisk, MemoryFile, Tree, freeze

ROOT = Path("/state")
CONTENT = bytes(range(20))


class FailingDisk(MemoryDisk):
    """Asks ``watch`` before reading as well, and takes 200 bytes at a time."""

    def __init__(self, tree: Tree | None = None) -> None:
        super().__init__(ROOT, tree)
        self.most = 200

    def kind(self, path: Path) -> Kind | None:
        self.happens("kind")
        return super().kind(path)

    def listdir(self, path: Path) -> list[str]:
        self.happens("listdir")
        return super().listdir(path)

    def open(self, path: Path) -> BinaryIO:
        self.happens("open")
        return super().open(path)

    def free_bytes(self, path: Path) -> int:
        self.happens("free_bytes")
        return super().free_bytes(path)


def fail(disk: MemoryDisk, code: int, at: int, *, lasting: bool = False) -> list[str]:
    """Fail the operation number ``at`` (and all later ones); the list tells which operations there were."""
    operations: list[str] = []

    def watch(operation: str) -> None:
        operations.append(operation)
        if len(operations) - 1 == at or (lasting and len(operations) > at):
            raise OSError(code, os.strerror(code))

    disk.watch = watch
    return operations


def open_store(disk: MemoryDisk) -> CheckpointStore:
    store = CheckpointStore(ROOT, disk=disk)
    store.lock()
    return store


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, {"model.bin": lambda file: file.write(CONTENT)}, {"step": step}, config_digest="", parent=None)


def prepared() -> tuple[FailingDisk, CheckpointStore]:
    disk = FailingDisk()
    store = open_store(disk)
    for step in range(1, 5):
        save(store, step)
    return disk, store


def newest(disk: MemoryDisk) -> int | None:
    disk.watch = lambda operation: None
    store = open_store(disk)
    store.sweep()
    loaded = store.load(read)
    return None if loaded is None else loaded.step


def read(loaded: Loaded) -> None:
    with loaded.open("model.bin") as file:
        assert file.read() == CONTENT


def operations_of(act: Callable[[FailingDisk, CheckpointStore], None]) -> range:
    disk, store = prepared()
    operations = fail(disk, errno.EIO, at=1 << 30)
    act(disk, store)
    return range(len(operations))


SAVE = operations_of(lambda disk, store: save(store, 5))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_failing_save_leaves_the_one_before_and_the_next_one_works(code: int, lasting: bool) -> None:
    outcomes = set()
    for at in SAVE:
        disk, store = prepared()
        fail(disk, code, at, lasting=lasting)
        try:
            save(store, 5)
            outcomes.add(expected := 5)
        except StorageError:
            outcomes.add(expected := 4)
        disk.watch = lambda operation: None
        assert set(recoveries(disk)) <= {expected, 5}, f"operation {at}"
        with suppress(StorageError):  # the place may be taken where even clearing up failed
            save(store, 5)
        save(store, 6)
        assert newest(disk) == 6
    assert outcomes == {4, 5}


def recoveries(disk: MemoryDisk) -> Iterator[int | None]:
    """What is loaded after a crash now, for each of the states that it may leave."""
    seen = set()
    for tree in disk.crash_states():
        if (key := freeze(tree)) not in seen:
            seen.add(key)
            yield newest(FailingDisk(tree))


def test_a_single_failure_leaves_no_trace_and_the_same_step_can_be_saved_again() -> None:
    for at in SAVE:
        disk, store = prepared()
        fail(disk, errno.EIO, at)
        try:
            save(store, 5)
        except StorageError:
            disk.watch = lambda operation: None
            save(store, 5)
        assert newest(disk) == 5


def test_a_file_whose_sync_failed_is_never_synced_again() -> None:
    fsyncs = 0
    while True:
        disk, store = prepared()
        synced: list[MemoryFile] = []
        original = disk.fsync

        def fsync(
            file: BinaryIO,
            at: int = fsyncs,
            synced: list[MemoryFile] = synced,
            original: Callable[[BinaryIO], None] = original,
        ) -> None:
            synced.append(cast("MemoryFile", file))
            if len(synced) - 1 == at:
                raise OSError(errno.EIO, "input/output error")
            original(file)

        disk.fsync = fsync  # type: ignore[method-assign]
        with suppress(StorageError):
            save(store, 5)
            save(store, 6)
        assert len({id(file.node) for file in synced}) == len(synced)
        assert all(file.closed for file in synced)
        fsyncs += 1
        if fsyncs > len(synced):
            break
    assert fsyncs > 4


def test_a_failing_load_with_fallback_raises_or_loads_and_the_next_one_loads_the_same() -> None:
    def damaged() -> FailingDisk:
        disk, _ = prepared()
        node = disk._find(ROOT / "ckpt-000000000004" / "model.bin")
        node.written[0] ^= 1  # type: ignore[union-attr]
        return disk

    disk = damaged()
    operations = fail(disk, errno.EROFS, at=1 << 30)
    open_store(disk).load()
    for at in range(len(operations)):
        disk = damaged()
        fail(disk, errno.EROFS, at)
        try:
            loaded = open_store(disk).load()
            assert loaded is not None
            assert loaded.step == 3
        except BadCheckpointError:
            pytest.fail("nothing is wrong with the checkpoint")
        except StorageError:
            pass
        assert newest(disk) == 3


@pytest.mark.parametrize("act", ["sweep", "list", "pin", "unpin", "set_aside", "verify"])
def test_every_failure_of_the_disk_is_a_storage_error_that_names_the_directory(act: str) -> None:
    disk, store = prepared()
    store.pin(2)
    calls: dict[str, Callable[[], object]] = {
        "sweep": store.sweep,
        "list": store.list,
        "pin": lambda: store.pin(3),
        "unpin": lambda: store.unpin(2),
        "set_aside": store.set_aside,
        "verify": lambda: store.verify("ckpt-000000000003"),
    }
    fail(disk, errno.EACCES, at=0, lasting=True)
    with pytest.raises(StorageError, match=r"state directory /state.*Permission denied"):
        calls[act]()


def test_writes_that_take_a_few_bytes_at_a_time_are_completed() -> None:
    disk = FailingDisk()
    disk.most = 7
    save(open_store(disk), 1)
    assert newest(disk) == 1


def test_a_full_disk_is_named_in_the_message() -> None:
    disk, store = prepared()
    fail(disk, errno.ENOSPC, at=SAVE.start + 10)
    with pytest.raises(
        StorageError, match=r"checkpoint 5 was not saved, the ones before it still stand.*No space left"
    ):
        save(store, 5)


def test_the_memory_disk_fails_like_a_real_one(tmp_path: Path) -> None:
    disk = MemoryDisk(ROOT)
    disk.mkdir(ROOT / "a")
    with disk.create(ROOT / "a" / "x") as file:
        assert cast("io.RawIOBase", file).writable()
    with pytest.raises(FileExistsError):
        disk.create(ROOT / "a" / "x")
    with pytest.raises(FileNotFoundError):
        disk.open(ROOT / "b")
    with pytest.raises(NotADirectoryError):
        disk.listdir(ROOT / "a" / "x")
    disk.mkdir(ROOT / "b")
    with pytest.raises(OSError, match="not empty"):
        disk.rename(ROOT / "b", ROOT / "a")
