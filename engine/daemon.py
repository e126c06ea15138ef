"""The daemon: one task group that reads, answers, adapts, learns, checkpoints and drains.

Threads: one for each source, one for the sinks, one that owns the model, one for background jobs, one for checkpoints.
The event loop decides what happens next and never computes.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import anyio
import structlog
from anyio import CapacityLimiter, to_thread
from anyio.abc import TaskGroup

from engine.affinity import Affinity
from engine.core import MAX_DEFERRED, Core
from engine.cutter import Cut, Cutter, ReplayError
from engine.errors import RestartError, UnreachableError
from engine.handover import Handover, happens
from engine.metrics import Metrics
from engine.reader import Chunk, Reader
from engine.runner import Runner
from engine.saver import Saver
from engine.writer import Writer
from streams.base import Positions, StreamUnavailableError
from streams.refusals import Refusals
from streams.seams import CLOCK, failpoint

T = TypeVar("T")

CUTS_PER_TURN = 8
"""Batches that go to the model's thread at once while there is a backlog; one, as a rule, when there is none."""

START_SECONDS = 60.0
DRAIN_SECONDS = 45.0
QUIET_SECONDS = 30.0
"""Time after which the log says again that the start waits for a stream."""
BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)

log = structlog.get_logger("adaptd")


