from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.join_format import Fields, Waiting
from streams.join_pack import WaitingRows
from streams.join_rows import Rows, SharedRows
from streams.join_size import event_bytes

_events = st.builds(
    Waiting, st.integers(0, 900).map("id-{}".format), st.sampled_from([b"", b"xyz"]), st.integers(0, 9).map(float),
    st.sampled_from([None, "eu"]), st.integers(0, 9), st.integers(-1, 9), st.integers(0, 3),
)  # fmt: skip
_steps = st.lists(st.lists(_events, max_size=400) | st.integers(1, 7), max_size=8)


def pop(rows: Rows, name: str) -> Fields:
    fields = rows.get(name)
    assert fields is not None
    rows.remove(name, fields)
    return fields


@settings(max_examples=60, deadline=None)
@given(_steps)
def test_rows_are_a_table_in_the_order_of_coming(steps: list[list[Waiting] | int]) -> None:
    rows, table = Rows(), dict[str, Waiting]()
    shared: list[tuple[SharedRows, list[Waiting]]] = []
    for step in steps:
        shared.append((rows.share(), list(table.values())))
        if isinstance(step, int):
            for name in list(table)[::step]:
                event = table.pop(name)
                assert rows.get(name) == event[1:]
                assert pop(rows, name) == event[1:]
        else:
            known = len(step)
            for event in step:
                known -= event.id not in table
                table.setdefault(event.id, event)
            assert rows.extend(WaitingRows.of(step)) == known
    shared.append((rows.share(), list(table.values())))
    for copy, then in shared:
        assert list(copy.whole()) == then, "what was given away does not change any more"
        assert max(copy.longest(), default=0) == max((len(event.inputs) for event in then), default=0)
    assert (len(rows), rows.get("id")) == (len(table), None)
    assert rows.bytes == sum(event_bytes(event.id, len(event.inputs), event.group) for event in table.values())
    assert rows.take_before(5.0) == [event.id for event in table.values() if event.time < 5.0]
    left = [event for event in table.values() if event.time >= 5.0]
    assert rows.take_of({1, 2}) == [event.id for event in left if event.partition in {1, 2}]
    left = [event for event in left if event.partition not in {1, 2}]
    assert list(rows.share().whole()) == left
    assert rows.bytes == sum(event_bytes(event.id, len(event.inputs), event.group) for event in left)


@pytest.mark.parametrize("gone", [(), (0, 3, 4, 255, 256, 511)])
def test_the_oldest_that_are_taken_are_as_many_as_free_a_size(gone: tuple[int, ...]) -> None:
    events = [Waiting(f"id-{n}", bytes(100 + n % 3), 0.0, None, 0, 0) for n in range(600)]
    rows = Rows()
    rows.extend(WaitingRows.of(events))
    for n in gone:
        pop(rows, f"id-{n}")
    left = [event for n, event in enumerate(events) if n not in gone]
    shared = rows.share()
    assert list(rows.take_oldest(0)) == []
    for size in (1, 5000, 60_000, 5000, 10**9, 1):
        wanted, taken = 0, 0
        while taken < size and wanted < len(left):
            taken += event_bytes(left[wanted].id, len(left[wanted].inputs), None)
            wanted += 1
        before = rows.bytes
        assert list(rows.take_oldest(size)) == left[:wanted]
        assert before - rows.bytes == taken
        left = left[wanted:]
        assert list(rows.share().whole()) == left
        assert [rows.get(event.id) for event in left] == [event[1:] for event in left]
    assert (len(rows), rows.bytes) == (0, 0)
    assert len(shared.whole()) == 600 - len(gone)


def test_an_event_that_was_given_away_can_be_replaced_by_one_of_the_same_id() -> None:
    rows = Rows()
    rows.extend(WaitingRows.of([Waiting("id", b"x", 0.0, None, 0, 0)]))
    shared = rows.share()
    pop(rows, "id")
    rows.extend(WaitingRows.of([Waiting("id", b"other", 1.0, None, 0, 0)]))
    assert [row.inputs for row in (*shared.whole(), *rows.share().whole())] == [b"x", b"other"]


def test_a_copy_keeps_its_instant() -> None:
    rows = Rows()
    rows.extend(WaitingRows.of([Waiting(f"id-{n}", b"x", 0.0, None, 0, 0) for n in range(300)]))
    copy = rows.share()
    for n in range(299):
        pop(rows, f"id-{n}")
    assert (len(copy.whole()), [row.id for row in rows.share().whole()]) == (300, ["id-299"])
    assert copy.whole()[7] == Waiting("id-7", b"x", 0.0, None, 0, 0)


def test_the_few_that_are_left_of_many_lie_together() -> None:
    rows, count = Rows(), 256 * 40
    events = [Waiting(f"id-{n}", b"xyz", float(n), None, 0, 0, 0) for n in range(count)]
    rows.extend(WaitingRows.of(events))
    left = events[::100]
    for event in set(events) - set(left):
        pop(rows, event.id)
    assert list(rows.share().whole()) == left
    assert len(rows._blocks) <= 16, "each takes memory that nothing counts"
    assert rows.bytes == sum(event_bytes(event.id, len(event.inputs), event.group) for event in left)
    assert rows.extend(WaitingRows.of(left[:3])) == 3
    assert pop(rows, left[-1].id) == left[-1][1:]
    assert list(rows.take_oldest(1)) == left[:1]


@pytest.mark.parametrize(
    ("small", "large", "every"),
    [(16, 1 << 16, 256), (2048, 120_000, 9), (16, 3 << 20, 100)],
    ids=["few", "many", "huge"],
)
def test_inputs_of_very_different_length_neither_stay_nor_are_packed_again_and_again(
    small: int, large: int, every: int
) -> None:
    rows = Rows()
    events = [Waiting(f"id-{n}", bytes(small if n % every else large), 0.0, None, 0, 0) for n in range(1800)]
    rows.extend(WaitingRows.of(events))
    most = 2 + sum(len(event.inputs) for event in events) // (1 << 19) + 1800 // 256
    assert len(rows._blocks) <= most, "one that is long fills its own block alone"
    for event in events[::every]:
        pop(rows, event.id)
    for event in events[1:1800:every]:
        pop(rows, event.id)
    held = sum(block.packed.bytes for block in rows._blocks.values())
    left = [event for n, event in enumerate(events) if n % every > 1]
    assert list(rows.share().whole()) == left
    assert held <= rows.bytes
    assert all(
        block.packed.heads.base is None or len(block.packed.heads.base) < 1800 for block in rows._blocks.values()
    )


def test_blocks_are_not_put_together_again_before_much_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, counts = Rows(), list[int]()
    rows.extend(WaitingRows.of([Waiting(f"id-{n}", b"", 0.0, None, 0, 0) for n in range(512 * 40)]))
    extend = Rows.extend

    def counted(self: Rows, events: WaitingRows) -> int:
        counts.append(len(events))
        return extend(self, events)

    monkeypatch.setattr(Rows, "extend", counted)
    for n in range(512 * 40):
        if n % 512 > 1:
            pop(rows, f"id-{n}")
    assert 0 < sum(counts) < 512 * 40


def test_an_event_without_a_time_keeps_no_other_from_expiring() -> None:
    rows = Rows()
    rows.extend(
        WaitingRows.of([Waiting(f"id-{n}", b"", at, None, 0, 0) for n, at in enumerate((1.0, float("nan"), 2.0))])
    )
    assert rows.take_before(9.0) == ["id-0", "id-2"]
