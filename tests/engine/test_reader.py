from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import anyio
import numpy as np
import pytest
from anyio import to_thread

from engine import reader as module
from engine.cutter import Bad
from engine.holdings import Standing
from engine.reader import GATHER_SECONDS, POLL_RECORDS, Chunk, Reader
from streams.base import Assignment, Found, Partition, Positions, Record, StreamError, StreamUnavailableError
from streams.codec import Event, Feedback, InputSpec, encode_event, encode_feedback
from streams.journal import Kind
from streams.memory import MemorySource

SPEC = InputSpec((2,), np.dtype("<f4"))
KINDS = {"data": Kind.DATA, "feedback": Kind.FEEDBACK}


def event(number: int) -> bytes:
    return encode_event(f"e{number}", np.zeros(2, np.float32), time=float(number))


class Harness:
    """A reader on a source in memory, and what it handed over."""

    def __init__(self, source: MemorySource, *, high: int = 1000, start: Positions | None = None) -> None:
        self.source = source
        self.taken = dict.fromkeys(source.streams, 0)
        self.chunks: list[Chunk] = []
        self.revocations: list[tuple[list[Partition], bool]] = []
        self.reader = Reader(
            source, KINDS, SPEC, start or {}, hand_over=self.hand_over, revoked=self.revoked, high=high
        )

    def hand_over(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        if chunk.ended:
            self.reader.stop()

    async def revoked(self, partitions: Sequence[Partition], lost: bool, within: float) -> Standing:
        self.revocations.append((list(partitions), lost))
        return Standing(dict.fromkeys(partitions, 77), {}, dict.fromkeys(partitions, 33))

    async def run(self) -> None:
        await to_thread.run_sync(self.reader.open)
        await to_thread.run_sync(self.reader.run, self.taken)

    @property
    def items(self) -> list[object]:
        return [one for chunk in self.chunks for items in chunk.items for one in items]


def filled(count: int, **streams: int) -> MemorySource:
    source = MemorySource(streams or {"data": 1})
    for number in range(count):
        source.append("data", event(number))
    return source


async def test_good_and_bad_records_come_in_the_order_of_the_stream() -> None:
    source = filled(2)
    source.append("data", b"{not json")
    source.append("data", event(3))
    source.append("data", b'{"id": 7}')
    harness = Harness(source)
    with anyio.fail_after(60):
        await harness.run()
    assert [type(one) for one in harness.items] == [Event, Event, Bad, Event, Bad]
    assert [one.record.offset for one in harness.items if isinstance(one, Event | Bad)] == [0, 1, 2, 3, 4]
    assert (harness.reader.seen, harness.reader.waiting(harness.taken)) == (5, 5)


class Live(MemorySource):
    """A source and a clock: records come while somebody sleeps, or waits for the first of them."""

    def __init__(self, sleeps: Sequence[int], waits: Sequence[int]) -> None:
        super().__init__({"data": 1}, bounded=False)
        self.now = 100.0
        self.slept: list[float] = []
        self._sleeps, self._waits, self._count = list(sleeps), list(waits), 0

    def come(self, count: int) -> None:
        for _ in range(count):
            self.append("data", event(self._count))
            self._count += 1

    def monotonic(self) -> float:
        return self.now

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        found = super().poll(max_records, 0.0)
        if found or not timeout:
            return found
        self.now += 1.0
        if not self._waits:
            self.finish()
        else:
            self.come(self._waits.pop(0))
        return super().poll(max_records, 0.0)

    def is_set(self) -> bool:
        return self.bounded

    def set(self) -> None:
        self.finish()

    def wait(self, seconds: float) -> None:
        if self.bounded:  # all is over
            return
        self.slept.append(seconds)
        self.now += seconds
        self.come(self._sleeps.pop(0) if self._sleeps else 0)


def live(
    monkeypatch: pytest.MonkeyPatch,
    sleeps: Sequence[int],
    waits: Sequence[int],
    *,
    size: int = 64,
    delay: float = 0.004,
) -> tuple[Live, Harness]:
    """A reader on such a source, which is its clock as well, and what it sleeps on."""
    source = Live(sleeps, waits)
    monkeypatch.setattr(module, "CLOCK", source)
    harness = Harness(source, high=100_000)
    harness.reader.resize(100_000, size, delay)
    monkeypatch.setattr(harness.reader, "_stop", source)
    return source, harness


async def test_records_that_come_a_few_at_a_time_are_gathered_for_most_of_a_batchs_delay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, harness = live(monkeypatch, sleeps=[3, 4, 0], waits=[1, 2])
    with anyio.fail_after(60):
        await harness.run()
    given = [(len(chunk.items[0]), round(chunk.since, 6)) for chunk in harness.chunks if chunk.items]
    # What was there after a sleep may have come since the poll before; what was waited for came when the wait ended.
    assert given == [(1, 101.0), (3, 101.0), (4, 101.0032), (2, 102.0096)]
    assert [round(seconds, 6) for seconds in source.slept] == [0.0032] * 4


@pytest.mark.parametrize(("size", "delay"), [(1, 1.0), (64, 0.0)], ids=["full at once", "no delay"])
async def test_nothing_is_gathered_for_batches_that_do_not_wait(
    monkeypatch: pytest.MonkeyPatch, size: int, delay: float
) -> None:
    source, harness = live(monkeypatch, sleeps=[], waits=[1, 1], size=size, delay=delay)
    with anyio.fail_after(60):
        await harness.run()
    assert ([len(chunk.items[0]) for chunk in harness.chunks if chunk.items], source.slept) == ([1, 1], [])


async def test_however_long_a_batch_waits_records_are_gathered_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    source, harness = live(monkeypatch, sleeps=[], waits=[1], delay=60.0)
    with anyio.fail_after(60):
        await harness.run()
    assert [round(seconds, 6) for seconds in source.slept] == [GATHER_SECONDS]


async def test_what_has_its_end_or_is_paused_or_rebuilt_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    source, harness = live(monkeypatch, sleeps=[], waits=[0, 0, 0])
    reader = harness.reader
    await to_thread.run_sync(reader.open)
    reader._few, reader._paused = True, {"data"}
    reader._room.set()
    reader._gather()
    reader._paused, reader._rebuilding = set(), {("data", 0): 5}
    reader._gather()
    assert source.slept == []
    reader._rebuilding = {}
    reader.last_poll = source.now
    reader._gather()
    assert len(source.slept) == 1
    bounded = Harness(filled(3))
    bounded.reader.resize(1000, 64, 1.0)
    await bounded.run()
    assert not bounded.reader._few


async def test_a_backlog_is_read_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    source, harness = live(monkeypatch, sleeps=[], waits=[], size=4096)
    source.come(2 * POLL_RECORDS)
    with anyio.fail_after(60):
        await harness.run()
    assert [len(chunk.items[0]) for chunk in harness.chunks if chunk.items] == [POLL_RECORDS, POLL_RECORDS]
    assert len(source.slept) == 1  # after the second, which was not full


async def test_each_stream_is_decoded_as_what_it_carries() -> None:
    source = MemorySource({"data": 1, "feedback": 1})
    source.append("feedback", encode_feedback("e0", label=1, time=1.0))
    source.append("data", event(0))
    harness = Harness(source)
    with anyio.fail_after(60):
        await harness.run()
    assert {one.record.stream: type(one) for one in harness.items if isinstance(one, Event | Feedback)} == {
        "data": Event,
        "feedback": Feedback,
    }


async def test_the_end_is_told_once_and_after_every_record() -> None:
    harness = Harness(filled(3))
    with anyio.fail_after(60):
        await harness.run()
    assert [bool(chunk.ended) for chunk in harness.chunks] == [False, True]
    assert harness.chunks[1].ended == {("data", 0)}


async def test_a_source_that_has_ended_is_not_polled_without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    polls, waits = list[float](), list[float]()

    class Counting(MemorySource):
        def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
            polls.append(timeout)
            if len(polls) > 50:
                raise StreamError("this goes round and round")
            return super().poll(max_records, timeout)

    source = Counting({"data": 1})
    source.append("data", event(0))
    harness = Harness(source)
    harness.reader._hand_over = harness.chunks.append

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        harness.reader.stop()
        return True

    monkeypatch.setattr(harness.reader._stop, "wait", wait)
    with anyio.fail_after(60):
        await harness.run()
    assert (len(polls), waits) == (1, [module.POLL_SECONDS])


async def test_reading_begins_at_the_given_positions() -> None:
    harness = Harness(filled(5), start={("data", 0): 3})
    with anyio.fail_after(60):
        await harness.run()
    assert [one.record.offset for one in harness.items if isinstance(one, Event)] == [3, 4]
    assert harness.reader.partitions == [("data", 0)]


async def test_a_stream_is_paused_while_too_much_of_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_RECORDS", 4)
    harness = Harness(filled(100), high=8)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harness.run)
            most = 0
            while harness.taken["data"] < 100:
                while harness.reader.paused != ("data",) and len(harness.items) < 100:
                    await anyio.sleep(0)
                waiting = harness.reader.waiting(harness.taken)
                most = max(most, waiting)
                harness.taken["data"] = len(harness.items)
                harness.reader.used()
                while harness.reader.paused:
                    await anyio.sleep(0)
    assert 8 <= most < 8 + 4
    assert [one.record.offset for one in harness.items if isinstance(one, Event)] == list(range(100))


