from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams.base import Record
from streams.journal import Entry, Journal, JournalError, Kind, Run, runs_of


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


def entry(sequence: int, kind: Kind = Kind.DATA) -> Entry:
    runs = (Run("events", 0, sequence * 10, sequence * 10 + 9, 8), Run("événements", 3, 5, 6, 1))
    return Entry(sequence, kind, sequence / 3, runs if kind is Kind.DATA else ())


def fill(journal: Journal, step: int, first: int, count: int) -> list[Entry]:
    entries = [entry(first + i, Kind(1 + i % 5)) for i in range(count)]
    journal.start(step)
    for one in entries:
        journal.append(one)
    return entries


def segment(directory: Path, step: int) -> Path:
    return directory / f"journal-{step:012d}.log"


def record(partition: int, offset: int, end: int | None = None, stream: str = "events") -> Record:
    return Record(stream, partition, offset, offset + 1 if end is None else end, 0.0, None, b"")


def test_entries_come_back_in_order_from_every_step(journal: Journal, tmp_path: Path) -> None:
    first = fill(journal, 0, 0, 3)
    second = fill(journal, 100, 3, 4)
    third = fill(journal, 250, 7, 1)
    assert list(Journal(tmp_path).read(0)) == first + second + third
    assert list(Journal(tmp_path).read(100)) == second + third
    assert list(Journal(tmp_path).read(250)) == third


def test_empty_directory_has_no_entries(journal: Journal) -> None:
    assert list(journal.read(0)) == []
    journal.reopen()
    assert journal.next_sequence is None


def test_entries_that_the_checkpoint_covers_are_left_out(journal: Journal, tmp_path: Path) -> None:
    entries = fill(journal, 0, 5, 6)
    assert list(Journal(tmp_path).read(0, after=7)) == entries[3:]
    assert list(Journal(tmp_path).read(0, after=4)) == entries
    assert list(Journal(tmp_path).read(0, after=99)) == []


def test_gap_behind_the_checkpoint_is_refused(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 5, 6)
    with pytest.raises(JournalError, match="has entry 5 where 4 belongs"):
        list(Journal(tmp_path).read(0, after=3))


def test_segment_begun_before_a_checkpoint_that_was_never_published_goes_on(tmp_path: Path) -> None:
    dead = Journal(tmp_path)
    first = fill(dead, 10, 0, 3)
    second = fill(dead, 20, 3, 2)  # checkpoint 20 is never published
    dead.close()
    alive = Journal(tmp_path)
    assert list(alive.read(10, after=-1)) == first + second
    alive.reopen()
    assert alive.next_sequence == 5
    alive.append(entry(5))
    alive.start(20)  # a checkpoint at the same step, now behind entry 5
    alive.append(entry(6))
    alive.close()
    assert list(Journal(tmp_path).read(20, after=5)) == [entry(6)]
    assert list(Journal(tmp_path).read(10)) == [*first, *second, entry(5), entry(6)]


def test_crash_right_after_the_start_of_a_segment_loses_nothing(tmp_path: Path) -> None:
    dead = Journal(tmp_path)
    first = fill(dead, 10, 0, 3)
    dead.start(20)
    dead.close()
    alive = Journal(tmp_path)
    assert list(alive.read(10)) == first
    alive.reopen()
    assert alive.next_sequence == 3
    alive.start(20)
    alive.append(entry(3))
    alive.close()
    assert list(Journal(tmp_path).read(20)) == [entry(3)]


def test_start_goes_on_behind_what_an_earlier_life_left(tmp_path: Path) -> None:
    dead = Journal(tmp_path)
    first = fill(dead, 0, 0, 3)
    dead.close()
    alive = Journal(tmp_path)
    alive.start(30)
    alive.append(entry(3))
    alive.close()
    assert list(Journal(tmp_path).read(0)) == [*first, entry(3)]


def test_segment_of_an_earlier_step_cannot_be_begun(journal: Journal) -> None:
    fill(journal, 10, 0, 1)
    with pytest.raises(JournalError, match="steps only grow"):
        journal.start(9)


