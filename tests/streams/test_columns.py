from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from streams.base import Message, Record
from streams.codec import Event, Events
from streams.columns import Mapped, Messages, Records, Stretch
from streams.journal import Run, runs_of


def record(stream: str, partition: int, offset: int) -> Record:
    return Record(stream, partition, offset, offset + 1, float(offset), None, b"v%d" % offset)


def following(offset: int) -> int:
    return offset + 1


def lazy(rows: list[Record]) -> Records:
    offsets = [row.offset for row in rows]
    columns = list(Records.of(rows).columns)
    columns[3] = Mapped(following, offsets)
    return Records(*columns)


_records = st.lists(st.builds(record, st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 6)), max_size=12)


def slow_stretches(rows: list[Record]) -> list[Stretch]:
    found: list[Stretch] = []
    for at, row in enumerate(rows):
        goes_on = found and row[:2] == rows[at - 1][:2] and row.offset > rows[at - 1].offset
        start = found.pop().start if goes_on else at
        found.append(Stretch(row.stream, row.partition, start, at + 1))
    return found


@given(_records, st.integers(0, 12), st.integers(0, 12))
def test_stretches_are_those_of_the_rows_also_in_a_slice(rows: list[Record], first: int, end: int) -> None:
    records = Records.of(rows)
    assert records[first:end].stretches == slow_stretches(rows[first:end])
    assert records.stretches == slow_stretches(rows)
    assert records[first:end].stretches == slow_stretches(rows[first:end])  # now from what is known of the whole
    assert runs_of(rows) == tuple(
        Run(*one[:2], rows[one.start].offset, rows[one.stop - 1].end, one.stop - one.start)
        for one in slow_stretches(rows)
    )


def test_slices_that_are_empty_or_have_steps_are_divided_by_themselves() -> None:
    rows = Records.of([record("a", number % 2, number) for number in range(6)])
    assert len(rows.stretches) == 6
    assert rows[2:2].stretches == rows[5:3].stretches == []
    assert rows[0:4:2].stretches == [Stretch("a", 0, 0, 2)]


@given(_records)
def test_runs_of_one_stream_hold_all_records_in_order(rows: list[Record]) -> None:
    parts = Records.of(rows).by_stream()
    assert [row for _, part in parts for row in part] == rows
    assert all({row.stream for row in part} == {stream} for stream, part in parts)
    assert all(before != after for (before, _), (after, _) in pairwise(parts))


@given(_records, _records)
def test_columns_are_the_rows_whether_made_at_once_or_when_asked_for(some: list[Record], more: list[Record]) -> None:
    for made in (Records.of, lazy):
        joined = Records.joined([made(some), made(more)])
        assert joined == [*some, *more]
        assert [joined[at] for at in range(len(joined))] == [*some, *more]
        assert joined[1:] == [*some, *more][1:]
    assert isinstance(Records.joined([lazy(some), lazy(more)]).ends, Mapped)
    assert list(Records.joined([lazy(some), Records.of(more)]).ends) == [row.end for row in [*some, *more]]


def test_events_keep_their_records_as_columns_through_slices_and_joining() -> None:
    rows = [Event(f"e{n}", b"%d" % n, float(n), None, record("a", n % 2, n)) for n in range(5)]
    events = Events.of(rows)
    assert Events.of(events) is events
    again = Events.joined([events[3:], events[:2]])
    assert again == [*rows[3:], *rows[:2]]
    assert (again.records.partitions, list(again.records.offsets)) == ([1, 0, 0, 1], [3, 4, 0, 1])


def test_messages_of_rows_give_the_rows_back() -> None:
    rows = [Message(b"k", b"v", (("h", b"1"),)), Message(None, b"w")]
    assert list(Messages.of(rows)) == rows
    assert Messages.of([]) == []
