from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cutter import ArrivalCutter, Bad, Cut, Cutter, Item, split
from engine.timecutter import TimeCutter
from streams.base import Partition, Record, StreamError
from streams.codec import BadRecord, Event, Feedback, Reason
from streams.journal import Entry, Kind, runs_of

DATA, FEEDBACK = "data", "feedback"
KINDS = {DATA: Kind.DATA, FEEDBACK: Kind.FEEDBACK}
PARTITIONS: list[Partition] = [(DATA, 0), (DATA, 1), (FEEDBACK, 0)]

Streams = dict[Partition, list[Item]]


def item(partition: Partition, offset: int, time: float | None) -> Item:
    stream, number = partition
    record = Record(stream, number, offset, offset + 1, math.nan, None, b"")
    if time is None:
        return Bad(record, BadRecord(Reason.NOT_JSON, "no"))
    if stream == DATA:
        return Event(f"{number}-{offset}", b"", time, None, record)
    return Feedback(f"{number}-{offset}", 1, None, time, None, record)


def keys(items: Sequence[Item]) -> list[tuple[str, int, int]]:
    return [(i.record.stream, i.record.partition, i.record.offset) for i in items]


def seen(cuts: Sequence[Cut]) -> list[tuple[Kind, list[tuple[str, int, int]]]]:
    return [(cut.kind, keys(cut.items)) for cut in cuts]


def entries(cuts: Sequence[Cut], start: int = 1) -> list[Entry]:
    return [Entry(number, cut.kind, 0.0, cut.runs) for number, cut in enumerate(cuts, start)]


@st.composite
def streams(draw: st.DrawFn, *, ordered: bool = False) -> Streams:
    found: Streams = {}
    for partition in PARTITIONS:
        times = draw(st.lists(st.integers(0, 6), max_size=8))
        if ordered:
            times.sort()
        bad = draw(st.sets(st.integers(0, 7), max_size=2))
        found[partition] = [item(partition, n, None if n in bad else float(t)) for n, t in enumerate(times)]
    return found


def all_of(cutter: Cutter, now: float = 0.0) -> list[Cut]:
    cuts = []
    while (cut := cutter.next(now)) is not None:
        cuts.append(cut)
    return cuts


def at_once(cutter: Cutter, found: Streams, now: float = 0.0) -> list[Cut]:
    cutter.assigned(found)
    for items in found.values():
        cutter.feed(items, now)
    cutter.ended(found)
    return all_of(cutter, now)


def in_chunks(draw: random.Random, cutter: Cutter, found: Streams) -> list[Cut]:
    """Feed in any order between partitions, in chunks of any size, asking for cuts and ending at any moment."""
    cutter.assigned(found)
    left = {partition: list(items) for partition, items in found.items()}
    cuts: list[Cut] = []
    while left:
        partition = draw.choice(sorted(left))
        size = draw.randint(1, 5)
        chunk, left[partition] = left[partition][:size], left[partition][size:]
        cutter.feed(chunk, 0.0)
        if draw.random() < 0.5:
            cuts += all_of(cutter)
        if not left[partition] and draw.random() < 0.5:
            cutter.ended([partition])
            del left[partition]
    return cuts + all_of(cutter)


# -- by event time ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), found=streams(), size=st.integers(1, 5))
def test_cuts_by_time_depend_on_the_records_alone(seed: int, found: Streams, size: int) -> None:
    whole = at_once(TimeCutter(KINDS, size), found)
    cutter = TimeCutter(KINDS, size)
    assert seen(in_chunks(random.Random(seed), cutter, found)) == seen(whole)
    assert cutter.exhausted()


@settings(max_examples=150, deadline=None)
@given(found=streams(), size=st.integers(1, 5))
def test_by_time_every_record_is_cut_once_in_order_and_batches_of_data_are_full(found: Streams, size: int) -> None:
    cuts = at_once(TimeCutter(KINDS, size), found)
    for partition, items in found.items():
        mine = [key for cut in cuts for key in keys(cut.items) if key[:2] == partition]
        assert mine == keys(items)
    data = [cut for cut in cuts if cut.kind is Kind.DATA]
    assert all(len(cut.items) == size for cut in data[:-1])
    assert all(0 < len(cut.items) <= size for cut in cuts)
    for cut in cuts:
        assert {KINDS[stream] for stream, *_ in keys(cut.items)} == {cut.kind}
        assert cut.runs == runs_of([one.record for one in cut.items])


@settings(max_examples=100, deadline=None)
@given(found=streams(ordered=True), size=st.integers(1, 5))
def test_feedback_older_than_the_last_event_of_a_batch_comes_before_the_batch(found: Streams, size: int) -> None:
    cuts = at_once(TimeCutter(KINDS, size), found)
    for number, cut in enumerate(cuts):
        if cut.kind is Kind.DATA and len(cut.items) == size:
            newest = max((one.time for one in cut.items if not isinstance(one, Bad)), default=-math.inf)
            later = [one for after in cuts[number:] for one in after.items if isinstance(one, Feedback)]
            assert all(one.time >= newest for one in later)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), found=streams(ordered=True), size=st.integers(1, 4))
