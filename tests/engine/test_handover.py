from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import anyio
import pytest

from engine.cutter import ArrivalCutter, Cut, ReplayError
from engine.daemon import Daemon
from engine.launch import _start
from engine.status import status
from engine.writer import Outgoing
from streams.base import Assignment, Found, Partition, Positions, Record, StreamUnavailableError
from streams.codec import encode_event, encode_feedback
from streams.journal import Entry, Kind, Run
from streams.memory import MemorySink, MemorySource
from tests.engine.cores import rows
from tests.engine.parts import KINDS, answered, daemon_on, errors_of, names, run, until
from tests.engine.test_cutter import DATA, all_of, entries, item, keys
from tests.engine.test_outbox import Cluster
from tests.engine.test_outbox import Sink as TransactionalSink
from tests.engine.test_writer import Harness, answers

ZERO, ONE = ("data", 0), ("data", 1)


class Shared(MemorySource):
    """Gets and loses partitions while it is polled, as the member of a group does; or gets them straight back."""

    def __init__(self) -> None:
        super().__init__({"data": 2, "feedback": 2}, bounded=False)
        self._moves: queue.SimpleQueue[tuple[str, list[Partition]]] = queue.SimpleQueue()
        self._assignment: Assignment | None = None
        self.floors: Positions = {}
        self.moved = 0
        self.ids: dict[str, str] = {}

    def identities(self) -> dict[str, str]:
        return self.ids

    @property
    def shared(self) -> bool:
        return True

    def move(self, how: str, *partitions: Partition) -> None:
        self._moves.put((how, list(partitions)))

    def open(self, assignment: Assignment) -> None:
        self._assignment = assignment

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        assert self._assignment is not None
        while not self._moves.empty():
            how, partitions = self._moves.get()
            if how != "give":
                self._assignment.revoked(partitions, lost=how.startswith("lose"))
                for partition in partitions:
                    self._positions.pop(partition)
            given = () if how in ("take", "lose") else partitions
            floors = self.floors
            starts = self._assignment.assigned(
                {p: Found(0, self._committed.get(p), p in floors, floors.get(p)) for p in given}
            )
            self._positions |= {p: starts.get(p, self._committed.get(p, 0)) for p in given}
            self.moved += 1
        return super().poll(max_records, min(timeout, 0.01))


def fill(source: MemorySource, start: int, count: int) -> None:
    for number, row in enumerate(rows(start, count), start):
        source.append("data", encode_event(f"e{number}", row, time=float(number)), partition=number % 2)


async def events(daemon: Daemon, count: int) -> None:
    await until(lambda: daemon.core.counts["events"] == count and daemon.state == "waiting for records")


def then(*steps: Callable[[Daemon], object]) -> Callable[[Daemon], object]:
    """Do steps one after another beside a daemon, then stop it."""

    async def beside(daemon: Daemon) -> None:
        for step in steps:
            found = step(daemon)
            if hasattr(found, "__await__"):
                await found
        daemon.stop()

    return beside


async def crash(daemon: Daemon, *steps: Callable[[Daemon], object]) -> None:
    """Take steps beside a daemon and cut it off: what is not in a checkpoint by then is in the journal alone."""
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(daemon.run)
            for step in steps:
                found = step(daemon)
                if hasattr(found, "__await__"):
                    await found
            tasks.cancel_scope.cancel()


async def test_what_was_answered_of_a_partition_before_it_came_is_not_answered_again(tmp_path: Path) -> None:
    source, sink = Shared(), MemorySink()
    fill(source, 0, 20)
    source.commit({ZERO: 4})
    source.move("give", ZERO, ONE)
    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        daemon.readers[0]._holdings.start[ZERO] = 0
        await run(daemon, then(lambda daemon: events(daemon, 20)))
    assert sorted(answered(sink)) == sorted(set(names(0, 20)) - {"e0", "e2", "e4", "e6"})
    assert source.committed() == {ZERO: 10, ONE: 10}


class Missed(Cluster):
    """Refuses offsets of a partition, as of a member that its group has missed."""

    def __init__(self, partition: Partition) -> None:
        super().__init__()
        self._partition = partition
        self.refusals = 0

    def commit(
        self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None, timeout: float
    ) -> None:
        if self._partition in positions:
            self.refusals += 1
            self.broken = True
            raise StreamUnavailableError("not a member of this generation")
        super().commit(positions, floors, timeout)


