from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import anyio
import numpy as np
import pytest
import structlog

from engine import daemon as module
from engine import writer as writer_module
from engine.checkpoint.folder import Saved
from engine.checkpoint.store import CheckpointStore
from engine.daemon import Daemon
from engine.errors import RestartError, StorageError, UnreachableError
from engine.keeper import Snapshot
from engine.learner import Job, Learner
from engine.reader import Chunk
from engine.status import status
from engine.writer import QUEUE_BATCHES
from streams.base import Assignment, Message, Partition, Record, RefusedStreamError, StreamError, StreamUnavailableError
from streams.codec import decode_events, encode_event
from streams.journal import Entry, Journal, JournalError
from streams.memory import MemorySink, MemorySource
from streams.pace import Hurry
from streams.seams import CLOCK
from tests.engine.cores import FEATURES, choice, make_core
from tests.engine.parts import (
    SIZE,
    SPEC,
    answered,
    daemon_on,
    errors_of,
    fill,
    kinds_of,
    memory,
    names,
    resting,
    run,
    until,
)


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("ckpt-")) for path in directory.glob("ckpt-*"))


# -- from end to end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_time", [True, False], ids=["time", "arrival"])
async def test_every_event_is_answered_once_and_labels_are_learned_from(tmp_path: Path, by_time: bool) -> None:
    source, sink = memory(300), MemorySink()
    with daemon_on(tmp_path, source, predictions=sink, by_time=by_time) as daemon:
        await run(daemon)
    core = daemon.core
    assert answered(sink) == names(0, 300)
    assert sink.flushed == 300
    assert (core.counts["events"], core.counts["labels"]) == (300, 300)
    assert core.counts["updates.learning"] > 10
    assert (core.job, core.unfinished) == (None, False)
    assert source.committed() == {("data", 0): 300, ("feedback", 0): 300}
    assert daemon.state == "stopped"
    assert steps(tmp_path)[-1] == daemon.runner.keeper.sequence


async def test_two_runs_by_time_give_the_same_answers_and_the_same_checkpoint(tmp_path: Path) -> None:
    sinks = [MemorySink(), MemorySink()]
    for number, sink in enumerate(sinks):
        core = make_core(choice("adaptation", "rotta", capacity=16, interval=16), choice("safeguard", "replay"))
        with daemon_on(tmp_path / str(number), memory(200), core=core, predictions=sink, by_time=True) as daemon:
            await run(daemon)
    assert sinks[0].messages == sinks[1].messages
    (first, *_), (second, *_) = (sorted((tmp_path / n).glob("ckpt-*"), reverse=True) for n in "01")
    for file in first.iterdir():
        assert file.name == "MANIFEST" or file.read_bytes() == (second / file.name).read_bytes()


async def test_a_daemon_whose_streams_have_ended_has_nothing_more_to_do(tmp_path: Path) -> None:
    source, sink = memory(50), MemorySink()
    for _ in range(2):
        with daemon_on(tmp_path, source, predictions=sink) as daemon:
            await run(daemon)
    assert answered(sink) == names(0, 50)
    assert daemon.runner.batches == 0
    assert steps(tmp_path) == [0, daemon.runner.keeper.sequence]


async def test_bad_records_go_to_the_dead_letters_and_the_stream_goes_on(tmp_path: Path) -> None:
    source = MemorySource({"data": 1, "feedback": 1})
    source.append("data", b"what is this?", key=b"k")
    source.append("feedback", b"[]")
    fill(source, 0, 10)
    sink, letters = MemorySink(), MemorySink()
    with daemon_on(tmp_path, source, predictions=sink, letters=letters) as daemon:
        await run(daemon)
    assert answered(sink) == names(0, 10)
    assert {message.value for message in letters.messages} == {b"what is this?", b"[]"}
    assert source.committed() == {("data", 0): 11, ("feedback", 0): 11}


async def test_a_batch_of_nothing_but_bad_records_is_passed_over(tmp_path: Path) -> None:
    source = MemorySource({"data": 1, "feedback": 1})
    for _ in range(SIZE):
        source.append("data", b"{}")
    letters = MemorySink()
    with daemon_on(tmp_path, source, letters=letters, by_time=True) as daemon:
        await run(daemon)
    assert len(letters.messages) == SIZE
    assert source.committed()["data", 0] == SIZE


# -- stopping and going on ----------------------------------------------------------------------------------------