class Daemon:
    """Runs a policy on its streams until they end or a signal comes.

    Args:
        runner: Applies batches.
        cutter: Cuts them.
        readers: One for each source.
        writer: Writes answers.
        metrics: What is exported.
        checkpoint_every: Seconds between checkpoints.
        affinity: Where threads run; without it, anywhere.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        cutter: Cutter,
        readers: Sequence[Reader],
        writer: Writer,
        metrics: Metrics,
        checkpoint_every: float,
        affinity: Affinity | None = None,
    ) -> None:
        self.runner = runner
        self.core = runner.core
        self.cutter = cutter
        self.writer = writer
        self.metrics = metrics
        self.readers = list(readers)
        self.affinity = affinity or Affinity(wanted=False)
        self.handover = Handover(self)
        self.turn = anyio.Lock()
        """Held for as long as something happens between two batches, or a batch does."""
        self.state = "starting"
        self.started = self.last_progress = CLOCK.monotonic()
        self.saver = Saver(self, checkpoint_every)
        self._compute = CapacityLimiter(1)
        self._learning = CapacityLimiter(1)
        self._threads = CapacityLimiter(8)
        self.under_way: Sequence[Cut] = ()
        """What the model's thread applies at present."""
        self._wake, self._until = anyio.Event(), math.inf
        self._leaving = anyio.Event()
        self._job: anyio.Event | None = None
        self._stopping = False
        self._drained = False
        self._tasks: TaskGroup | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until the streams end or `stop` is called, then drain.

        Raises:
            UnreachableError: A stream did not answer within a minute at the start.
            StreamError: A stream cannot be used.
            RestartError: Draining took too long.
        """
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            patience = anyio.CancelScope()
            tasks.start_soon(self._limit_draining, patience)
            try:
                if await self._open():
                    tasks.start_soon(self.affinity.keep)  # not before: the threads of librdkafka run anywhere
                    for reader in self.readers:
                        tasks.start_soon(self.in_thread, reader.run, self.cutter.taken)
                    tasks.start_soon(self.in_thread, self.writer.run)
                    await self._serve()
                    await self._drain()
                patience.cancel()
            finally:
                for reader in self.readers:
                    reader.stop()
                self.writer.abort()
                self.runner.keeper.hurry.begin()
                self.affinity.release()
                self.state = "stopped"

    async def handle_signals(self) -> None:
        """Drain at the first SIGTERM or SIGINT, leave at once at the second. Runs until cancelled."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                if self._stopping:
                    os._exit(130 if number is signal.SIGINT else 143)
                log.info("draining", signal=signal.Signals(number).name)
                self.stop()

    def stop(self) -> None:
        """Have `run` drain and return. Called on the event loop."""
        self._stopping = True
        self.runner.keeper.stopping.set()
        self.runner.keeper.hurry.begin()
        self._wake.set()
        self._leaving.set()

    def beside(self, function: Callable[..., Coroutine[Any, Any, object]], *args: Any) -> None:
        """Run a coroutine function beside everything else; what it raises ends the daemon."""
        assert self._tasks is not None
        self._tasks.start_soon(function, *args)

    @property
    def leaving(self) -> bool:
        """Whether the daemon has begun to drain."""
        return self._leaving.is_set()

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that may block, on a thread of its own."""
        return await to_thread.run_sync(function, *args, limiter=self._threads)

    async def on_model(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function on the thread that owns the model."""
        result = await to_thread.run_sync(function, *args, limiter=self._compute)
        self.last_progress = CLOCK.monotonic()
        return result

    async def _open(self) -> bool:
        """Open sinks and sources, with backoff for a minute, or close them again; False if told to leave meanwhile."""
        refusals = Refusals()
        try:
            with refusals.gather():
                await self._patiently(self.writer.open)
            answered: Positions = dict(self.writer.answered)
            for reader in self.readers:
                with refusals.gather():
                    await self._patiently(reader.open)
                    self.runner.keeper.check(reader.identities())
                    self.cutter.assigned(reader.partitions)
                    answered |= reader.committed
            refusals.tell()
            self.writer.answered = answered
            if not self.writer.transactional:
                # What a checkpoint covers is out, though the process may have ended before it was committed.
                self.writer.put(self.runner.covered())
            if self.runner.keeper.saved_step is None:
                await self.saver.save(wait=True)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                for close in (*(reader.close for reader in self.readers), self.writer.close):
                    await self.in_thread(close)
            if self._stopping and isinstance(error, UnreachableError):
                return False
            raise
        return True

    async def _patiently(self, action: Callable[[], None]) -> None:
        deadline, quiet_until = CLOCK.monotonic() + START_SECONDS, 0.0
        for attempt in range(1000):
            try:
                await self.in_thread(action)
                self.state = "starting"
                return
            except StreamUnavailableError as error:
                self.state = f"starting: {error}; retrying"
                if CLOCK.monotonic() >= deadline:
                    raise UnreachableError(f"{error}; gave up after {START_SECONDS:.0f} s") from error
                if CLOCK.monotonic() >= quiet_until:
                    log.warning("stream_unavailable", error=str(error))
                    quiet_until = CLOCK.monotonic() + QUIET_SECONDS
                with anyio.move_on_after(BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)]):
                    await self._leaving.wait()
                    raise UnreachableError(str(error)) from error
        raise AssertionError("unreachable")

    # -- serving ------------------------------------------------------------------------------------------------

    def hand_over(self, chunk: Chunk) -> None:
        """Take in a chunk from a reader. Called on the event loop."""
        if chunk.placed:
            self.writer.answered = {**self.writer.answered, **chunk.committed}
            self.handover.placed(chunk)
        for items in chunk.items:
            self.cutter.feed(items, chunk.since)
        if chunk.read:
            self.cutter.read(chunk.read)
        if chunk.ended:
            self.cutter.ended(chunk.ended)
        if not chunk.items or self.cutter.rebuilding or not self._until <= self.cutter.deadline() < math.inf:
            self._wake.set()  # there is more to do than to wait on for a full batch, or for the end of its delay

    async def _serve(self) -> None:
        """Take turns until stopped or until every stream has ended."""
        self._launch()
        while not self._stopping:
            async with self.turn:
                worked = await self._take_turn()
            if not worked:
                if self._job is None and self._exhausted():
                    return
                await self._wait()

    def _exhausted(self) -> bool:
        """Whether every stream has ended and everything is applied; a source that never ends may own no partition."""
        return all(reader.bounded for reader in self.readers) and self.cutter.exhausted()

    async def _take_turn(self) -> bool:
        """Do the next thing that is due; False when there is none."""
        if self.handover.moved:
            await self.handover.take_stock()
        if self._job is not None and self._job.is_set():
            await self._take_job()
            return True
        if self.saver.prepare() and self.core.job is None:
            await self.saver.save()
        if self._job is not None and self.core.deferred >= MAX_DEFERRED:
            self.state = "waiting for a background job"
            await self._job.wait()
            return True
        try:
            cuts = self._next_cuts()
        except ReplayError as error:
            if not any(reader.shared for reader in self.readers):
                raise
            await self.handover.abandon_replay(str(error))
            return True
        if not cuts:
            return False
        self.state = f"replaying, {self.cutter.replaying} batches left" if self.cutter.replaying else "serving"
        self.under_way = cuts
        await self.on_model(self.runner.apply, cuts)
        self.under_way = ()
        self._launch()
        return True

    def _next_cuts(self) -> list[Cut]:
        self.handover.look()
        cuts: list[Cut] = []
        while len(cuts) < CUTS_PER_TURN:
            try:
                cut = self.cutter.next(CLOCK.monotonic())
            except ReplayError:
                if not cuts:
                    raise
                break
            if cut is None:
                break
            cuts.append(cut)
        for reader in self.readers:
            reader.starved = self.cutter.starved
            reader.used()
        return cuts

    async def _wait(self) -> None:
        """Wait for records, for a job, for a deadline of the batcher or for the next checkpoint."""
        if self._stopping:
            return
        self._wake = anyio.Event()
        away = any(not reader.available for reader in self.readers)
        self.state = "waiting for a broker" if away else "waiting for records"
        now = CLOCK.monotonic()
        self._until = until = min(self.cutter.deadline(), max(self.saver.next, now + 0.05), now + 1.0)
        with anyio.move_on_after(max(0.0, until - now)):
            await self._wake.wait()

    # -- background jobs ----------------------------------------------------------------------------------------

    def _launch(self) -> None:
        """Start the core's job beside serving, unless the journal is to say when it ends."""
        if self.core.job is not None and self._job is None and not self.cutter.replaying:
            self._job = anyio.Event()
            self.beside(self._run_job, self._job)

    async def _run_job(self, done: anyio.Event) -> None:
        assert self.core.job is not None
        try:
            await to_thread.run_sync(self.affinity.apart, self.core.learner.run, self.core.job, limiter=self._learning)
        finally:  # whoever waits for it must not wait for ever where everything ends
            done.set()
            self._wake.set()

    async def _take_job(self) -> None:
        """Take in the finished job, checkpoint if one is due, and start the next."""
        self._job = None
        await self.on_model(self.runner.done)
        if self.saver.prepare():
            await self.saver.save()
        await self.on_model(self.core.make_job)
        self._launch()

    async def _finish_job(self) -> None:
        """Wait for the job under way, if any, and take it in."""
        if self._job is not None:
            await self._job.wait()
            self._job = None
            await self.on_model(self.runner.done)

    async def settle(self, deadline: float = math.inf, take: Callable[[], Core] | None = None) -> bool:
        """Make a checkpoint, between two jobs and two batches; whether that was done by the (monotonic) deadline.

        Once it is made, go on with the core that ``take`` gives, if there is one.
        """
        if self._drained:
            return True
        with self.runner.keeper.hurry.while_waiting():
            self._launch()
            for event in (self._job, self.saver.under_way):
                if event is not None and not await happens(event, deadline):
                    return False
            await self._finish_job()
            await self.saver.save()
            saving = self.saver.under_way
            if take is not None:
                if saving is not None:
                    await saving.wait()
                self.core = self.runner.core = await self.on_model(take)
            await self.on_model(self.core.make_job)
            self._launch()
            return saving is None or await happens(saving, deadline)

    async def flush(self, limit: float = math.inf) -> bool:
        """Wait until every answer so far is out; whether ``limit`` seconds did. Raises as `Writer.wait_flushed`."""
        with anyio.move_on_after(limit) as scope:
            if not self._drained:
                await to_thread.run_sync(self.writer.wait_flushed, abandon_on_cancel=True, limiter=self._threads)
        return not scope.cancelled_caught

    # -- leaving ------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Finish the job, flush answers, checkpoint, commit, leave."""
        self._leaving.set()
        failpoint("drain")
        self.state = "draining"
        started = CLOCK.monotonic()
        async with self.turn:
            await self._finish_job()
            if not self._stopping:
                await self.on_model(self.runner.finish)
            await self.saver.save(wait=True)
            await self.flush()  # transactions are committed as a member of the group, which the readers leave
            self._drained = True
        await self.in_thread(self.writer.stop)
        for reader in self.readers:
            reader.stop()
        seconds, events = round(CLOCK.monotonic() - started, 3), self.core.counts["events"]
        log.info("drained", seconds=seconds, events=events, **self.runner.unused)

    async def _limit_draining(self, patience: anyio.CancelScope) -> None:
        """Give up once leaving has taken too long, whatever it hangs on."""
        with patience:
            await self._leaving.wait()
            await anyio.sleep(DRAIN_SECONDS)
            self.writer.abort()
            waiting = self.writer.waiting_for
            raise RestartError(
                f"draining took more than {DRAIN_SECONDS:.0f} s{f', waiting for {waiting}' if waiting else ''};"
                " the last checkpoint is good, start again"
            )

    def export(self) -> None:
        """Bring the metrics that are read off the daemon up to date."""
        self.metrics.look(self)