async def test_with_transactions_nobody_else_commits(tmp_path: Path) -> None:
    source, cluster = Shared(), Cluster()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)
    sink = TransactionalSink("predictions", cluster)
    with daemon_on(tmp_path, source, predictions=sink, transactions=cluster) as daemon:
        await run(
            daemon,
            then(
                lambda daemon: events(daemon, 20),
                lambda _: source.move("take", ZERO),
                lambda daemon: until(lambda: daemon.readers[0].partitions == [ONE] and daemon.writer.depth == 0),
            ),
        )
    assert cluster.committed == {ZERO: 10, ONE: 10}
    assert len(cluster.visible) == 20
    assert source.committed() == {}


async def test_a_partition_whose_last_commit_does_not_get_through_counts_as_lost(tmp_path: Path) -> None:
    source, cluster = Shared(), Missed(ZERO)
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)
    sink = TransactionalSink("predictions", cluster)
    with daemon_on(tmp_path, source, predictions=sink, transactions=cluster) as daemon:
        daemon.readers[0]._patience = 0.3
        await run(
            daemon,
            then(
                lambda daemon: events(daemon, 20),
                lambda _: source.move("take", ZERO),
                lambda _: until(lambda: cluster.committed),
            ),
        )
    assert cluster.refusals > 0
    assert cluster.committed == {ONE: 10}
    assert len(cluster.visible) == 10
    assert source.committed() == {}


@pytest.mark.parametrize("how", ["take", "lose"])
async def test_partitions_that_go_and_come_back_while_a_step_lasts_are_answered_once(tmp_path: Path, how: str) -> None:
    source, cluster = Shared(), Cluster()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)

    async def long_step(daemon: Daemon) -> None:
        await until(lambda: cluster.committed == {ZERO: 10, ONE: 10})
        source.commit(cluster.committed)
        async with daemon.turn:
            source.move(how, ZERO)
            await until(lambda: daemon.readers[0].partitions == [ONE])
        source.move("give", ZERO)
        fill(source, 20, 10)
        await until(lambda: cluster.committed == {ZERO: 15, ONE: 15})

    sink = TransactionalSink("predictions", cluster)
    with daemon_on(tmp_path, source, predictions=sink, transactions=cluster) as daemon:
        daemon.readers[0]._patience = 0.2
        await run(daemon, then(lambda daemon: events(daemon, 20), long_step))
    assert len(cluster.visible) == len({message.key for _, message in cluster.visible}) == 30


async def test_a_partition_that_goes_leaves_its_position_to_the_next_and_no_trace(tmp_path: Path) -> None:
    source, sink = Shared(), MemorySink()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)

    async def gone(daemon: Daemon) -> None:
        source.move("take", ONE)
        await until(lambda: ONE not in daemon.runner.positions)
        await until(lambda: source.committed() == {ZERO: 10, ONE: 10})
        source.commit({ONE: 15})  # what another makes of it
        fill(source, 20, 10)
        await events(daemon, 25)

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        await run(daemon, then(lambda daemon: events(daemon, 20), gone))
    assert source.committed() == {ZERO: 15, ONE: 15}
    with daemon_on(tmp_path, source) as daemon:
        assert daemon.runner.positions == {ZERO: 15}


async def test_a_partition_that_comes_back_is_read_on_where_another_left_it(tmp_path: Path) -> None:
    source, sink = Shared(), MemorySink()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)

    async def there_and_back(daemon: Daemon) -> None:
        source.move("lose", ONE)
        await until(lambda: ONE not in daemon.runner.positions)
        fill(source, 20, 10)
        source.commit({ONE: 12})
        source.move("give", ONE)
        await until(lambda: daemon.runner.positions.get(ONE) == 15)
        await events(daemon, 28)
        await until(lambda: len(sink.messages) == 28)

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        await crash(daemon, lambda daemon: events(daemon, 20), there_and_back)
    assert sorted(answered(sink)) == sorted(set(names(0, 30)) - {"e21", "e23"})
    source.move("give", ZERO, ONE)
    with daemon_on(tmp_path, source) as daemon:
        await run(daemon, then(lambda daemon: events(daemon, 28)))
        assert daemon.runner.replayed > 0


