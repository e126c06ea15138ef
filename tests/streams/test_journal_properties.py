from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import Record
from streams.journal import Entry, Journal, JournalError, Kind, Run, runs_of
from streams.journal_format import frame_at, is_sound_after, pack_entry, unpack_entry

_offsets = st.integers(-(2**63), 2**63 - 1)
_names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_runs = st.builds(Run, _names, _offsets, _offsets, _offsets, st.integers(0, 2**32 - 1))
_entries = st.builds(
    Entry,
    st.integers(0, 2**64 - 1),
    st.sampled_from(Kind),
    st.floats(allow_nan=False),
    st.lists(_runs, max_size=5).map(tuple),
)


@given(entry=_entries, before=st.binary(max_size=20))
def test_entry_comes_back_as_it_was(entry: Entry, before: bytes) -> None:
    data = pack_entry(entry)
    payload = frame_at(before + data, len(before))
    assert payload is not None
    assert unpack_entry(payload) == entry
    assert is_sound_after(b"\0" + before + data, 0)
    assert frame_at(data[:-1], 0) is None


def test_unknown_kind_is_refused() -> None:
    payload = frame_at(pack_entry(Entry(0, 99, 0.0)), 0)  # type: ignore[arg-type]
    assert payload is not None
    with pytest.raises(JournalError, match="use the version that wrote it"):
        unpack_entry(payload)


@given(
    rows=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 2), st.integers(1, 3), st.integers(0, 2))),
)
def test_runs_expand_to_the_order_of_the_records(rows: list[tuple[str, int, int, int]]) -> None:
    ends: dict[tuple[str, int], int] = {}
    records = []
    for stream, partition, size, gap in rows:
        first = ends.get((stream, partition), 0) + gap
        ends[stream, partition] = first + size
        records.append(Record(stream, partition, first, first + size, 0.0, None, b""))
    at = 0
    for run in runs_of(records):
        part = records[at : at + run.count]
        assert {(one.stream, one.partition) for one in part} == {(run.stream, run.partition)}
        assert (part[0].offset, part[-1].end) == (run.first, run.end)
        at += run.count
    assert at == len(records)


@settings(max_examples=40, deadline=None)
@given(
    lives=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(0, 200)), min_size=1, max_size=4
    )
)
def test_chain_of_lives_and_torn_ends_keeps_a_prefix_of_what_each_life_wrote(
    lives: list[tuple[list[int], int]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        expected: list[Entry] = []
        step = 0
        for segments, torn in lives:
            journal = Journal(directory)
            kept = list(journal.read(0))
            assert kept == expected[: len(kept)]
            expected = kept
            journal.reopen()
            assert journal.next_sequence == (len(kept) or None)
            for count in segments:
                journal.start(step)
                for _ in range(count):
                    entry = Entry(len(expected), Kind.DATA, 0.5, (Run("events", 0, len(expected), 9, 1),))
                    journal.append(entry)
                    expected.append(entry)
                step += count
            journal.close()
            last = max(directory.iterdir())
            last.write_bytes(last.read_bytes()[: max(last.stat().st_size - torn, 0)])
        kept = list(Journal(directory).read(0))
        assert kept == expected[: len(kept)]
