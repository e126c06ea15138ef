from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from streams.join_format import Waiting
from streams.join_rows import Rows, WaitingRows
from streams.join_size import event_bytes

_events = st.builds(
    Waiting, st.integers(0, 900).map("id-{}".format), st.sampled_from([b"", b"xyz"]), st.integers(0, 9).map(float),
    st.sampled_from([None, "eu"]), st.integers(0, 9), st.integers(-1, 9), st.integers(0, 3),
)  # fmt: skip
_steps = st.lists(st.lists(_events, max_size=400) | st.integers(1, 7), max_size=8)


def rows_of(rows: Rows) -> dict[str, Waiting]:
    return {row.id: row for row in rows.copy()}


@settings(max_examples=60, deadline=None)
@given(_steps)
def test_rows_are_a_table_in_the_order_of_coming(steps: list[list[Waiting] | int]) -> None:
    rows, table = Rows(), dict[str, Waiting]()
    for step in steps:
        if isinstance(step, int):
            for name in list(table)[::step]:
                event = table.pop(name)
                assert rows.get(name) == event[1:]
                assert rows.pop(name) == event[1:]
        else:
            known = len(step)
            for event in step:
                known -= event.id not in table
                table.setdefault(event.id, event)
            assert rows.extend(WaitingRows.of(step)) == known
    assert list(rows.copy()) == list(table.values())
    assert (len(rows), rows.get("id")) == (len(table), None)
    assert rows.bytes == sum(event_bytes(event.id, event.inputs, event.group) for event in table.values())
    assert rows.older(5.0) == [event.id for event in table.values() if event.time < 5.0]
    assert rows.of({1, 2}) == [event.id for event in table.values() if event.partition in {1, 2}]


def test_the_oldest_are_as_many_as_free_a_size() -> None:
    events = [Waiting(f"id-{n}", bytes(100), 0.0, None, 0, 0) for n in range(600)]
    rows = Rows()
    rows.extend(WaitingRows.of(events))
    size = event_bytes(events[0].id, events[0].inputs, None)
    assert rows.oldest(0) == []
    assert rows.oldest(2 * size - 1) == ["id-0", "id-1"]
    assert rows.oldest(10**9) == [event.id for event in events]


def test_a_copy_keeps_its_instant() -> None:
    rows = Rows()
    rows.extend(WaitingRows.of([Waiting(f"id-{n}", b"x", 0.0, None, 0, 0) for n in range(300)]))
    copy = rows.copy()
    for n in range(299):
        rows.remove(f"id-{n}")
    assert (len(copy), [row.id for row in rows.copy()]) == (300, ["id-299"])
    assert copy[7] == Waiting("id-7", b"x", 0.0, None, 0, 0)


def test_the_few_that_are_left_of_many_lie_together() -> None:
    rows, count = Rows(), 256 * 40
    events = [Waiting(f"id-{n}", b"xyz", float(n), None, 0, 0, 0) for n in range(count)]
    rows.extend(WaitingRows.of(events))
    left = events[::100]
    for event in set(events) - set(left):
        rows.remove(event.id)
    assert list(rows.copy()) == left
    assert len(rows._blocks) <= 16, "each takes memory that nothing counts"
    assert rows.bytes == sum(event_bytes(event.id, event.inputs, event.group) for event in left)
    assert rows.oldest(1) == [left[0].id]
    assert rows.extend(WaitingRows.of(left[:3])) == 3
    assert rows.pop(left[-1].id) == left[-1][1:]