async def test_a_journal_of_partitions_that_others_read_now_is_repeated_no_further(tmp_path: Path) -> None:
    source, sink = Shared(), MemorySink()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)
    with daemon_on(tmp_path, source) as daemon:
        await crash(daemon, lambda daemon: events(daemon, 20))
    source.move("give", ZERO)
    fill(source, 20, 10)
    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        assert daemon.cutter.replaying
        await run(daemon, then(lambda daemon: events(daemon, 15)))
        assert not daemon.cutter.replaying
    assert set(answered(sink)) >= {f"e{n}" for n in range(20, 30, 2)}
    with daemon_on(tmp_path, source) as daemon:
        assert daemon.runner.positions == {ZERO: 15}


async def test_a_replay_whose_partition_goes_on_the_way_ends_there(tmp_path: Path) -> None:
    source, sink = Shared(), MemorySink()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)
    with daemon_on(tmp_path, source) as daemon:
        await crash(daemon, lambda daemon: events(daemon, 20))
    source.pause(["data"])
    source.move("give", ZERO, ONE)
    source.move("take", ONE)
    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        await run(daemon, then(lambda daemon: until(lambda: not daemon.cutter.replaying and not source._moves.qsize())))
    assert answered(sink) == []


def test_records_that_come_between_the_end_of_a_replay_and_the_next_cut_keep_their_order() -> None:
    first = ArrivalCutter(KINDS, 4, max_delay=0.0)
    first.assigned([ZERO])
    first.feed([item(ZERO, n, 0.0) for n in range(4)], 0.0)
    cutter = ArrivalCutter(KINDS, 4, entries(all_of(first)), max_delay=0.0)
    cutter.assigned([ZERO])
    cutter.feed([item(ZERO, n, 0.0) for n in range(6)], 0.0)
    assert cutter.next(0.0) is not None
    cutter.feed([item(ZERO, n, 0.0) for n in range(6, 9)], 0.0)
    assert [key for cut in all_of(cutter) for key in keys(cut.items)] == [(DATA, 0, n) for n in range(4, 9)]


def test_a_replay_that_does_not_fit_takes_nothing_and_leaves_all_to_be_cut_anew() -> None:
    entry = Entry(1, Kind.DATA, 0.0, (Run(DATA, 0, 0, 2, 2), Run(DATA, 1, 0, 2, 2)))
    cutter = ArrivalCutter(KINDS, 4, [entry], max_delay=0.0)
    cutter.assigned([ZERO, ONE])
    cutter.feed([item(ZERO, 0, 0.0), item(ZERO, 1, 0.0), item(ONE, 7, 0.0), item(ONE, 8, 0.0)], 0.0)
    with pytest.raises(ReplayError, match="data-1 does not hold"):
        cutter.next(0.0)
    assert cutter.awaited() == {ZERO, ONE}
    cutter.abandon()
    assert cutter.awaited() == set()
    assert [len(cut.items) for cut in all_of(cutter)] == [4]


def test_a_replay_says_which_streams_it_cannot_go_on_without() -> None:
    entry = Entry(1, Kind.DATA, 0.0, (Run(DATA, 0, 0, 2, 2), Run(DATA, 1, 0, 2, 2)))
    cutter = ArrivalCutter(KINDS, 4, [entry], max_delay=0.0)
    cutter.assigned([ZERO, ONE])
    cutter.feed([item(ZERO, n, 0.0) for n in range(50)], 0.0)
    assert cutter.next(0.0) is None
    assert cutter.starved == {DATA}
    cutter.feed([item(ONE, n, 0.0) for n in range(2)], 0.0)
    assert cutter.next(0.0) is not None
    assert cutter.starved == frozenset()


async def test_a_replay_that_needs_what_lies_behind_a_backlog_gets_it(tmp_path: Path) -> None:
    source = Shared()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)
    with daemon_on(tmp_path, source) as daemon:
        await crash(daemon, lambda daemon: events(daemon, 20))
    for number, row in enumerate(rows(20, 200), 20):
        source.append("data", encode_event(f"e{number}", row, time=float(number)))
    source.move("give", ZERO)
    with daemon_on(tmp_path, source, high=16) as daemon:
        daemon.handover.take_stock = nothing  # type: ignore[method-assign]

        async def late(daemon: Daemon) -> None:
            await until(lambda: len(daemon.cutter._queues[ZERO]) > 16)
            source.move("give", ONE)
            await events(daemon, 220)

        await run(daemon, then(lambda _: until(lambda: ZERO in daemon.cutter._queues), late))


async def nothing() -> None:
    """Stands for a group that has not said yet who reads what."""


