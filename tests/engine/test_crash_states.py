"""Every state that a crash may leave of checkpoints and journal together, while lives of a keeper write both.

Each state is what a power loss may leave at one operation: unsynced bytes and unsynced names may be gone in any
combination. A new life on it must find a checkpoint that was acknowledged (or the one under way, whole) and behind it
a prefix of what was journaled: as long as what had been acknowledged as durable, without a hole, nothing altered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest

from engine.checkpoint import CheckpointStore, Loaded
from engine.core import Core
from engine.errors import StorageError
from engine.keeper import Keeper, Snapshot
from streams.journal import Entry, Journal, JournalError, Kind, Run
from tests.crash.enumerator import MemoryDisk, Tree, freeze
from tests.crash.memory_os import MemoryOs, path_on

ROOT = Path("/state")
CORE = cast("Core", SimpleNamespace(make_job=lambda: None))


def entry(sequence: int) -> Entry:
    return Entry(sequence, Kind.DATA, float(sequence), (Run("data", 0, sequence * 8, sequence * 8 + 8, 8),))


class StateKeeper(Keeper):
    """A keeper of a state that is nothing but its step."""

    @staticmethod
    def _fits(loaded: Loaded, core: Core) -> None:
        with loaded.open("state.bin") as file:
            assert file.read() == b"state of %d" % loaded.step, "a damaged checkpoint was accepted"

    def _apply(self, loaded: Loaded, core: Core, *, strict: bool) -> None:
        pass


@dataclass
class Promised:
    """What was acknowledged, and what was begun."""

    checkpoint: int = 0
    coming: int = 0
    durable: int = 0
    """Sequence number up to which the journal may not be lost."""
    appended: int = 0


class Life:
    """A process on a disk in memory."""

    def __init__(self, disk: MemoryDisk, patch: pytest.MonkeyPatch, *, sync_each: bool = False) -> None:
        patch.setattr("streams.journal.os", MemoryOs(disk))
        self.store = CheckpointStore(ROOT, disk=disk)
        self.store.lock()
        self.store.sweep()
        self.sync_each = sync_each
        self.keeper = StateKeeper(self.store, Journal(path_on(disk), sync_each=sync_each), "d")
        restored = self.keeper.restore(CORE)
        self.found = self.keeper.sequence
        self.entries: list[Entry] = [] if restored is None else restored[1]
        self.keeper.sequence += len(self.entries)
        self.promised = Promised(self.found, self.found, self.keeper.sequence, self.keeper.sequence)
        if restored is None:
            self.save()

    def append(self) -> None:
        self.promised.appended = self.keeper.sequence + 1
        self.keeper.append(entry(self.keeper.sequence + 1))
        self.keeper.sequence += 1
        if self.sync_each:
            self.promised.durable = self.keeper.sequence

    def save(self, meanwhile: int = 0) -> None:
        """What the saver does: a snapshot between two batches, then the checkpoint, with so many entries meanwhile."""
        at = self.promised.coming = self.keeper.sequence

        def write(file: BinaryIO) -> None:
            file.write(b"state of ")
            for _ in range(meanwhile):
                self.append()
            file.write(b"%d" % at)

        self.keeper.journal.start(at)
        self.promised.durable = max(self.promised.durable, at)
        meta: dict[str, Any] = {"positions": [["data", 0, at * 8]]}
        self.keeper.write(Snapshot(at, {"state.bin": write}, meta))
        self.promised.checkpoint = at


State = tuple[Promised, Tree]


def states_of(disk: MemoryDisk, life: Life, act: Callable[[], object]) -> Iterator[State]:
    """Distinct states before each operation of ``act`` and after the last, with what was promised by then."""
    found: dict[object, State] = {}

    def look(operation: str) -> None:
        promised = Promised(**vars(life.promised))
        for tree in disk.crash_states():
            found[freeze(tree)] = (promised, tree)  # the latest of equal states has promised most

    disk.watch = look
    act()
    look("end")
    disk.watch = lambda operation: None
    return iter(found.values())


def recover(state: State, patch: pytest.MonkeyPatch) -> tuple[MemoryDisk, Life]:
    """A new life on what is left; says what of the promises it finds broken."""
    promised, tree = state
    disk = MemoryDisk(ROOT, tree)
    life = Life(disk, patch)
    assert life.found in (promised.checkpoint, promised.coming), f"{life.found} of {promised}"
    expected = [entry(n) for n in range(life.found + 1, life.keeper.sequence + 1)]
    assert life.entries == expected, "not what was journaled"
    assert promised.durable <= life.keeper.sequence <= promised.appended, f"{life.keeper.sequence} of {promised}"
    return disk, life


def several_checkpoints(life: Life) -> None:
    """Long enough for checkpoints and segments to be deleted."""
    for count, meanwhile in ((3, 0), (1, 1), (2, 0), (3, 1), (2, 0)):
        for _ in range(count):
            life.append()
        life.save(meanwhile)
    life.append()
    life.append()


def test_every_crash_state_recovers_to_an_acknowledged_checkpoint_and_a_prefix_of_the_journal(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    disk = MemoryDisk(ROOT)
    life = Life(disk, monkeypatch)
    visited = 0
    for state in states_of(disk, life, lambda: several_checkpoints(life)):
        _, next_life = recover(state, monkeypatch)
        visited += 1
        next_life.append()
        next_life.save()
        assert next_life.promised.checkpoint == next_life.keeper.sequence
    record_property("crash_states", visited)
    assert visited > 500


def test_a_crash_while_recovering_from_a_crash_recovers_to_the_same(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    disk = MemoryDisk(ROOT)
    life = Life(disk, monkeypatch)
    first = list(states_of(disk, life, lambda: several_checkpoints(life)))
    seen: set[object] = set()
    for promised, tree in first[::7]:
        once = MemoryDisk(ROOT, tree)
        lives: list[Life] = []
        for state in states_of(once, life, lambda on=once, to=lives: to.append(Life(on, monkeypatch))):  # type: ignore[misc]
            if freeze(state[1]) in seen:
                continue
            seen.add(freeze(state[1]))
            _, again = recover((promised, state[1]), monkeypatch)
            assert again.keeper.sequence == lives[0].keeper.sequence
    record_property("crash_states", len(seen))
    assert len(seen) > 100


def test_with_every_entry_synced_no_crash_state_has_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = MemoryDisk(ROOT)
    life = Life(disk, monkeypatch, sync_each=True)
    for state in states_of(disk, life, lambda: several_checkpoints(life)):
        recover(state, monkeypatch)


def test_from_every_crash_state_the_checkpoint_before_a_rotten_one_reaches_as_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = MemoryDisk(ROOT)
    life = Life(disk, monkeypatch)
    several_checkpoints(life)
    last = life.promised.checkpoint
    disk = MemoryDisk(ROOT, next(iter(disk.crash_states())))
    life = Life(disk, monkeypatch)
    before = life.keeper.sequence
    passed_over = 0

    def one_more() -> None:
        life.append()
        life.save()
        life.append()

    for promised, tree in states_of(disk, life, one_more):
        folder = cast("Tree", tree[max(name for name in tree if name.startswith("ckpt-"))])
        folder["state.bin"] = b"rot"
        again = Life(MemoryDisk(ROOT, tree), monkeypatch)
        assert again.found in (promised.checkpoint, last) or again.found < last
        assert again.keeper.sequence >= before
        passed_over += again.keeper.fallbacks
    assert passed_over > 20


def test_without_the_sync_of_a_segment_before_the_next_the_enumeration_finds_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Journal, "sync", lambda self: None)
    assert _broken(monkeypatch)


def test_with_segments_deleted_before_their_checkpoints_the_enumeration_finds_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Keeper.write

    def write(keeper: Keeper, snapshot: Snapshot) -> object:
        keeper.journal.drop_before(snapshot.step)
        return own(keeper, snapshot)

    monkeypatch.setattr(Keeper, "write", write)
    assert _broken(monkeypatch)


def _broken(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether any state breaks a promise."""
    disk = MemoryDisk(ROOT)
    life = Life(disk, monkeypatch)

    def act() -> None:
        for _ in range(2):
            life.append()
            life.save()

    for state in states_of(disk, life, act):
        try:
            recover(state, monkeypatch)
        except (AssertionError, JournalError, StorageError):
            return True
    return False