def test_sequence_numbers_must_follow_each_other(journal: Journal) -> None:
    fill(journal, 0, 0, 2)
    with pytest.raises(JournalError, match="entry 3 cannot follow 1"):
        journal.append(entry(3))
    journal.append(entry(2))


def test_nothing_can_be_appended_before_the_start(journal: Journal) -> None:
    with pytest.raises(JournalError, match="is closed"):
        journal.append(entry(0))


def test_torn_end_is_cut_at_every_byte(tmp_path: Path) -> None:
    whole = Journal(tmp_path)
    first = fill(whole, 0, 0, 2)
    second = fill(whole, 5, 2, 2)
    whole.close()
    path = segment(tmp_path, 5)
    data = path.read_bytes()
    ends = [len(data)]
    path.write_bytes(data[:-1])
    ends.insert(0, len(data) - 1 - _torn(tmp_path))
    assert path.stat().st_size == ends[0]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        journal = Journal(tmp_path)
        kept = list(journal.read(0))
        assert kept == (first + second[:1] if size >= ends[0] else first)
        assert path.stat().st_size + journal.torn_bytes == size
        journal.reopen()
        journal.append(entry(len(kept)))
        journal.close()
        assert list(Journal(tmp_path).read(0)) == [*kept, entry(len(kept))]


def _torn(directory: Path) -> int:
    journal = Journal(directory)
    list(journal.read(0))
    return journal.torn_bytes


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 100, b"\xad\x9e\xf1\x0a" + b"\0" * 20])
def test_garbage_behind_the_last_entry_is_cut(journal: Journal, tmp_path: Path, tail: bytes) -> None:
    entries = fill(journal, 0, 0, 3)
    size = segment(tmp_path, 0).stat().st_size
    with segment(tmp_path, 0).open("ab") as file:
        file.write(tail)
    after = Journal(tmp_path)
    assert list(after.read(0)) == entries
    assert after.torn_bytes == len(tail)
    assert segment(tmp_path, 0).stat().st_size == size


def test_every_flipped_bit_is_either_refused_or_cut_with_the_last_entry(tmp_path: Path) -> None:
    whole = Journal(tmp_path)
    first = fill(whole, 0, 0, 2)
    last = fill(whole, 5, 2, 2)
    whole.close()
    for step in (0, 5):
        data = segment(tmp_path, step).read_bytes()
        outcomes = set()
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 1 << at % 8
            segment(tmp_path, step).write_bytes(damaged)
            outcomes.add(outcome(tmp_path))
        segment(tmp_path, step).write_bytes(data)
        assert outcomes == ({"damaged"} if step == 0 else {"damaged", (*first, last[0])})


def outcome(directory: Path) -> str | tuple[Entry, ...]:
    try:
        return tuple(Journal(directory).read(0))
    except JournalError:
        return "damaged"


def test_damage_names_file_and_byte(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 0, 3)
    path = segment(tmp_path, 0)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalError, match=r"journal-000000000000\.log is damaged at byte 29; bring"):
        journal.reopen()


def test_torn_end_in_an_earlier_segment_is_refused(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 0, 2)
    fill(journal, 5, 2, 1)
    path = segment(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JournalError, match="is damaged at byte"):
        list(Journal(tmp_path).read(0))
    assert list(Journal(tmp_path).read(5)) == [entry(2)]


def test_missing_segment_is_refused(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 0, 2)
    fill(journal, 5, 2, 2)
    fill(journal, 9, 4, 1)
    segment(tmp_path, 5).unlink()
    with pytest.raises(JournalError, match="has entry 4 where 2 belongs"):
        list(Journal(tmp_path).read(0))
    with pytest.raises(JournalError, match="is missing although later segments exist"):
        list(Journal(tmp_path).read(5))


def test_swapped_segments_are_refused(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 0, 2)
    fill(journal, 5, 2, 2)
    segment(tmp_path, 5).replace(segment(tmp_path, 0))
    with pytest.raises(JournalError, match="is damaged at byte 0"):
        list(Journal(tmp_path).read(0))