async def test_a_paused_stream_does_not_hold_up_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_RECORDS", 8)
    source = filled(50, data=1, feedback=1)
    for number in range(50):
        source.append("feedback", encode_feedback(f"e{number}", label=1, time=1.0))
    harness = Harness(source, high=4)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harness.run)
            while sum(isinstance(one, Feedback) for one in harness.items) < 50:
                harness.taken["feedback"] = sum(isinstance(one, Feedback) for one in harness.items)
                harness.reader.used()
                await anyio.sleep(0)
            assert sum(isinstance(one, Event) for one in harness.items) < 4 + 8
            harness.reader.stop()


class Holding(MemorySource):
    """Takes in and holds what comes of a paused stream, so that a poll never has to wait for anything."""

    polls = 0

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        self.polls += 1
        return super().poll(max_records, 0.0)


async def test_a_source_that_holds_a_paused_stream_is_polled_no_faster_than_room_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MIXED_SECONDS", 60.0)
    source = Holding({"data": 1, "feedback": 1}, bounded=False)
    for number in range(8):
        source.append("data", event(number))
    harness = Harness(source, high=4)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(harness.run)
            seen = []
            for polls in range(2, 6):  # the first poll gave everything
                while source.polls < polls:
                    await anyio.sleep(0)
                await anyio.sleep(0.01)
                seen.append(source.polls)
                harness.reader.used()
            harness.reader.stop()
    assert seen == [2, 3, 4, 5]


