from __future__ import annotations

from engine.cutter import ArrivalCutter, Cut
from streams.base import Partition
from streams.journal import Entry, Kind, Run
from tests.engine.parts import KINDS
from tests.engine.test_cutter import all_of, entries, item

D0, F0, D1, F1 = ("data", 0), ("feedback", 0), ("data", 1), ("feedback", 1)


def told(cuts: list[Cut]) -> list[tuple[str, list[tuple[str, int, int]]]]:
    return [(cut.kind.name, [(one.record[0], *one.record[1:3]) for one in cut.items]) for cut in cuts]


def feed(cutter: ArrivalCutter, partition: Partition, *offsets: int) -> None:
    cutter.feed([item(partition, n, 0.0) for n in offsets], 0.0)


def rebuilding() -> ArrivalCutter:
    cutter = ArrivalCutter(KINDS, 8, max_delay=0.0)
    cutter.move(Kind.TAKEN, [Run(*D0, 0, 2, 0), Run(*F0, 0, 1, 0)])
    cutter.assigned([D0, F0, D1, F1], {D0: 2, F0: 1})
    return cutter


def test_what_was_seen_before_is_cut_data_first_then_feedback_then_what_waited_behind_it() -> None:
    cutter = rebuilding()
    feed(cutter, F0, 0, 1)
    feed(cutter, D0, 0)
    feed(cutter, D1, 0)
    feed(cutter, F1, 0)
    first = told(all_of(cutter))
    assert [kind for kind, _ in first] == ["TAKEN", "SEEN_DATA", "DATA", "FEEDBACK"], "others go on meanwhile"
    assert first[3][1] == [("feedback", 1, 0)], "no feedback of the rebuilt partition before its data is complete"
    assert cutter.starved == {"data"}, "read on, however much waits behind it"
    feed(cutter, D0, 1, 2)
    assert told(all_of(cutter)) == [
        ("SEEN_DATA", [("data", 0, 1)]),
        ("SEEN_FEEDBACK", [("feedback", 0, 0)]),
        ("DATA", [("data", 0, 2)]),
        ("FEEDBACK", [("feedback", 0, 1)]),
    ]
    assert not cutter.rebuilding


def test_a_partition_whose_last_offsets_give_no_record_is_complete_once_it_is_read_past_them() -> None:
    cutter = rebuilding()
    feed(cutter, D0, 0)
    feed(cutter, F0, 0)
    assert [kind for kind, _ in told(all_of(cutter))] == ["TAKEN", "SEEN_DATA"]
    cutter.read([D0])
    assert [kind for kind, _ in told(all_of(cutter))] == ["SEEN_FEEDBACK"]
    assert cutter.starved == {"feedback"}
    cutter.read([F0])
    assert told(all_of(cutter)) == []
    assert not cutter.rebuilding
    assert cutter.starved == frozenset()


def test_a_partition_that_goes_in_the_middle_takes_with_it_what_waits() -> None:
    cutter = rebuilding()
    feed(cutter, F0, 0, 1)
    feed(cutter, D1, 0)
    cutter.revoked([D0, F0])
    assert told(all_of(cutter)) == [("DATA", [("data", 1, 0)])]
    assert cutter.taken == {"data": 1, "feedback": 2}
    assert cutter.exhausted() is False
    assert not cutter.rebuilding


def test_a_journal_that_ends_in_the_middle_of_a_rebuild_is_repeated_and_gone_on_with() -> None:
    first = rebuilding()
    feed(first, D0, 0)
    done = entries(all_of(first))
    again = ArrivalCutter(KINDS, 8, done, max_delay=0.0)
    again.assigned([D0, F0], {D0: 2, F0: 1})
    feed(again, F0, 0, 1)
    feed(again, D0, 0, 1, 2)
    cuts = all_of(again)
    assert [cut.replayed for cut in cuts] == [True, True, False, False, False, False]
    assert [kind for kind, _ in told(cuts)] == ["TAKEN", "SEEN_DATA", "SEEN_DATA", "SEEN_FEEDBACK", "DATA", "FEEDBACK"]


def test_moves_outlive_a_replay_that_is_given_up_and_name_no_awaited_records() -> None:
    journal = [Entry(1, Kind.LEFT, 0.0, (Run(*D1, 0, 0, 0),)), Entry(2, Kind.DATA, 0.0, (Run(*D0, 0, 2, 2),))]
    cutter = ArrivalCutter(KINDS, 8, journal, max_delay=0.0)
    assert (cutter.awaited(), cutter.named()) == ({D0}, {D0, D1})
    assert cutter.take_moves() == []
    cutter.abandon()
    assert [cut.kind for cut in cutter.take_moves()] == [Kind.LEFT]