def test_a_replayed_prefix_goes_on_with_the_same_cuts(seed: int, found: Streams, size: int) -> None:
    whole = at_once(TimeCutter(KINDS, size), found)
    draw = random.Random(seed)
    done = draw.randint(0, len(whole))
    saved = draw.randint(0, done)
    rest = dict(found)
    for cut in whole[:saved]:  # a checkpoint after `saved` cuts, a journal that goes on to `done`
        for (stream, number), end in cut.positions().items():
            rest[stream, number] = [one for one in found[stream, number] if one.record.offset >= end]
    cutter = TimeCutter(KINDS, size, entries(whole[saved:done], saved + 1))
    again = in_chunks(draw, cutter, rest)
    assert seen(again) == seen(whole[saved:])
    assert [cut.replayed for cut in again] == [True] * (done - saved) + [False] * (len(whole) - done)


def test_bad_records_stay_in_their_place() -> None:
    found: Streams = {(DATA, 0): [item((DATA, 0), 0, 5.0), item((DATA, 0), 1, None), item((DATA, 0), 2, 6.0)]}
    (cut,) = at_once(TimeCutter({DATA: Kind.DATA}, 3), found)
    assert [type(one) for one in cut.items] == [Event, Bad, Event]
    good, bad = split(cut.items)
    assert [one.record.offset for one in good] == [0, 2]
    assert [one.record.offset for one in bad] == [1]


def test_a_partition_that_ends_early_holds_up_nobody() -> None:
    cutter = TimeCutter(KINDS, 2)
    cutter.assigned(PARTITIONS)
    cutter.feed([item((DATA, 0), n, float(n)) for n in range(4)], 0.0)
    assert cutter.next(0.0) is None
    cutter.ended([(DATA, 1)])
    assert cutter.next(0.0) is None
    cutter.ended([(FEEDBACK, 0)])
    assert [len(cut.items) for cut in all_of(cutter)] == [2, 2]
    assert not cutter.exhausted()
    cutter.ended([(DATA, 0)])
    assert cutter.next(0.0) is None
    assert cutter.exhausted()


# -- by arrival ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), found=streams(), size=st.integers(1, 5))
def test_by_arrival_every_record_is_cut_once_in_order(seed: int, found: Streams, size: int) -> None:
    cutter = ArrivalCutter(KINDS, size, max_delay=1.0)
    cuts = in_chunks(random.Random(seed), cutter, found)
    assert cutter.exhausted()
    for partition, items in found.items():
        assert [key for cut in cuts for key in keys(cut.items) if key[:2] == partition] == keys(items)
    assert all(0 < len(cut.items) <= size for cut in cuts)
    assert cutter.taken == {s: sum(len(items) for p, items in found.items() if p[0] == s) for s in KINDS}


def unbounded(size: int, delay: float) -> ArrivalCutter:
    cutter = ArrivalCutter(KINDS, size, max_delay=delay)
    cutter.assigned(PARTITIONS)
    return cutter


def test_a_full_batch_waits_for_nothing_and_a_smaller_one_until_its_oldest_record_is_due() -> None:
    cutter = unbounded(3, 10.0)
    cutter.feed([item((DATA, 0), n, 0.0) for n in range(4)], now=100.0)
    assert cutter.deadline() == -math.inf
    assert [len(cut.items) for cut in all_of(cutter, 100.0)] == [3]
    assert cutter.deadline() == 110.0
    cutter.feed([item((DATA, 0), 4, 0.0)], now=105.0)
    assert cutter.deadline() == 110.0
    assert cutter.next(109.9) is None
    assert [len(cut.items) for cut in all_of(cutter, 110.0)] == [2]
    assert cutter.deadline() == math.inf
    assert cutter.next(1e9) is None


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(PARTITIONS), st.integers(1, 4), st.integers(0, 4)), max_size=12),
    size=st.integers(1, 4),
)
def test_no_record_waits_longer_than_the_delay(steps: list[tuple[Partition, int, int]], size: int) -> None:
    cutter = unbounded(size, 3.0)
    now, offsets, arrived = 0.0, dict.fromkeys(PARTITIONS, 0), dict[tuple[str, int, int], float]()
    for partition, count, pause in steps:
        items = [item(partition, offsets[partition] + n, 0.0) for n in range(count)]
        offsets[partition] += count
        arrived |= dict.fromkeys(keys(items), now)
        cutter.feed(items, now)
        counts = Counter(KINDS[key[0]] for key in arrived)
        assert cutter.deadline() == -math.inf if max(counts.values()) >= size else cutter.deadline() >= now
        now += pause
        for cut in all_of(cutter, now):
            for key in keys(cut.items):
                del arrived[key]
        assert all(now < when + 3.0 for when in arrived.values())
        assert cutter.deadline() == min([when + 3.0 for when in arrived.values()], default=math.inf)


