from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from blake3 import blake3

from engine import __version__
from engine.checkpoint import (
    BadCheckpointError,
    CheckpointStore,
    Loaded,
    LocalDisk,
    NewerFormatError,
    NoSpaceError,
    NoValidCheckpointError,
    SaveInProgressError,
    StateLockedError,
    snapshot,
)
from engine.checkpoint.folder import name_of
from engine.checkpoint.manifest import FORMAT, decode, digest
from engine.checkpoint.strict import Json
from engine.errors import StorageError
from policies.interfaces import State

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint-1"


class QuickDisk(LocalDisk):
    """Real files without waiting for the platter, which no test here can see."""

    def fsync(self, file: BinaryIO) -> None:
        file.fileno()

    def sync_dir(self, path: Path) -> None:
        assert path.is_dir()


OPENED: list[CheckpointStore] = []


def open_store(directory: Path, keep: int = 3) -> CheckpointStore:
    store = CheckpointStore(directory, keep=keep, disk=QuickDisk(), clock=lambda: 1000.0)
    OPENED.append(store)
    return store


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = open_store(tmp_path / "state")
    store.lock()
    return store


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        parts, trees = snapshot({"model": {"weight": torch.full((3,), float(step))}, "policy": {"count": step}})
        store.save(step, parts, {"states": trees, "positions": {"data-0": step * 10}}, config_digest="abc", parent=None)


def reopen(store: CheckpointStore) -> CheckpointStore:
    store.close()
    new = open_store(store.directory)
    new.lock()
    return new


def names(store: CheckpointStore) -> list[str]:
    return sorted(os.listdir(store.directory))


def folder(store: CheckpointStore, step: int) -> Path:
    return store.directory / name_of(step)


def test_an_empty_directory_gives_none(store: CheckpointStore) -> None:
    assert store.load() is None
    assert (store.newest(), store.oldest_kept(), store.list(), store.epoch) == (None, None, [], 1)


def test_what_was_saved_is_loaded(store: CheckpointStore) -> None:
    save(store, 7)
    loaded = reopen(store).load()
    assert loaded is not None
    assert (loaded.step, loaded.fallbacks) == (7, ())
    assert loaded.meta["positions"] == {"data-0": 70}
    assert loaded.state("model")["weight"].tolist() == [7, 7, 7]
    assert loaded.state("policy") == {"count": 7}
    manifest = loaded.manifest
    assert (manifest.config_digest, manifest.parent, manifest.created) == ("abc", None, 1000.0)
    assert (manifest.adaptd, manifest.torch, manifest.epoch) == (__version__, str(torch.__version__), 1)


def test_a_save_tells_where_and_how_much(store: CheckpointStore) -> None:
    saved = store.save(1, {"a.bin": lambda file: file.write(b"12345")}, {}, config_digest="", parent=None)
    assert (saved.path, saved.step, saved.bytes, saved.problems) == (folder(store, 1), 1, 5 + len("{}\n"), ())
    assert saved.seconds >= 0


def test_a_part_may_write_in_pieces_of_any_kind(store: CheckpointStore) -> None:
    def part(file: BinaryIO) -> None:
        assert file.tell() == 0
        file.write(b"")
        file.write(bytearray(b"ab"))
        file.write(array("h", [0, 1]))
        assert file.tell() == 6

    store.save(1, {"a.bin": part}, {}, config_digest="", parent=None)
    loaded = store.load()
    assert loaded is not None
    with loaded.open("a.bin") as file:
        assert file.read() == b"ab\x00\x00\x01\x00"