async def stop_when_idle(daemon: Daemon) -> None:
    await until(lambda: daemon.state == "waiting for records" and daemon.core.counts["events"] >= 40)
    daemon.stop()


async def test_a_stopped_daemon_drains_and_the_next_one_goes_on(tmp_path: Path) -> None:
    source, sink = memory(40, bounded=False), MemorySink()
    with daemon_on(tmp_path, source, predictions=sink) as first:
        await run(first, stop_when_idle)
    assert answered(sink) == names(0, 40)
    assert source.committed()["data", 0] == 40
    assert steps(tmp_path)[-1] == first.runner.keeper.sequence
    assert first.core.job is None
    fill(source, 40, 40)
    source.finish()
    with daemon_on(tmp_path, source, predictions=sink) as second:
        await run(second)
    assert answered(sink) == names(0, 80)
    assert second.runner.replayed == 0
    assert second.core.counts["events"] == 80


async def test_after_a_kill_answers_that_are_out_are_not_given_again(tmp_path: Path) -> None:
    source, sink = memory(60), MemorySink()
    with daemon_on(tmp_path, source, predictions=sink) as first:
        await run(first)
    for path in (tmp_path / "broken", *tmp_path.glob("ckpt-*")):
        if path.name not in ("broken", "ckpt-000000000000"):
            path.rename(tmp_path / f"gone-{path.name}")
    with daemon_on(tmp_path, source, predictions=sink) as second:
        assert second.cutter.replaying == first.runner.keeper.sequence
        await run(second)
    assert answered(sink) == names(0, 60)
    assert second.core.counts == first.core.counts
    assert second.runner.replayed == first.runner.keeper.sequence


async def test_stopped_in_a_replay_the_daemon_leaves_the_journal_to_the_next_one(tmp_path: Path) -> None:
    with daemon_on(tmp_path, memory(100)) as first:
        await run(first)
    for step in steps(tmp_path)[1:]:
        (tmp_path / f"ckpt-{step:012d}").rename(tmp_path / f"gone-{step}")

    async def stop_at_once(daemon: Daemon) -> None:
        await until(lambda: daemon.state == "waiting for records" and daemon.runner.batches)
        daemon.stop()

    partial = memory(50, bounded=False)
    with daemon_on(tmp_path, partial) as second:
        await run(second, stop_at_once)
        assert second.cutter.replaying > 0
    assert steps(tmp_path) == [0]
    with daemon_on(tmp_path, memory(100)) as third:
        await run(third)
    assert third.core.counts == first.core.counts


async def test_stopped_before_it_has_begun_the_daemon_leaves_in_order(tmp_path: Path) -> None:
    with daemon_on(tmp_path, memory(10, bounded=False)) as daemon:
        daemon.stop()
        await run(daemon)
    assert steps(tmp_path)[0] == 0


async def test_what_only_waits_for_its_batch_to_fill_wakes_nobody(tmp_path: Path) -> None:
    with daemon_on(tmp_path, memory(0, bounded=False)) as daemon:
        daemon.cutter.assigned([("data", 0), ("feedback", 0)])

        def wakes(chunk: Chunk) -> bool:
            daemon._wake = anyio.Event()
            daemon.hand_over(chunk)
            return daemon._wake.is_set()

        def some(first: int, count: int) -> Chunk:
            values = [
                encode_event(f"e{n}", np.zeros(FEATURES, np.float32), time=1.0) for n in range(first, first + count)
            ]
            records = [Record("data", 0, first + n, first + n + 1, 1.0, None, v, ()) for n, v in enumerate(values)]
            good, _ = decode_events(records, SPEC)
            return Chunk([good], since=CLOCK.monotonic() + 60)

        assert wakes(some(0, 1))
        daemon._until = daemon.cutter.deadline()  # as when it waits
        assert not wakes(some(1, 1))
        assert wakes(some(2, SIZE - 2))
        assert daemon.cutter.next(0.0) is not None
        assert wakes(Chunk(ended=frozenset([("data", 0)])))


async def test_a_source_that_owns_no_partition_has_not_ended(tmp_path: Path) -> None:
    source = MemorySource({"data": 0, "feedback": 0}, bounded=False)

    async def stop_when_waiting(daemon: Daemon) -> None:
        await until(lambda: daemon.state == "waiting for records")
        source.asked = True  # type: ignore[attr-defined]
        daemon.stop()

    with daemon_on(tmp_path, source) as daemon:
        await run(daemon, stop_when_waiting)
    assert hasattr(source, "asked")