def test_data_and_feedback_take_turns() -> None:
    cutter = unbounded(2, 1.0)
    cutter.feed([item((DATA, 0), n, 0.0) for n in range(6)], 0.0)
    cutter.feed([item((FEEDBACK, 0), n, 0.0) for n in range(4)], 0.0)
    kinds = [cut.kind for cut in all_of(cutter)]
    assert kinds == [Kind.DATA, Kind.FEEDBACK, Kind.DATA, Kind.FEEDBACK, Kind.DATA]


def test_the_journal_is_repeated_and_what_is_left_over_follows() -> None:
    found: Streams = {p: [item(p, n, 0.0) for n in range(5)] for p in PARTITIONS}
    before = ArrivalCutter(KINDS, 3, max_delay=1.0)
    whole = at_once(before, found)
    journal = [*entries(whole[:2]), Entry(3, Kind.DONE, 0.0), *entries(whole[2:3], 4)]
    cutter = ArrivalCutter(KINDS, 3, journal, max_delay=1.0)
    assert cutter.replaying == 4
    cuts = at_once(cutter, found)
    assert seen(cuts[:2] + cuts[3:4]) == seen(whole[:3])
    assert cuts[2].kind is Kind.DONE
    assert [cut.replayed for cut in cuts[:5]] == [True] * 4 + [False]
    for partition, items in found.items():
        assert [key for cut in cuts for key in keys(cut.items) if key[:2] == partition] == keys(items)
    assert cutter.exhausted()


def test_a_replay_waits_for_the_records_that_it_needs() -> None:
    records = [item((DATA, 0), n, 0.0) for n in range(3)]
    journal = [Entry(1, Kind.DATA, 0.0, runs_of([one.record for one in records]))]
    cutter = ArrivalCutter(KINDS, 2, journal, max_delay=1.0)
    cutter.assigned(PARTITIONS)
    cutter.feed(records[:2], 0.0)
    assert cutter.next(1e9) is None
    assert cutter.deadline() == math.inf
    cutter.feed(records[2:], 0.0)
    cut = cutter.next(0.0)
    assert cut is not None
    assert len(cut.items) == 3, "as the journal says, whatever the size is now"


@pytest.mark.parametrize("kind", ["arrival", "time"])
@pytest.mark.parametrize("change", ["shorter", "other lengths", "gone"])
def test_a_stream_that_has_changed_is_refused_with_a_sentence(kind: str, change: str) -> None:
    records = [item((DATA, 0), n, 0.0) for n in range(3)]
    stream = "old" if change == "gone" else DATA
    runs = runs_of([one.record._replace(stream=stream) for one in records])
    journal = [Entry(1, Kind.DATA, 0.0, runs)]
    cutter: Cutter = TimeCutter(KINDS, 2, journal)
    if kind == "arrival":
        cutter = ArrivalCutter(KINDS, 2, journal, max_delay=1.0)
    cutter.assigned(PARTITIONS)
    if change == "other lengths":
        records = [one._replace(record=one.record._replace(end=one.record.end + 7)) for one in records]
    cutter.feed(records[:2] if change == "shorter" else records, 0.0)
    cutter.ended(PARTITIONS)
    with pytest.raises(StreamError, match=f"{stream}-0 does not hold the records that the journal says .* --fresh"):
        cutter.next(0.0)


def test_what_is_revoked_is_dropped_and_counted_and_the_rest_is_cut() -> None:
    cutter = unbounded(3, 10.0)
    cutter.feed([item((DATA, 0), 0, 0.0), item((DATA, 1), 0, 0.0), item((DATA, 0), 1, 0.0)], 0.0)
    cutter.feed([item((DATA, 1), 1, 0.0)], 5.0)
    cutter.revoked([(DATA, 0)])
    assert cutter.taken[DATA] == 2
    assert cutter.next(0.0) is None
    assert cutter.deadline() == 10.0
    assert seen(all_of(cutter, 10.0)) == [(Kind.DATA, [(DATA, 1, 0), (DATA, 1, 1)])]
    assert cutter.taken[DATA] == 4
    cutter.assigned([(DATA, 0)])
    cutter.feed([item((DATA, 0), 0, 0.0)], 20.0)
    assert seen(all_of(cutter, 30.0)) == [(Kind.DATA, [(DATA, 0, 0)])]


def test_the_positions_of_a_cut_are_behind_its_last_records() -> None:
    cutter = unbounded(4, 0.0)
    cutter.feed([item((DATA, 0), 0, 0.0), item((DATA, 1), 7, 0.0), item((DATA, 0), 1, 0.0)], 0.0)
    (cut,) = all_of(cutter)
    assert cut.positions() == {(DATA, 0): 2, (DATA, 1): 8}
