from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streams.join import Joined, JoinError, JoinStore
from streams.join_pack import WaitingRows
from streams.join_spill import Spill
from tests.streams.join_helpers import Feedback, counted, event, names


@pytest.fixture
def store() -> JoinStore:
    return JoinStore(window=10.0, max_bytes=1 << 20)


@pytest.fixture
def spilling(tmp_path: Path) -> Iterator[JoinStore]:
    store = JoinStore(window=10.0, max_bytes=8000, max_disk_bytes=1 << 20, directory=tmp_path)
    yield store
    store.close()


def test_feedback_joins_the_event_that_waits_for_it(store: JoinStore) -> None:
    assert store.answered([event("a", 1.0, inputs=b"pixels", group="eu")], 1.0) == []
    joined = store.feedback([Feedback("a", 4, 0.5, 3.0)], 3.0)
    assert joined == [Joined("a", b"pixels", 1.0, "eu", 3, 7, 4, 0.5, 3.0)]
    assert store.pending == 0
    assert counted(store) == {"joined": 1}


def test_feedback_before_its_event_joins_when_the_event_comes(store: JoinStore) -> None:
    assert store.feedback([Feedback("a", 4, None, 3.0)], 3.0) == []
    assert store.early == 1
    assert store.answered([event("b", 2.0), event("a", 2.0)], 3.0) == [Joined("a", b"x", 2.0, None, 3, 7, 4, None, 3.0)]
    assert (store.early, store.pending) == (0, 1)
    assert counted(store) == {"early": 1, "joined": 1}


def test_joined_events_come_in_the_order_of_the_feedback(store: JoinStore) -> None:
    store.answered([event("a"), event("b"), event("c")], 0.0)
    assert names(store.feedback([Feedback("c"), Feedback("a"), Feedback("b")], 0.0)) == ["c", "a", "b"]


def test_second_feedback_of_an_id_is_a_duplicate(store: JoinStore) -> None:
    store.answered([event("a")], 0.0)
    assert names(store.feedback([Feedback("a", 1), Feedback("a", 2)], 0.0)) == ["a"]
    assert store.feedback([Feedback("a", 3)], 0.0) == []
    assert counted(store) == {"joined": 1, "duplicate": 2}


def test_first_of_two_early_feedbacks_wins(store: JoinStore) -> None:
    store.feedback([Feedback("a", 1), Feedback("a", 2)], 0.0)
    assert [item.label for item in store.answered([event("a")], 0.0)] == [1]
    assert counted(store) == {"early": 1, "duplicate": 1, "joined": 1}


def test_event_that_comes_twice_is_kept_once_and_as_it_came_first(store: JoinStore) -> None:
    store.answered([event("a", inputs=b"first"), event("a", inputs=b"second")], 0.0)
    store.answered([event("a", inputs=b"third")], 0.0)
    assert [item.inputs for item in store.feedback([Feedback("a")], 0.0)] == [b"first"]
    store.answered([event("a", inputs=b"fourth")], 0.0)
    assert store.pending == 0
    assert counted(store) == {"redelivered": 3, "joined": 1}


def test_feedback_exactly_one_window_after_its_event_joins(store: JoinStore) -> None:
    store.answered([event("a", 5.0), event("b", 5.0)], 5.0)
    late = math.nextafter(15.0, math.inf)
    assert names(store.feedback([Feedback("a", time=15.0), Feedback("b", time=late)], 15.0)) == ["a"]
    assert counted(store) == {"joined": 1, "late": 1}


def test_feedback_of_an_expired_event_is_late(store: JoinStore) -> None:
    store.answered([event("a", 0.0)], 0.0)
    assert store.feedback([Feedback("a", time=9.0)], 30.0) == []
    assert store.pending == 0
    assert counted(store) == {"expired": 1, "late": 1}


def test_event_is_expired_between_two_sweeps_as_well(store: JoinStore) -> None:
    store.answered([event("a", 0.0)], 10.0)
    assert store.feedback([Feedback("a", time=9.0)], 10.25) == []
    assert counted(store) == {"late": 1}
    store.answered([], 11.0)
    assert counted(store) == {"late": 1, "expired": 1}


def test_event_that_is_too_old_on_arrival_does_not_wait(store: JoinStore) -> None:
    store.answered([event("a", 0.0)], 10.5)
    assert store.pending == 0
    assert counted(store) == {"expired": 1}


def test_feedback_without_an_event_is_an_orphan_once_its_window_has_passed(store: JoinStore) -> None:
    store.feedback([Feedback("a", time=0.0)], 0.0)
    store.feedback([Feedback("b", time=1.0)], 12.0)
    assert store.early == 0
    assert counted(store) == {"early": 1, "orphan": 2}


def test_orphan_between_two_sweeps_does_not_join(store: JoinStore) -> None:
    store.feedback([Feedback("a", time=0.0)], 10.0)
    assert store.answered([event("a", 5.0)], 10.25) == []
    assert counted(store) == {"early": 1, "orphan": 1}
    assert store.pending == 1