# -- checkpoints --------------------------------------------------------------------------------------------------


async def test_a_checkpoint_that_is_due_waits_for_the_background_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, began = threading.Event(), threading.Event()
    learn = Learner.run

    def slow(self: Learner, job: Job) -> None:
        began.set()
        assert release.wait(60)
        learn(self, job)

    monkeypatch.setattr(Learner, "run", slow)
    source = memory(8, bounded=False)
    with daemon_on(tmp_path, source, core=make_core(background=True, audit_share=0.0), every=0.0) as daemon:

        async def watch(daemon: Daemon) -> None:
            await until(began.is_set)
            await until(lambda: daemon.saver.under_way is None)
            before, sequence = steps(tmp_path), daemon.runner.keeper.sequence
            fill(source, 8, 4)
            await until(lambda: daemon.core.counts["events"] == 12)
            assert daemon.core.job is not None
            assert daemon.runner.keeper.sequence > sequence
            assert steps(tmp_path) == before
            release.set()
            await until(lambda: steps(tmp_path) != before)
            daemon.stop()

        await run(daemon, watch)
        assert daemon.core.counts["updates.learning"] == 1


async def test_serving_goes_on_while_the_journal_is_synced_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, began = threading.Event(), threading.Event()

    def ahead(_: Journal) -> Callable[[], None]:
        def sync() -> None:
            began.set()
            assert release.wait(60)

        return sync

    monkeypatch.setattr(Journal, "ahead", ahead)
    source = memory(4, bounded=False)
    with daemon_on(tmp_path, source, every=0.0) as daemon:

        async def watch(daemon: Daemon) -> None:
            await until(began.is_set)
            before = steps(tmp_path)
            fill(source, 4, 8)
            await until(lambda: daemon.core.counts["events"] == 12)
            assert steps(tmp_path) == before
            release.set()
            await until(lambda: steps(tmp_path) != before)
            daemon.stop()

        await run(daemon, watch)


async def test_the_journal_is_synced_again_while_a_job_keeps_a_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, began, synced = threading.Event(), threading.Event(), list[int]()
    learn = Learner.run

    def slow(self: Learner, job: Job) -> None:
        began.set()
        assert release.wait(60)
        learn(self, job)

    monkeypatch.setattr(Learner, "run", slow)
    monkeypatch.setattr(Journal, "ahead", lambda journal: partial(synced.append, journal.next_sequence))
    monkeypatch.setattr("engine.saver.STALE_SECONDS", 0.0)
    source = memory(8, bounded=False)
    with daemon_on(tmp_path, source, core=make_core(background=True, audit_share=0.0)) as daemon:

        async def watch(daemon: Daemon) -> None:
            await until(began.is_set)
            before = steps(tmp_path)
            daemon.saver.next = 0.0
            fill(source, 8, 4)
            await until(lambda: daemon.core.counts["events"] == 12 and len(synced) >= 3)
            last = daemon.runner.keeper.sequence
            await until(lambda: synced[-1] == last + 1)
            assert steps(tmp_path) == before
            release.set()
            await until(lambda: steps(tmp_path) != before)
            daemon.stop()

        await run(daemon, watch)


async def test_a_checkpoint_is_written_with_rests_unless_somebody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited: list[bool] = []
    pause = Hurry.pause

    def noted(self: Hurry, seconds: float) -> bool:
        awaited.append(pause(self, seconds))
        return awaited[-1]

    monkeypatch.setattr(Hurry, "pause", noted)
    monkeypatch.setattr("streams.pace._WORK_SECONDS", 0.0)
    source = memory(16, bounded=False)
    with daemon_on(tmp_path, source, core=make_core(background=False)) as daemon:

        async def watch(daemon: Daemon) -> None:
            await until(lambda: daemon.core.counts["feedback"] == 16 and resting(daemon))
            assert set(awaited) == {True}, "the first one"
            awaited.clear()
            async with daemon.turn:
                assert await daemon.settle()
            assert set(awaited) == {True}, "one that the next batch waits for"
            awaited.clear()
            before = steps(tmp_path)
            daemon.saver.next = 0.0
            fill(source, 16, 4)
            await until(lambda: steps(tmp_path) != before and daemon.saver.under_way is None)
            assert set(awaited) == {False}
            awaited.clear()
            fill(source, 20, 4)
            await until(lambda: daemon.core.counts["feedback"] == 24)
            daemon.stop()

        await run(daemon, watch)
    assert set(awaited) == {True}, "the last one"