def test_positions_of_partitions_that_are_gone_are_passed_on_no_more() -> None:
    harness = Harness()
    harness.writer.put(answers(0, 2))
    harness.writer.put(Outgoing(positions={("feedback", 0): 5}, gone=[ZERO]))
    harness.run()
    assert [found for call, found in harness.log if call == "flushed"] == [{("feedback", 0): 5}]


def test_reading_goes_on_at_the_first_record_that_the_journal_names() -> None:
    entry = Entry(5, Kind.DATA, 0.0, (Run("data", 0, 30, 34, 4), Run("data", 0, 34, 36, 2)))
    positions: Positions = {ZERO: 20, ONE: 7}
    assert _start(positions, {}, [entry]) == ({ZERO: 30, ONE: 7}, {})
    assert positions == {ZERO: 20, ONE: 7}


F0, F1 = ("feedback", 0), ("feedback", 1)


def label(source: MemorySource, *numbers: int) -> None:
    for number in numbers:
        value = encode_feedback(f"e{number}", label=number % 3, time=float(number + 1))
        source.append("feedback", value, partition=number % 2)


async def rebuilt(daemon: Daemon) -> None:
    # The first may hold before the reader has polled, where the journal has told of a rebuild.
    await until(lambda: not daemon.cutter.rebuilding and daemon.core.joins.pending == 7)
    await until(lambda: daemon.state == "waiting for records")


def half_done(source: Shared) -> None:
    """Others have answered the ten events of partition 0 and learned from three of their labels."""
    fill(source, 0, 20)
    label(source, 0, 2, 4)
    source.commit({ZERO: 10, F0: 3})
    source.floors = {ZERO: 0, F0: 0}


async def test_labels_find_the_events_that_another_had_answered(tmp_path: Path) -> None:
    source, sink = Shared(), MemorySink()
    half_done(source)
    source.move("give", ZERO, F0)

    async def labelled(daemon: Daemon) -> None:
        assert (daemon.core.joins.pending, daemon.core.counts["labels"]) == (7, 0)
        assert status(daemon)["rebuilding"] == {"partitions": 0, "records": 0}
        label(source, 2, 4, 6, 8, 10)  # two of them come again
        await until(lambda: daemon.core.counts["labels"] == 3)

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        await run(daemon, then(rebuilt, labelled))
        assert daemon.core.joins.counts["duplicate"] == 2
        assert (daemon.core.counts["events"], answered(sink)) == (0, [])
    assert source.committed() == {ZERO: 10, F0: 8}


async def test_a_daemon_killed_in_the_middle_of_a_rebuild_goes_on_with_it(tmp_path: Path) -> None:
    source = Shared()
    half_done(source)
    source.pause(["feedback"])
    source.move("give", ZERO, F0)
    with daemon_on(tmp_path, source) as daemon:
        await crash(daemon, lambda daemon: until(lambda: daemon.core.joins.pending == 10))
        assert daemon.cutter.rebuilding
        assert status(daemon)["waiting_for"] == "rebuilding joins of 2 partitions, 3 records left"
    source.resume(["feedback"])
    source.move("give", ZERO, F0)
    with daemon_on(tmp_path, source) as daemon:
        await run(daemon, then(rebuilt))
        assert daemon.runner.replayed >= 1  # how many entries hold it depends on how polls fell
        assert daemon.core.joins.pending == 7
    with daemon_on(tmp_path, source) as daemon:
        assert (daemon.runner.positions, daemon.runner.taken) == ({ZERO: 10, F0: 3}, {ZERO: 10, F0: 3})


async def test_what_waits_of_a_partition_that_another_took_waits_no_more(tmp_path: Path) -> None:
    source = Shared()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE, F0, F1)

    async def taken(daemon: Daemon) -> None:
        source.move("take", ZERO, F0)
        await until(lambda: daemon.core.joins.pending == 10)

    with daemon_on(tmp_path, source) as daemon:
        await run(daemon, then(lambda daemon: events(daemon, 20), taken))
        assert daemon.core.joins.counts["moved"] == 10


class Stuck(MemorySink):
    """Flushes nothing while it is stuck."""

    stuck = False

    def flush(self, timeout: float) -> None:
        if self.stuck:
            raise StreamUnavailableError("no broker")
        super().flush(timeout)