def test_early_feedback_of_a_much_older_event_is_late(store: JoinStore) -> None:
    store.feedback([Feedback("a", time=20.0)], 5.0)
    assert store.answered([event("a", 0.0)], 5.0) == []
    assert counted(store) == {"early": 1, "late": 1}


def test_feedback_with_inputs_joins_without_an_event(store: JoinStore) -> None:
    joined = store.feedback([Feedback("a", 4, None, 3.0, b"own")], 3.0)
    assert joined == [Joined("a", b"own", 3.0, None, -1, -1, 4, None, 3.0)]
    assert store.feedback([Feedback("a", 4, None, 3.0, b"own")], 3.0) == []
    assert counted(store) == {"joined": 1, "duplicate": 1}


def test_event_after_its_inline_feedback_neither_waits_nor_counts_as_redelivered(store: JoinStore) -> None:
    store.feedback([Feedback("a", inputs=b"own")], 0.0)
    store.answered([event("a")], 0.0)
    assert store.pending == 0
    assert counted(store) == {"joined": 1}
    store.answered([event("a")], 0.0)
    assert counted(store) == {"joined": 1, "redelivered": 1}


def test_feedback_with_inputs_takes_the_answer_from_the_event_that_waits(store: JoinStore) -> None:
    store.answered([event("a", 1.0, group="eu")], 1.0)
    joined = store.feedback([Feedback("a", 4, None, 3.0, b"own")], 3.0)
    assert joined == [Joined("a", b"own", 1.0, "eu", 3, 7, 4, None, 3.0)]


def test_watermark_never_goes_back(store: JoinStore) -> None:
    store.answered([event("a", 0.0)], 20.0)
    store.answered([event("b", 9.0)], 0.0)
    assert counted(store) == {"expired": 2}


def test_settled_ids_are_forgotten_a_window_later(store: JoinStore) -> None:
    store.answered([event("a", 0.0)], 0.0)
    store.feedback([Feedback("a", time=0.0)], 0.0)
    store.feedback([], 5.0)
    store.feedback([Feedback("a", time=14.0)], 14.0)
    assert counted(store) == {"joined": 1, "duplicate": 1}
    store.feedback([Feedback("a", time=30.0)], 30.0)
    assert counted(store) == {"joined": 1, "duplicate": 1, "early": 1}


def test_oldest_events_are_evicted_above_the_memory_bound() -> None:
    store = JoinStore(window=10.0, max_bytes=40_000)
    store.answered([event(f"e{i}", inputs=bytes(5000)) for i in range(20)], 0.0)
    assert store.bytes <= 40_000
    evicted = store.counts["evicted"]
    assert store.pending + evicted == 20
    assert names(store.feedback([Feedback(f"e{i}") for i in range(20)], 0.0)) == [f"e{i}" for i in range(evicted, 20)]
    assert counted(store) == {"evicted": evicted, "late": evicted, "joined": 20 - evicted}


def test_event_larger_than_the_memory_is_evicted_at_once() -> None:
    store = JoinStore(window=10.0, max_bytes=8000)
    store.answered([event("a", inputs=bytes(9000)), event("b")], 0.0)
    assert store.bytes <= 8000
    assert counted(store)["evicted"] >= 1


def test_early_feedback_above_its_share_overflows_oldest_first() -> None:
    store = JoinStore(window=10.0, max_bytes=32000)
    store.feedback([Feedback(f"e{i}") for i in range(50)], 0.0)
    assert store.early + store.counts["overflow"] == 50
    assert 0 < store.early < 50
    assert names(store.answered([event(f"e{i}") for i in range(50)], 0.0))[-1] == "e49"
    assert store.bytes <= 32000


def test_remembered_ids_keep_to_their_share() -> None:
    store = JoinStore(window=10.0, max_bytes=32000)
    for i in range(100):
        store.feedback([Feedback(f"e{i}", inputs=b"own")], 0.0)
    assert store.bytes <= 4000
    store.feedback([Feedback("e99"), Feedback("e0")], 0.0)
    assert counted(store) == {"joined": 100, "duplicate": 1, "early": 1}


def test_events_on_disk_join_like_those_in_memory(spilling: JoinStore) -> None:
    spilling.answered([event(f"e{i}", 1.0, inputs=bytes([i]) * 500, group="eu") for i in range(40)], 1.0)
    assert spilling.bytes <= 8000
    assert spilling.disk_bytes > 0
    assert spilling.pending == 40
    joined = spilling.feedback([Feedback(f"e{i}", 4, None, 2.0) for i in (0, 39, 1)], 2.0)
    assert joined == [Joined(f"e{i}", bytes([i]) * 500, 1.0, "eu", 3, 7, 4, None, 2.0) for i in (0, 39, 1)]
    assert spilling.pending == 37
    spilling.feedback([Feedback("e0", time=2.0)], 2.0)
    assert counted(spilling) == {"joined": 3, "duplicate": 1}