async def test_serving_goes_on_when_a_checkpoint_fails_and_the_failure_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sink = memory(0, bounded=False), MemorySink()
    save = CheckpointStore.save
    attempts: list[int] = []

    def failing(self: CheckpointStore, step: int, *args: object, **more: object) -> object:
        attempts.append(step)
        if len(attempts) in (2, 3):
            raise StorageError("the disk is full")
        return save(self, step, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "save", failing)
    with daemon_on(tmp_path, source, predictions=sink, every=0.0) as daemon:

        async def watch(daemon: Daemon) -> None:
            for number in range(5):
                while len(attempts) <= number or daemon.saver.under_way is not None:
                    await anyio.sleep(0.001)
                if number == 1:
                    age = status(daemon)["checkpoint"]
                    assert age["step"] == 0
                fill(source, number * 4, 4)
            await until(lambda: daemon.core.counts["events"] == 20 and daemon.saver.under_way is None)
            daemon.stop()

        await run(daemon, watch)
    assert answered(sink) == names(0, 20)
    registry = daemon.metrics.registry
    assert registry.get_sample_value("adaptd_checkpoint_failures_total") == 2
    assert steps(tmp_path)[-1] == daemon.runner.keeper.sequence


@pytest.mark.parametrize("when", ["first", "last"])
async def test_without_its_first_or_last_checkpoint_the_daemon_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    save = CheckpointStore.save

    def failing(self: CheckpointStore, step: int, *args: object, **more: object) -> object:
        if (when == "first") == (step == 0):
            raise StorageError("the disk is full")
        return save(self, step, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "save", failing)
    with daemon_on(tmp_path, memory(30)) as daemon, pytest.raises(BaseExceptionGroup) as caught:
        await run(daemon)
    assert StorageError in kinds_of(caught.value)


async def test_a_checkpoint_covers_only_what_has_been_answered(tmp_path: Path) -> None:
    sink, covered = MemorySink(), list[int]()
    with daemon_on(tmp_path, memory(100), predictions=sink, every=0.0) as daemon:
        write = daemon.runner.keeper.write

        def checked(snapshot: Snapshot) -> Saved:
            covered.append({row[0]: row[2] for row in snapshot.meta["positions"]}.get("data", 0))
            assert sink.flushed >= covered[-1]
            return write(snapshot)

        daemon.runner.keeper.write = checked  # type: ignore[method-assign]
        await run(daemon)
    assert covered[0] == 0
    assert covered[-1] == 100


# -- failures -----------------------------------------------------------------------------------------------------


class Broken(MemorySource):
    """Fails at the given poll."""

    polls = 0
    closed = False

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        self.polls += 1
        if self.polls == 3:
            raise StreamError("data-0 is damaged at byte 7")
        return super().poll(20, timeout)

    def close(self) -> None:
        self.closed = True
        super().close()


async def test_a_source_that_fails_ends_the_daemon_with_its_error(tmp_path: Path) -> None:
    source = Broken({"data": 1, "feedback": 1}, bounded=False)
    fill(source, 0, 100)
    with daemon_on(tmp_path, source) as daemon, pytest.raises(BaseExceptionGroup) as caught:
        await run(daemon)
    assert [str(error) for error in errors_of(caught.value)] == ["data-0 is damaged at byte 7"]
    assert source.closed
    assert daemon.state == "stopped"


class Refusing(MemorySink):
    """Refuses for good, or for now, from the first or a later message on."""

    error: StreamError = StreamError("predictions: the message is too large")
    after = 0
    closed = False

    def send(self, messages: Sequence[Message]) -> None:
        if len(self.messages) >= self.after:
            raise self.error
        super().send(messages)

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.mark.parametrize("after", [0, 48])
async def test_a_sink_that_fails_ends_the_daemon_with_its_error(tmp_path: Path, after: int) -> None:
    sink = Refusing()
    sink.after = after
    source = memory(2000, bounded=False)
    with daemon_on(tmp_path, source, predictions=sink) as daemon, pytest.raises(BaseExceptionGroup) as caught:
        await run(daemon)
    assert "predictions: the message is too large" in [str(error) for error in errors_of(caught.value)]
    assert source.committed().get(("data", 0), 0) <= after
    assert sink.closed