def test_files_are_open_to_their_owner_alone(store: CheckpointStore) -> None:
    save(store, 1)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder(store, 1).stat().st_mode) == 0o700
    files = [*folder(store, 1).iterdir(), store.directory / "CURRENT", store.directory / "LOCK"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_the_newest_three_are_kept_and_pinned_ones_besides(store: CheckpointStore) -> None:
    save(store, 1, 2)
    store.pin(1)
    save(store, 3, 4, 5)
    assert [info.step for info in store.list()] == [5, 4, 3, 1]
    assert [info.pinned for info in store.list()] == [False, False, False, True]
    assert store.oldest_kept() == 1
    store.unpin(1)
    store.unpin(1)
    save(store, 6)
    assert names(store) == ["CURRENT", "LOCK", name_of(4), name_of(5), name_of(6)]
    assert (store.directory / "CURRENT").read_text() == name_of(6) + "\n"


def test_pinning_twice_is_fine_and_pinning_nothing_is_not(store: CheckpointStore) -> None:
    save(store, 1)
    store.pin(1)
    store.pin(1)
    with pytest.raises(StorageError, match="no checkpoint ckpt-000000000009"):
        store.pin(9)


def test_elders_are_only_counted_as_kept_once_they_verify(store: CheckpointStore) -> None:
    save(store, 1, 2, 3)
    flip(folder(store, 2) / "model.safetensors")
    store = reopen(store)
    store.load()
    save(store, 4)
    assert [info.step for info in store.list()] == [4, 3, 2, 1]
    save(store, 5)
    assert [info.step for info in store.list()] == [5, 4, 3]


def test_fewer_than_three_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        open_store(tmp_path, keep=2)


def test_steps_only_grow(store: CheckpointStore) -> None:
    save(store, 5)
    for step in (5, 4):
        with pytest.raises(StorageError, match="ckpt-000000000005 is there already"):
            save(store, step)
    assert names(store) == ["CURRENT", "LOCK", name_of(5)]


@pytest.mark.parametrize("step", [-1, 10**12])
def test_a_step_that_has_no_name_is_refused(store: CheckpointStore, step: int) -> None:
    with pytest.raises(ValueError, match="is not between"):
        save(store, step)


@pytest.mark.parametrize(
    "name", ["../a.bin", "a/b.bin", ".hidden", "MANIFEST", "meta.json", "", "a", "A.bin", "a.bin\n", "a b.c"]
)
def test_a_file_name_that_could_lead_elsewhere_is_refused(store: CheckpointStore, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file of a checkpoint"):
        store.save(1, {name: lambda file: None}, {}, config_digest="", parent=None)
    assert names(store) == ["LOCK"]


def test_meta_that_is_not_strict_json_is_refused_before_anything_is_written(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save(1, {}, {"a": float("nan")}, config_digest="", parent=None)
    assert names(store) == ["LOCK"]


def test_a_part_that_raises_leaves_nothing_behind(store: CheckpointStore) -> None:
    def part(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("a mistake in a method")

    with pytest.raises(KeyError):
        store.save(1, {"a.bin": part}, {}, config_digest="", parent=None)
    assert names(store) == ["LOCK"]
    save(store, 1)


def test_a_second_save_is_refused_while_one_runs(store: CheckpointStore) -> None:
    started, go = threading.Event(), threading.Event()

    def part(file: BinaryIO) -> None:
        started.set()
        assert go.wait(30)

    thread = threading.Thread(
        target=store.save, args=(1, {"a.bin": part}, {}), kwargs={"config_digest": "", "parent": None}
    )
    thread.start()
    try:
        assert started.wait(30)
        with pytest.raises(SaveInProgressError, match="checkpoint 2 skipped"):
            save(store, 2)
    finally:
        go.set()
        thread.join()
    assert store.newest() == 1
    save(store, 2)


def test_closing_waits_for_the_save_that_runs(store: CheckpointStore) -> None:
    started, go = threading.Event(), threading.Event()

    def part(file: BinaryIO) -> None:
        started.set()
        assert go.wait(30)

    saving = threading.Thread(
        target=store.save, args=(1, {"a.bin": part}, {}), kwargs={"config_digest": "", "parent": None}
    )
    closing = threading.Thread(target=store.close)
    saving.start()
    try:
        assert started.wait(30)
        closing.start()
        with pytest.raises(StateLockedError):
            open_store(store.directory).lock()
    finally:
        go.set()
        saving.join()
        closing.join()
    with open_store(store.directory) as other:
        assert other.newest() == 1


def test_a_save_is_refused_when_the_disk_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = QuickDisk()
    store = CheckpointStore(tmp_path / "state", disk=disk, reserve_bytes=1000)
    OPENED.append(store)
    store.lock()
    save(store, 1)
    size = sum(path.stat().st_size for path in folder(store, 1).iterdir() if path.name != "MANIFEST")
    for free, fits in [(2 * size + 999, False), (2 * size + 1000, True)]:
        monkeypatch.setattr(disk, "free_bytes", lambda path, free=free: free)
        if fits:
            save(store, 2)
        else:
            with pytest.raises(NoSpaceError, match="0 MB are free in"):
                save(store, 2)


def test_leftovers_are_swept_and_what_belongs_to_others_is_left_alone(store: CheckpointStore) -> None:
    save(store, 1)
    for name in (".tmp-ckpt-000000000002-ab/x", ".trash-ckpt-000000000000-cd/y/z", "other/x", "pin-000000000009"):
        (store.directory / name).parent.mkdir(parents=True, exist_ok=True)
        (store.directory / name).touch()
    for name in (".tmp-CURRENT-ab", "journal-0001.log", "pin-000000000001"):
        (store.directory / name).touch()
    (store.directory / ".tmp-link").symlink_to(store.directory / "other")
    assert store.sweep() == 4
    assert names(store) == ["CURRENT", "LOCK", name_of(1), "journal-0001.log", "other", "pin-000000000001"]
    assert (store.directory / "other" / "x").exists()


def test_a_save_clears_what_an_earlier_one_could_not(store: CheckpointStore) -> None:
    (store.directory / ".tmp-ckpt-000000000002-ab").mkdir()
    (store.directory / ".tmp-journal").touch()
    save(store, 1)
    assert names(store) == [".tmp-journal", "CURRENT", "LOCK", name_of(1)]


def test_the_hint_is_not_trusted(store: CheckpointStore) -> None:
    save(store, 1, 2)
    (store.directory / "CURRENT").write_text(name_of(1))
    loaded = reopen(store).load()
    assert loaded is not None
    assert loaded.step == 2


def test_names_that_only_resemble_checkpoints_are_ignored(store: CheckpointStore) -> None:
    save(store, 1)
    for name in ("ckpt-2", "ckpt-000000000002.bak", "xckpt-000000000003", "ckpt-٠٠٠٠٠٠٠٠٠٠٠٤", "ckpt-000000000005\n"):
        (store.directory / name).mkdir()
    loaded = store.load()
    assert loaded is not None
    assert (loaded.step, loaded.fallbacks) == (1, ())


def test_each_start_has_an_epoch_of_its_own(store: CheckpointStore) -> None:
    for epoch in (1, 2, 3):
        save(store, epoch)
        store = reopen(store)
        loaded = store.load()
        assert loaded is not None
        assert (loaded.manifest.epoch, store.epoch) == (epoch, epoch + 1)
    flip(folder(store, 3) / "meta.json")
    store = reopen(store)
    store.load()
    assert store.epoch == 4


def test_the_store_must_be_locked_for_what_changes_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "state")
    for act in (store.sweep, store.load, store.set_aside, lambda: save(store, 1), lambda: store.pin(1)):
        with pytest.raises(RuntimeError, match="locked"):
            act()
    assert store.list() == []
    assert not (tmp_path / "state").exists()


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def change_manifest(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Forge: a changed body with a hash that fits."""
    body = json.loads(path.read_bytes().partition(b"\n")[0])
    change(body)
    forge(path, json.dumps(body).encode() + b"\n")


def forge(path: Path, body: bytes) -> None:
    path.write_bytes(body + digest(body).encode() + b"\n")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap(newest: Path, name: str) -> None:
    """Exchange a file with that of the elder."""
    elder = newest.parent / name_of(1) / name
    held = elder.read_bytes()
    elder.write_bytes((newest / name).read_bytes())
    (newest / name).write_bytes(held)
    shutil.copytree(newest.parent / "good", newest.parent / name_of(1), dirs_exist_ok=True)


def escape(body: dict[str, object]) -> None:
    files = body["files"]
    assert isinstance(files, dict)
    files["../../outside"] = files.pop("meta.json")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "length of the header": (lambda f: flip(f / "model.safetensors", 0), "model.safetensors is damaged"),
    "header": (lambda f: flip(f / "model.safetensors", 12), "model.safetensors is damaged"),
    "body": (lambda f: flip(f / "model.safetensors"), "model.safetensors is damaged"),
    "meta": (lambda f: flip(f / "meta.json", 5), "meta.json is damaged"),
    "manifest body": (lambda f: flip(f / "MANIFEST", 30), "own hash"),
    "manifest hash": (lambda f: flip(f / "MANIFEST", -3), "own hash"),
    "manifest end": (lambda f: flip(f / "MANIFEST"), "own hash"),
    "empty manifest": (lambda f: os.truncate(f / "MANIFEST", 0), "own hash"),
    "truncated tensors": (lambda f: truncate(f / "model.safetensors"), "safetensors has"),
    "truncated meta": (lambda f: truncate(f / "meta.json"), "meta.json has"),
    "truncated manifest": (lambda f: truncate(f / "MANIFEST"), "own hash"),
    "longer file": (lambda f: longer(f / "meta.json"), "meta.json has"),
    "longer manifest": (lambda f: longer(f / "MANIFEST"), "own hash"),
    "endless manifest": (lambda f: os.truncate(f / "MANIFEST", 2 << 20), "MANIFEST is longer"),
    "missing tensors": (lambda f: (f / "policy.safetensors").unlink(), "'policy.safetensors' is missing"),
    "missing manifest": (lambda f: (f / "MANIFEST").unlink(), "MANIFEST is missing"),
    "extra file": (lambda f: (f / "extra.bin").touch(), "'extra.bin' does not belong"),
    "swapped tensors": (lambda f: swap(f, "model.safetensors"), "model.safetensors is damaged"),
    "swapped manifest": (lambda f: swap(f, "MANIFEST"), "MANIFEST is that of ckpt-000000000001"),
    "linked tensors": (lambda f: link(f / "model.safetensors"), "not a file .found: link"),
    "linked manifest": (lambda f: link(f / "MANIFEST"), "not a file .found: link"),
    "fifo": (lambda f: fifo(f / "model.safetensors"), "not a file .found: other"),
    "fifo for a manifest": (lambda f: fifo(f / "MANIFEST"), "not a file .found: other"),
    "folder for a file": (lambda f: directory(f / "meta.json"), "not a file .found: directory"),
    "linked folder": (link, "not a directory .found: link"),
    "path escape": (lambda f: change_manifest(f / "MANIFEST", escape), "files.../../outside"),
    "duplicate keys": (lambda f: forge(f / "MANIFEST", b'{"format":1,"format":1}\n'), "'format' occurs twice"),
    "not finite": (lambda f: forge(f / "MANIFEST", b'{"format":NaN}\n'), "NaN is not a number"),
    "bracket bomb": (lambda f: forge(f / "MANIFEST", b"[" * 100_000 + b"\n"), "nested too deeply"),
    "list for a manifest": (lambda f: forge(f / "MANIFEST", b"[]\n"), "MANIFEST: body"),
    "unknown key": (lambda f: change_manifest(f / "MANIFEST", lambda body: body.update(new=1)), "MANIFEST: new"),
    "format 0": (lambda f: change_manifest(f / "MANIFEST", lambda body: body.update(format=0)), "MANIFEST: format"),
    "format true": (lambda f: change_manifest(f / "MANIFEST", lambda body: body.update(format=True)), "format"),
    "negative step": (lambda f: change_manifest(f / "MANIFEST", lambda body: body.update(step=-1)), "MANIFEST: step"),
    "no meta": (lambda f: change_manifest(f / "MANIFEST", lambda body: body.update(files={})), "does not belong"),
}


@pytest.mark.parametrize(("harm", "reason"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    store: CheckpointStore, harm: Callable[[Path], object], reason: str
) -> None:
    save(store, 1, 2)
    shutil.copytree(folder(store, 1), store.directory / "good")
    harm(folder(store, 2))
    store = reopen(store)
    with pytest.raises(BadCheckpointError, match=reason):
        store.verify(name_of(2))
    loaded = store.load()
    assert loaded is not None
    assert loaded.state("model")["weight"].tolist() == [1, 1, 1]
    assert [fallback.name for fallback in loaded.fallbacks] == [name_of(2)]
    assert [info.step for info in store.list()] == [1]
    assert loaded.fallbacks[0].reason in (store.directory / "broken" / "0001-ckpt-000000000002.reason").read_text()
    save(store, 2)
    again = reopen(store).load()
    assert again is not None
    assert (again.step, again.fallbacks) == (2, ())


def test_tensors_cut_at_any_page_are_noticed(store: CheckpointStore) -> None:
    parts, trees = snapshot({"model": {"weight": torch.zeros(10_000)}})
    store.save(1, parts, {"states": trees}, config_digest="", parent=None)
    file = folder(store, 1) / "model.safetensors"
    for length in reversed(range(0, file.stat().st_size, 4096)):
        os.truncate(file, length)
        with pytest.raises(BadCheckpointError, match=f"safetensors has {length} bytes"):
            store.verify(name_of(1))


def test_only_the_last_two_broken_ones_are_kept(store: CheckpointStore) -> None:
    save(store, 1, 2, 3)
    store.pin(1)
    save(store, 4)
    for step in (2, 3, 4):
        flip(folder(store, step) / "meta.json")
    store = reopen(store)
    loaded = store.load()
    assert loaded is not None
    assert [fallback.name for fallback in loaded.fallbacks] == [name_of(4), name_of(3), name_of(2)]
    left = ["0002-ckpt-000000000003", "0003-ckpt-000000000004"]
    assert sorted(os.listdir(store.directory / "broken")) == sorted([*left, *(f"{name}.reason" for name in left)])


def refuse(*steps: int) -> Callable[[Loaded], None]:
    def check(loaded: Loaded) -> None:
        if loaded.step in steps:
            raise BadCheckpointError("weight is not finite")

    return check


def test_the_callers_check_may_refuse_a_checkpoint(store: CheckpointStore) -> None:
    save(store, 1, 2)
    loaded = store.load(refuse(2))
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.fallbacks[0].reason == "weight is not finite"


def test_any_other_error_of_the_check_ends_loading_with_nothing_changed(store: CheckpointStore) -> None:
    save(store, 1, 2)
    before = names(store)

    def check(loaded: Loaded) -> None:
        raise ValueError("the model of the policy has other shapes")

    with pytest.raises(ValueError, match="other shapes"):
        store.load(check)
    assert names(store) == before


def test_without_a_good_one_the_start_is_refused_again_and_again_and_nothing_moves(store: CheckpointStore) -> None:
    save(store, 1, 2)
    before = names(store)
    for _ in range(2):
        with pytest.raises(NoValidCheckpointError) as caught:
            store.load(refuse(1, 2))
        assert caught.value.exit_code == 74
        assert caught.value.reasons == dict.fromkeys([name_of(2), name_of(1)], "weight is not finite")
        assert "Choose one:" in str(caught.value)
        assert "--fresh" in str(caught.value)
        assert names(store) == before


def test_broken_ones_alone_are_no_reason_to_start_anew(store: CheckpointStore) -> None:
    save(store, 1, 2)
    store.load(refuse(2))
    shutil.rmtree(folder(store, 1))
    with pytest.raises(NoValidCheckpointError, match="broken/0001-ckpt-000000000002: set aside earlier: weight"):
        store.load()
    (store.directory / "broken" / "0001-ckpt-000000000002.reason").unlink()
    with pytest.raises(NoValidCheckpointError, match=r"broken/0001-ckpt-000000000002: set aside earlier\n"):
        store.load()


def test_setting_aside_keeps_everything_and_lets_a_run_start_anew(store: CheckpointStore) -> None:
    assert store.set_aside() is None
    for number in (1, 2):
        save(store, 1, 2)
        store.pin(1)
        store.load(refuse(2))
        assert store.set_aside() == store.directory / f"aside-{number}"
        assert store.load() is None
        assert sorted(os.listdir(store.directory / f"aside-{number}")) == [
            "CURRENT",
            "broken",
            name_of(1),
            "pin-000000000001",
        ]
    assert names(store) == ["LOCK", "aside-1", "aside-2"]


def test_a_newer_format_is_refused_with_the_version_to_install_and_nothing_moves(store: CheckpointStore) -> None:
    save(store, 1, 2)
    change_manifest(folder(store, 2) / "MANIFEST", lambda body: body.update(format=FORMAT + 1, reader="0.9.0", other=1))
    before = names(store)
    told = rf"has format {FORMAT + 1} and this version reads up to {FORMAT}; install adaptd 0\.9\.0"
    with pytest.raises(NewerFormatError, match=told):
        store.load()
    assert names(store) == before
    assert "install adaptd 0.9.0" in store.list()[0].problem
    forge(folder(store, 2) / "MANIFEST", b'{"format":99}\n')
    with pytest.raises(NewerFormatError, match="install the version of adaptd that wrote it"):
        store.verify(name_of(2))


def test_a_checkpoint_has_only_the_files_and_states_it_was_saved_with(store: CheckpointStore) -> None:
    save(store, 1)
    loaded = store.load()
    assert loaded is not None
    with pytest.raises(BadCheckpointError, match="no state 'optimizer'"):
        loaded.state("optimizer")
    with pytest.raises(BadCheckpointError, match=r"no file '../ckpt-000000000001/MANIFEST'"):
        loaded.open("../ckpt-000000000001/MANIFEST")


@pytest.mark.parametrize("meta", [b"[]\n", b'{"a":1,"a":2}\n', b"\xff\n", b'{"a":1e999}\n'])
def test_meta_that_is_not_a_strict_object_is_refused(store: CheckpointStore, meta: bytes) -> None:
    save(store, 1)
    (folder(store, 1) / "meta.json").write_bytes(meta)

    def change(body: dict[str, object]) -> None:
        files = body["files"]
        assert isinstance(files, dict)
        files["meta.json"] = {"bytes": len(meta), "blake3": blake3(meta).hexdigest()}

    change_manifest(folder(store, 1) / "MANIFEST", change)
    store.verify(name_of(1))
    with pytest.raises(NoValidCheckpointError, match=r"meta\.json"):
        store.load()


@pytest.mark.parametrize("name", ["ckpt-1", "", "../ckpt-000000000001", "ckpt-00000000000x", "ckpt--00000000001"])
def test_verifying_what_is_no_name_says_what_names_look_like(store: CheckpointStore, name: str) -> None:
    with pytest.raises(BadCheckpointError, match="they look like ckpt-000000000042"):
        store.verify(name)


def test_verifying_a_good_one_tells_what_it_is(store: CheckpointStore) -> None:
    save(store, 1)
    store.pin(1)
    info = store.verify(name_of(1))
    assert (info.name, info.step, info.pinned, info.problem) == (name_of(1), 1, True, "")
    assert info.manifest == store.list()[0].manifest
    with pytest.raises(BadCheckpointError, match="ckpt-000000000002 cannot be used: ckpt-000000000002 is missing"):
        store.verify(name_of(2))


def test_a_damaged_one_is_listed_with_its_problem(store: CheckpointStore) -> None:
    save(store, 1)
    flip(folder(store, 1) / "MANIFEST", 10)
    (info,) = store.list()
    assert (info.name, info.manifest, info.problem) == (name_of(1), None, "MANIFEST does not match its own hash")


@pytest.mark.parametrize(("code", "falls_back"), [(errno.EIO, True), (errno.EMFILE, False), (errno.EACCES, False)])
def test_only_read_errors_that_speak_of_the_checkpoint_make_it_fall_back(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, code: int, falls_back: bool
) -> None:
    save(store, 1, 2)
    original = QuickDisk.open

    def refuse(self: QuickDisk, path: Path) -> BinaryIO:
        if path == folder(store, 2) / "model.safetensors":
            raise OSError(code, os.strerror(code), str(path))
        return original(self, path)

    monkeypatch.setattr(QuickDisk, "open", refuse)
    if falls_back:
        loaded = store.load()
        assert loaded is not None
        assert loaded.step == 1
    else:
        with pytest.raises(StorageError, match=os.strerror(code)):
            store.load()
        assert store.newest() == 2


def test_the_golden_checkpoint_of_format_1_is_loaded(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "state")
    with open_store(tmp_path / "state") as store:
        loaded = store.load()
        assert loaded is not None
        assert loaded.fallbacks == ()
        assert (loaded.step, loaded.manifest.epoch, loaded.manifest.parent) == (7, 2, 3)
        assert loaded.meta["positions"] == {"data-0": 70, "feedback-0": 12}
        assert loaded.state("model")["layer.weight"].tolist() == [[1.5, -2.0], [0.25, 3.0]]
        policy = loaded.state("policy")
        assert policy["bank"]["times"].tolist() == [1.0, 2.0]
        assert policy["limit"] == float("inf")


def test_what_format_1_held_is_still_written_byte_for_byte(store: CheckpointStore) -> None:
    golden = GOLDEN / name_of(7)
    manifest = decode((golden / "MANIFEST").read_bytes())
    states: dict[str, State] = {
        "model": {"layer.weight": torch.tensor([[1.5, -2.0], [0.25, 3.0]]), "steps": torch.tensor(9)},
        "policy": {
            "bank": {"times": torch.tensor([1.0, 2.0], dtype=torch.float64)},
            "limit": float("inf"),
            "n": [1, None],
        },
    }
    parts, trees = snapshot(states)
    meta: dict[str, Json] = {"positions": {"data-0": 70, "feedback-0": 12}, "states": trees}
    store.save(7, parts, meta, config_digest="golden", parent=3)
    for name in manifest.files:
        assert (folder(store, 7) / name).read_bytes() == (golden / name).read_bytes()
    # The versions inside are those of its time; the spelling is today's.
    assert manifest.encode() == (golden / "MANIFEST").read_bytes()