def test_event_on_disk_is_told_from_a_new_one(spilling: JoinStore) -> None:
    spilling.answered([event(f"e{i}", inputs=bytes(500)) for i in range(40)], 0.0)
    spilling.answered([event("e0", inputs=b"other"), event("new")], 0.0)
    assert counted(spilling) == {"redelivered": 1}
    assert [item.inputs for item in spilling.feedback([Feedback("e0")], 0.0)] == [bytes(500)]


def test_late_feedback_leaves_its_event_on_disk(spilling: JoinStore) -> None:
    spilling.answered([event(f"e{i}", inputs=bytes(500)) for i in range(40)], 0.0)
    assert spilling.feedback([Feedback("e0", time=10.5)], 0.0) == []
    assert names(spilling.feedback([Feedback("e0", time=9.5)], 0.0)) == ["e0"]
    assert counted(spilling) == {"late": 1, "joined": 1}


def test_events_on_disk_expire(spilling: JoinStore) -> None:
    spilling.answered([event(f"e{i}", float(i % 5), inputs=bytes(500)) for i in range(40)], 5.0)
    spilling.answered([], 12.5)
    assert counted(spilling) == {"expired": 24}
    spilling.answered([], 100.0)
    assert (spilling.pending, spilling.disk_bytes) == (0, 0)
    assert counted(spilling) == {"expired": 40}


def test_oldest_events_on_disk_are_evicted_above_the_disk_bound(tmp_path: Path) -> None:
    store = JoinStore(window=10.0, max_bytes=8000, max_disk_bytes=20000, directory=tmp_path)
    for i in range(100):
        store.answered([event(f"e{i}", inputs=bytes(500))], 0.0)
    assert store.disk_bytes <= 20000
    evicted = store.counts["evicted"]
    assert store.pending + evicted == 100
    assert names(store.feedback([Feedback(f"e{i}") for i in (evicted - 1, evicted)], 0.0)) == [f"e{evicted}"]
    store.close()


def test_strange_ids_survive_the_disk(spilling: JoinStore) -> None:
    strange = ["", "a'b", "\ud800", "\U0001f600", "nul\0"]
    spilling.answered([event(name, inputs=bytes(500), group=name) for name in strange], 0.0)
    spilling.answered([event(f"e{i}", inputs=bytes(500)) for i in range(40)], 0.0)
    joined = spilling.feedback([Feedback(name) for name in strange], 0.0)
    assert [(item.id, item.group) for item in joined] == [(name, name) for name in strange]


def test_full_disk_evicts_instead_of_stopping(spilling: JoinStore, tmp_path: Path) -> None:
    blocker = sqlite3.connect(tmp_path / "joins.sqlite", isolation_level=None)
    blocker.execute("DROP INDEX by_time")
    blocker.execute("ALTER TABLE waiting ADD COLUMN more")
    blocker.close()
    spilling.answered([event(f"e{i}", inputs=bytes(500)) for i in range(40)], 0.0)
    assert spilling.counts["spill_failed"] > 0
    assert spilling.pending + spilling.counts["evicted"] == 40
    assert spilling.bytes <= 8000


@pytest.mark.parametrize("variables", [999, 250_000])
def test_the_disk_takes_and_gives_as_many_rows_as_wanted_however_few_variables_a_statement_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: int
) -> None:
    connect = sqlite3.connect

    def limited(path: Path, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, **options)
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, variables)
        return connection

    monkeypatch.setattr(sqlite3, "connect", limited)
    spill, count = Spill(tmp_path), 3000
    spill.put(WaitingRows.of([event(f"e{i}", 1.0) for i in range(count)]))
    ids = [f"e{i}" for i in range(count + 1)]
    assert spill.holds(ids) == set(ids[:count])
    found = spill.find(ids)
    assert set(found) == set(ids[:count])
    spill.remove([(row.seq, row.cost) for row in found.values()][1:])
    assert (spill.holds(ids), spill.count) == ({"e0"}, 1)
    spill.close()


def test_file_on_disk_is_removed_at_the_end_and_made_afresh(tmp_path: Path) -> None:
    (tmp_path / "joins.sqlite").write_bytes(b"left over and broken")
    store = JoinStore(window=10.0, max_bytes=8000, max_disk_bytes=1 << 20, directory=tmp_path)
    assert store.pending == 0
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JoinError, match=r"cannot be made in .*file/joins\.sqlite"):
        JoinStore(window=10.0, max_bytes=8000, max_disk_bytes=1 << 20, directory=tmp_path / "file")


@pytest.mark.parametrize("window", [0.0, -1.0, math.inf, math.nan])
def test_window_must_be_positive_and_finite(window: float) -> None:
    with pytest.raises(ValueError, match="window"):
        JoinStore(window=window, max_bytes=8000)


def test_memory_bound_must_be_positive() -> None:
    with pytest.raises(ValueError, match="cannot keep to 0 bytes"):
        JoinStore(window=1.0, max_bytes=0)