async def test_an_error_in_the_model_ends_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with daemon_on(tmp_path, memory(50, bounded=False)) as daemon:

        def failing(items: object) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(daemon.core, "answer", failing)
        with pytest.raises(BaseExceptionGroup) as caught:
            await run(daemon)
    assert kinds_of(caught.value) == [RuntimeError]


@pytest.mark.parametrize("count", [20, 3000], ids=["a little waits", "the queue is full"])
async def test_a_sink_that_stays_away_does_not_keep_the_daemon_from_leaving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.1)
    monkeypatch.setattr(writer_module, "BACKOFF_SECONDS", (0.01,))
    sink = Refusing()
    sink.error = StreamUnavailableError("no broker answers")
    source = memory(count, bounded=False)

    async def stop_when_stuck(daemon: Daemon) -> None:
        await until(lambda: daemon.writer.waiting_for and (count < 100 or daemon.writer.depth == QUEUE_BATCHES))
        assert status(daemon)["waiting_for"] == "memory: no broker answers"
        daemon.stop()

    with daemon_on(tmp_path, source, predictions=sink) as daemon, pytest.raises(BaseExceptionGroup) as caught:
        await run(daemon, stop_when_stuck)
    (restart,) = (error for error in errors_of(caught.value) if isinstance(error, RestartError))
    assert "waiting for memory: no broker answers" in str(restart)
    assert set(kinds_of(caught.value)) <= {RestartError, StreamUnavailableError}
    assert source.committed() == {}
    assert steps(tmp_path) == [0]


async def test_what_was_not_answered_for_a_sink_that_stayed_away_is_answered_by_the_next_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Refusing()
    sink.error, sink.after = StreamUnavailableError("no broker answers"), 32
    source = memory(100, bounded=False)

    async def stop_when_stuck(daemon: Daemon) -> None:
        await until(lambda: daemon.writer.waiting_for)
        daemon.stop()

    with monkeypatch.context() as impatient, daemon_on(tmp_path, source, predictions=sink) as daemon:
        impatient.setattr(module, "DRAIN_SECONDS", 0.05)
        with pytest.raises(BaseExceptionGroup):
            await run(daemon, stop_when_stuck)
    sink.after = 10**9
    source.finish()
    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        await run(daemon)
    assert set(answered(sink)) == set(names(0, 100))


async def test_a_slow_sink_pauses_the_source(tmp_path: Path) -> None:
    free = threading.Event()

    class Slow(MemorySink):
        def send(self, messages: Sequence[Message]) -> None:
            assert free.wait(60)
            super().send(messages)

    sink = Slow()

    async def watch(daemon: Daemon) -> None:
        told = "paused until the backlog is worked off: data"
        await until(lambda: daemon.writer.depth == QUEUE_BATCHES and status(daemon)["waiting_for"].startswith(told))
        waiting = daemon.readers[0].waiting(daemon.cutter.taken)
        assert waiting < 2 * (64 + 512)
        free.set()

    with daemon_on(tmp_path, memory(3000), predictions=sink, high=64) as daemon:
        await run(daemon, watch)
    assert answered(sink) == names(0, 3000)


# -- starting -----------------------------------------------------------------------------------------------------


class Late(MemorySource):
    """Cannot be reached at the first attempts."""

    attempts = 0
    needed = 3
    closed = False

    def open(self, assignment: Assignment) -> None:
        self.attempts += 1
        if self.attempts < self.needed:
            raise StreamUnavailableError("no broker answers at 127.0.0.1:1")
        super().open(assignment)

    def close(self) -> None:
        self.closed = True
        super().close()


async def test_streams_that_cannot_be_reached_at_first_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", (0.0,))
    source = Late({"data": 1, "feedback": 1})
    source.needed = 20
    fill(source, 0, 20)
    sink = MemorySink()
    with daemon_on(tmp_path, source, predictions=sink) as daemon, structlog.testing.capture_logs() as logs:
        await run(daemon)
    assert source.attempts == 20
    told = [line["error"] for line in logs if line["event"] == "stream_unavailable"]
    assert told == ["no broker answers at 127.0.0.1:1"], "once, however often it was tried"
    assert answered(sink) == names(0, 20)