async def test_partitions_that_cannot_be_finished_with_in_time_are_given_up(tmp_path: Path) -> None:
    source, sink = Shared(), Stuck()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)

    async def outage(daemon: Daemon) -> None:
        await until(lambda: source.committed() == {ZERO: 10, ONE: 10})
        sink.stuck = True
        fill(source, 20, 2)
        await events(daemon, 22)
        source.move("take", ONE)
        await until(lambda: ONE not in daemon.runner.positions)
        sink.stuck = False

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        daemon.readers[0]._patience = 0.05
        await run(daemon, then(lambda daemon: events(daemon, 20), outage))
    assert source.committed() == {ZERO: 11, ONE: 10}


async def test_partitions_that_are_given_up_and_come_straight_back_go_on_where_they_were(tmp_path: Path) -> None:
    source, sink = Shared(), Stuck()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)

    async def outage(daemon: Daemon) -> None:
        await until(lambda: source.committed() == {ZERO: 10, ONE: 10})
        sink.stuck = True
        fill(source, 20, 2)
        await events(daemon, 22)
        source.move("back", ZERO, ONE)
        fill(source, 22, 2)
        await until(lambda: daemon.core.counts["events"] >= 24)
        sink.stuck = False
        await until(lambda: source.committed() == {ZERO: 12, ONE: 12})

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        daemon.readers[0]._patience = 0.05
        await run(daemon, then(lambda daemon: events(daemon, 20), outage))
        assert daemon.core.counts["events"] == 24
    assert sorted(answered(sink)) == sorted(names(0, 24))


class Unheard(Shared):
    """Commits nothing for as long as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.deaf = False
        self.refused: Positions = {}

    def commit(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        if self.deaf:
            self.refused = dict(positions)
            raise StreamUnavailableError("no coordinator")
        super().commit(positions, floors)


async def test_what_was_out_of_partitions_that_were_lost_is_committed_once_they_are_back(tmp_path: Path) -> None:
    source, sink = Unheard(), MemorySink()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)

    async def outage(daemon: Daemon) -> None:
        await until(lambda: source.committed() == {ZERO: 10, ONE: 10})
        source.deaf = True
        fill(source, 20, 2)
        await until(lambda: source.refused == {ZERO: 11, ONE: 11})
        source.move("lose and back", ZERO, ONE)
        await until(lambda: source.moved == 2)
        assert source.committed() == {ZERO: 10, ONE: 10}
        source.deaf = False
        await until(lambda: source.committed() == {ZERO: 11, ONE: 11})  # though no other record comes

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        await run(daemon, then(lambda daemon: events(daemon, 20), outage))
    assert sorted(answered(sink)) == sorted(names(0, 22))


@pytest.mark.parametrize("lost", [False, True])
async def test_partitions_that_come_straight_back_while_a_step_lasts_go_on_behind_it(
    tmp_path: Path, lost: bool
) -> None:
    source, sink, go_on = Shared(), MemorySink(), threading.Event()
    fill(source, 0, 20)
    source.move("give", ZERO, ONE)

    async def long_step(daemon: Daemon) -> None:
        await until(lambda: source.committed() == {ZERO: 10, ONE: 10})
        apply = daemon.runner.apply

        def slow(cuts: Sequence[Cut]) -> None:
            assert go_on.wait(60)
            apply(cuts)

        daemon.runner.apply = slow  # type: ignore[method-assign]
        fill(source, 20, 2)
        await until(lambda: daemon.under_way)
        source.move("lose and back" if lost else "back", ZERO, ONE)
        await until(lambda: daemon.handover.moved)
        go_on.set()
        fill(source, 22, 2)
        await until(lambda: source.committed() == {ZERO: 12, ONE: 12})

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        daemon.readers[0]._patience = 0.05
        await run(daemon, then(lambda daemon: events(daemon, 20), long_step))
        assert daemon.core.counts["events"] == 24
    assert sorted(answered(sink)) == sorted(names(0, 24))


async def test_a_stream_that_was_made_anew_is_refused(tmp_path: Path) -> None:
    source = Shared()
    source.ids = {"data": "AAA"}
    with daemon_on(tmp_path, source) as daemon:
        await run(daemon, then())
    source.ids = {"data": "BBB"}
    with daemon_on(tmp_path, source) as daemon, pytest.raises(BaseExceptionGroup) as caught:
        await run(daemon, then())
    (error,) = errors_of(caught.value)
    assert "data was made anew since the last checkpoint: it was AAA and is BBB now" in str(error)
    assert "--fresh" in str(error)