def test_other_files_are_left_alone(journal: Journal, tmp_path: Path) -> None:
    for name in ("journal-1.log", "journal-000000000009.log.old", "xjournal-000000000009.log"):
        (tmp_path / name).touch()
    entries = fill(journal, 0, 0, 2)
    assert list(Journal(tmp_path).read(0)) == entries


def test_old_segments_are_dropped_and_the_current_one_never(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 0, 2)
    fill(journal, 5, 2, 2)
    last = fill(journal, 9, 4, 2)
    assert journal.drop_before(9) == 2
    assert journal.drop_before(99) == 0
    assert list(Journal(tmp_path).read(9)) == last
    journal.append(entry(6))


@pytest.mark.parametrize("sequence", range(-1, 8))
def test_entries_behind_a_number_can_be_discarded(journal: Journal, tmp_path: Path, sequence: int) -> None:
    entries = fill(journal, 0, 0, 3) + fill(journal, 5, 3, 2) + fill(journal, 9, 5, 2)
    journal.discard_after(sequence)
    kept = entries[: sequence + 1]
    assert list(Journal(tmp_path).read(0)) == kept
    journal.append(entry(len(kept)))
    assert list(Journal(tmp_path).read(0)) == [*kept, entry(len(kept))]


def test_segment_of_the_checkpoint_stays_when_all_behind_it_is_discarded(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 0, 3)
    fill(journal, 5, 3, 2)
    fill(journal, 9, 5, 2)
    journal.discard_after(2)
    journal.append(entry(3))
    assert list(Journal(tmp_path).read(5, after=2)) == [entry(3)]


def test_failed_write_leaves_nothing_behind(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = fill(journal, 0, 0, 2)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:20]))
        with pytest.raises(JournalError, match="only a part was written; check its disk"):
            journal.append(entry(2))
    journal.append(entry(2))
    assert list(Journal(tmp_path).read(0)) == [*entries, entry(2)]