async def test_the_last_commit_wins() -> None:
    harness = Harness(filled(5))
    harness.reader.commit({("data", 0): 2})
    harness.reader.commit({("data", 0): 4})
    with anyio.fail_after(60):
        await harness.run()
    assert harness.source.committed() == {("data", 0): 4}
    again = Harness(harness.source)
    await to_thread.run_sync(again.reader.open)
    assert again.reader.committed == {("data", 0): 4}


async def test_a_commit_that_fails_for_now_ends_nothing() -> None:
    class Deaf(MemorySource):
        def commit(self, positions: object, floors: object = None) -> None:
            raise StreamUnavailableError("no broker")

    source = Deaf({"data": 1})
    source.append("data", event(0))
    harness = Harness(source)
    harness.reader.commit({("data", 0): 1})
    with anyio.fail_after(60):
        await harness.run()
    assert len(harness.items) == 1


class Slow(MemorySource):
    """Ends when it is told to."""

    def __init__(self, partitions: Mapping[str, int]) -> None:
        super().__init__(partitions, bounded=False)
        self.asked: list[Positions] = []
        self.deaf = 0

    def commit(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        self.asked.append(dict(positions))
        if len(self.asked) <= self.deaf:
            raise StreamUnavailableError("no broker")
        super().commit(positions, floors)


async def test_a_commit_that_fails_for_now_is_made_later_though_none_follows() -> None:
    source = Slow({"data": 1})
    source.deaf = 2
    harness = Harness(source)
    await to_thread.run_sync(harness.reader.open)
    harness.reader.commit({("data", 0): 1})
    for _ in range(3):
        harness.reader._commit()
    assert source.committed() == {("data", 0): 1}
    harness.reader._commit()
    assert len(source.asked) == 3, "once is enough"


async def test_a_commit_of_partitions_that_are_still_to_come_waits_for_them_unless_they_have_gone() -> None:
    source = Slow({"data": 3})
    harness = Harness(source)
    await to_thread.run_sync(harness.reader.open)
    harness.reader.partitions = [("data", 0)]
    harness.reader._left = {("data", 2)}
    harness.reader.commit({("data", 0): 1, ("data", 1): 2, ("data", 2): 3})
    harness.reader._commit()
    harness.reader.partitions = [("data", 0), ("data", 1), ("data", 2)]
    harness.reader._commit()
    assert source.asked == [{("data", 0): 1}, {("data", 1): 2}]


class Rebalancing(MemorySource):
    """Loses its first partition at the second poll."""

    lost = False
    closed = 0

    def open(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.polls = 0
        super().open(assignment)

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        self.polls += 1
        if self.polls == 2:
            self.assignment.revoked([("data", 0)], lost=self.lost)
            self.assignment.assigned({("data", 0): Found()})
        if self.polls == 3:
            self.finish()
        return super().poll(max_records, 0)

    def close(self) -> None:
        self.closed += 1
        super().close()


@pytest.mark.parametrize("lost", [False, True])
async def test_partitions_that_go_are_finished_with_and_committed_unless_lost(lost: bool) -> None:
    source = Rebalancing({"data": 2}, bounded=False)
    source.lost = lost
    start = {("data", 0): 0, ("data", 1): 0}
    harness = Harness(source, start=start)
    with anyio.fail_after(60):
        await harness.run()
    assert harness.revocations == [([("data", 0)], lost)]
    assert source.committed() == ({} if lost else {("data", 0): 77})
    assert [chunk.assigned for chunk in harness.chunks if chunk.assigned] == [(("data", 0),)]
    assert harness.reader.partitions == [("data", 0), ("data", 1)]


async def test_when_reading_fails_the_source_is_closed_and_the_error_passed_on() -> None:
    class Broken(Rebalancing):
        def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
            raise StreamError("data-0 is damaged")

    source = Broken({"data": 1})
    harness = Harness(source)
    with anyio.fail_after(60), pytest.raises(StreamError, match="is damaged"):
        await harness.run()
    assert source.closed == 1


async def test_lag_and_time_of_the_last_poll_are_known() -> None:
    harness = Harness(filled(3))
    assert harness.reader.last_poll == 0.0
    with anyio.fail_after(60):
        await harness.run()
    assert harness.reader.lag == {("data", 0): 0}
    assert 0.0 < harness.reader.last_poll < math.inf
    assert harness.reader.bounded


async def test_polls_ask_for_more_while_there_is_a_backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_RECORDS", 4)
    monkeypatch.setattr(module, "MOST_RECORDS", 16)
    harness = Harness(filled(100), high=1000)
    with anyio.fail_after(60):
        await harness.run()
    sizes = [len(items) for chunk in harness.chunks for items in chunk.items]
    assert (sizes[:4], max(sizes), sum(sizes)) == ([4, 8, 16, 16], 16, 100)