async def test_every_stream_that_cannot_be_used_is_told_of_at_once(tmp_path: Path) -> None:
    class Gone(Late):
        def open(self, assignment: Assignment) -> None:
            raise RefusedStreamError("topic data does not exist")

    class Nowhere(MemorySink):
        def open(self) -> None:
            raise RefusedStreamError(f"topic {self.name} does not exist")

    sinks = Nowhere("answers"), Nowhere("letters")
    source = Gone({"data": 1, "feedback": 1})
    on = daemon_on(tmp_path, source, predictions=sinks[0], letters=sinks[1])
    with on as daemon, pytest.raises(BaseExceptionGroup) as caught:
        await run(daemon)
    (error,) = errors_of(caught.value)
    told = "topic answers does not exist; topic letters does not exist; topic data does not exist"
    assert (type(error), str(error)) == (RefusedStreamError, told)
    assert source.closed


async def test_after_a_minute_without_its_streams_the_daemon_gives_up_and_closes_what_it_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "START_SECONDS", 0.0)
    source, sink = Late({"data": 1, "feedback": 1}), Refusing()
    with daemon_on(tmp_path, source, predictions=sink) as daemon, pytest.raises(BaseExceptionGroup) as caught:
        await run(daemon)
    (error,) = errors_of(caught.value)
    assert isinstance(error, UnreachableError)
    assert "no broker answers at 127.0.0.1:1; gave up after" in str(error)
    assert source.closed
    assert sink.closed


async def test_told_to_leave_while_a_stream_does_not_answer_the_daemon_leaves_at_once_and_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", (1000.0,))
    source, sink = Late({"data": 1, "feedback": 1}), Refusing()

    async def leave(daemon: Daemon) -> None:
        await until(lambda: daemon.state.endswith("retrying"))
        daemon.stop()

    with daemon_on(tmp_path, source, predictions=sink) as daemon:
        await run(daemon, leave)
    assert source.attempts == 1
    assert source.closed
    assert sink.closed
    assert daemon.state == "stopped"


async def test_a_stream_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    source = memory(10)
    source.trim({("data", 0): 5})
    with daemon_on(tmp_path, source) as daemon:
        daemon.readers[0]._holdings.start[("data", 0)] = 3
        with pytest.raises(BaseExceptionGroup) as caught:
            await run(daemon)
    assert "holds offsets 5 to 10, not 3" in str(errors_of(caught.value)[0])


async def test_a_journal_that_cannot_be_written_ends_the_daemon_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon_on(tmp_path, memory(10, bounded=False)) as daemon:

        def failing(self: Journal, entry: Entry) -> None:
            raise JournalError("the journal cannot be written: disk full")

        monkeypatch.setattr(Journal, "append", failing)
        with pytest.raises(BaseExceptionGroup) as caught:
            await run(daemon)
    assert JournalError in kinds_of(caught.value)
    assert daemon.core.counts["events"] == 0


# -- partitions that go -------------------------------------------------------------------------------------------


class Shared(MemorySource):
    """Loses partitions when it is told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__({"data": 1, "feedback": 1}, bounded=False)
        self.gone: Sequence[Partition] = ()
        self.saved: list[int] = []
        self.directory = directory

    def open(self, assignment: Assignment) -> None:
        self.assignment = assignment
        super().open(assignment)

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        if self.gone:
            gone, self.gone = self.gone, ()
            self.assignment.revoked(gone, lost=False)
            self.saved = steps(self.directory)
            assert self.committed()["data", 0] == 40
        return super().poll(max_records, 0.01)


async def test_partitions_that_go_are_in_a_checkpoint_and_committed_first(tmp_path: Path) -> None:
    source = Shared(tmp_path)
    fill(source, 0, 40)

    async def revoke(daemon: Daemon) -> None:
        await until(lambda: daemon.state == "waiting for records" and daemon.core.counts["feedback"] >= 40)
        source.gone = [("data", 0)]
        await until(lambda: source.saved)
        assert source.saved[-1] >= daemon.runner.batches
        daemon.stop()

    with daemon_on(tmp_path, source) as daemon:
        await run(daemon, revoke)
    assert daemon.readers[0].partitions == [("feedback", 0)]


async def test_signals_drain(tmp_path: Path) -> None:
    async def send(daemon: Daemon) -> None:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(daemon.handle_signals)
                await until(lambda: daemon.state == "waiting for records")
                os.kill(os.getpid(), signal.SIGTERM)
                await until(lambda: daemon.state == "stopped")
                scope.cancel()

    with daemon_on(tmp_path, memory(10, bounded=False)) as daemon:
        await run(daemon, send)
    assert steps(tmp_path)[-1] == daemon.runner.keeper.sequence