def test_segment_whose_header_cannot_be_written_is_not_begun(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = fill(journal, 0, 0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: 0)
        with pytest.raises(JournalError, match="only a part was written"):
            journal.start(5)
    journal.append(entry(2))
    journal.start(5)
    assert list(Journal(tmp_path).read(0)) == [*entries, entry(2)]


def test_failed_sync_closes_the_journal(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(journal, 0, 0, 2)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(JournalError, match=r"cannot be synced: .*Input/output error; the journal is closed"):
        journal.sync()
    with pytest.raises(JournalError, match="is closed"):
        journal.append(entry(2))


def test_entries_are_synced_ahead_on_another_thread_even_where_the_file_is_closed(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(journal, 0, 0, 2)
    synced: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    open_files = len(os.listdir("/proc/self/fd"))
    sync = journal.ahead()
    journal.close()
    thread = threading.Thread(target=sync)
    thread.start()
    thread.join()
    assert [Path(name).name for name in synced] == ["journal-000000000000.log"]
    assert len(os.listdir("/proc/self/fd")) == open_files - 1
    journal.ahead()()
    assert len(synced) == 1, "nothing is open"


def test_an_error_of_syncing_ahead_is_told_by_the_sync_that_follows(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(journal, 0, 0, 2)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        journal.ahead()()
    with pytest.raises(JournalError, match=r"cannot be synced: .*Input/output error; the journal is closed"):
        journal.start(5)


def test_an_error_that_only_a_sync_ahead_still_under_way_is_told_counts(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(journal, 0, 0, 2)
    began, release = threading.Event(), threading.Event()
    ahead = threading.Thread(target=journal.ahead())

    def sync(_: int) -> None:
        if threading.current_thread() is not ahead:
            release.set()
            return
        began.set()
        assert release.wait(60)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", sync)
    ahead.start()
    assert began.wait(60)
    with pytest.raises(JournalError, match=r"cannot be synced: .*Input/output error; the journal is closed"):
        journal.start(5)
    ahead.join()
    assert sorted(tmp_path.iterdir()) == [segment(tmp_path, 0)], "nothing goes on as if it were durable"


def test_syncing_ahead_opens_the_file_anew_so_that_the_kernel_tells_an_error_to_both(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(journal, 0, 0, 2)
    places: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: places.append(os.lseek(descriptor, 0, os.SEEK_CUR)))
    journal.ahead()()
    journal.sync()
    assert places[0] == 0, "nothing was written through this one"
    assert places[1] > 0


def test_syncing_ahead_passes_over_a_segment_that_is_gone(journal: Journal) -> None:
    fill(journal, 0, 0, 2)
    sync = journal.ahead()
    journal.start(5)
    assert journal.drop_before(5) == 1
    sync()
    journal.sync()


def test_segment_is_synced_before_the_next_begins(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(journal, 0, 0, 2)
    synced: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    journal.start(5)
    assert [Path(name).name for name in synced] == ["journal-000000000000.log"]


def test_each_entry_is_synced_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, sync_each=True)
    journal.start(0)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    journal.append(entry(0))
    journal.append(entry(1))
    assert len(synced) == 2
    journal.close()


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="nowhere cannot be listed"):
        list(Journal(tmp_path / "nowhere").read(0))


def test_runs_hold_consecutive_records_of_one_partition() -> None:
    records = [record(0, 1), record(0, 2), record(1, 7), record(0, 3), record(0, 9), record(0, 9, stream="other")]
    assert runs_of(records) == (
        Run("events", 0, 1, 3, 2),
        Run("events", 1, 7, 8, 1),
        Run("events", 0, 3, 10, 2),
        Run("other", 0, 9, 10, 1),
    )
    assert runs_of([]) == ()


def test_run_ends_at_the_position_behind_its_last_record() -> None:
    assert runs_of([record(0, 0, 120), record(0, 120, 260)]) == (Run("events", 0, 0, 260, 2),)


def test_records_that_go_back_begin_another_run() -> None:
    assert runs_of([record(0, 5), record(0, 5)]) == (Run("events", 0, 5, 6, 1), Run("events", 0, 5, 6, 1))


def damage(tmp_path: Path, step: int) -> None:
    data = bytearray(segment(tmp_path, step).read_bytes())
    data[40] ^= 1
    segment(tmp_path, step).write_bytes(data)


def test_a_damaged_segment_that_the_checkpoint_does_not_need_is_in_nobodys_way(
    journal: Journal, tmp_path: Path
) -> None:
    fill(journal, 0, 0, 2)
    fill(journal, 2, 2, 2)
    journal.start(4)
    damage(tmp_path, 2)
    again = Journal(tmp_path)
    assert list(again.read(4, after=3)) == []
    with pytest.raises(JournalError, match="is damaged at byte 29"):
        again.reopen()
    again.reopen(after=3)
    assert again.next_sequence == 4
    assert again.set_aside(4) == [tmp_path / "broken" / "journal-000000000002.log"]
    assert again.set_aside(4) == []
    again.append(entry(4))
    again.discard_after(4)
    assert list(again.read(4)) == [entry(4)]
    with pytest.raises(JournalError, match="is missing although later segments exist"):
        list(again.read(2))


def test_the_last_two_damaged_segments_are_kept(journal: Journal, tmp_path: Path) -> None:
    for step in (0, 2, 4, 6):
        fill(journal, step, step, 2)
        damage(tmp_path, step)
    journal.start(8)
    journal.set_aside(8)
    assert [path.name for path in sorted((tmp_path / "broken").iterdir())] == [
        segment(tmp_path, n).name for n in (4, 6)
    ]


def test_verifying_reads_every_segment_and_changes_none(journal: Journal, tmp_path: Path) -> None:
    fill(journal, 0, 0, 2)
    fill(journal, 2, 2, 2)
    fill(journal, 4, 4, 2)
    damage(tmp_path, 2)
    segment(tmp_path, 4).write_bytes(segment(tmp_path, 4).read_bytes()[:-3])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = list(Journal(tmp_path).verify())
    assert found == [
        (segment(tmp_path, 0), ""),
        (segment(tmp_path, 2), "damaged at byte 29"),
        (segment(tmp_path, 4), ""),
    ]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
