"""The runner: applies cuts to the core, on the one thread that owns the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import structlog

from engine.core import Core
from engine.cutter import Bad, Cut, split
from engine.keeper import Keeper, Snapshot
from engine.metrics import Metrics
from engine.writer import Outgoing, Writer
from streams.base import Positions
from streams.codec import Event, Feedback
from streams.journal import Entry, Kind
from streams.seams import failpoint

log = structlog.get_logger("adaptd")

QUIET_SECONDS = 60.0
"""Time after which another dead letter is described in the log; all are counted."""


class Runner:
    """Journals and applies cuts, in order.

    Attributes:
        positions: The next offset to read of every partition, for what has been applied.
        batches: Cuts applied by this process.
        replayed: Of these, cuts repeated from the journal.
        dead_letters: Records in them that could not be decoded.
    """

    def __init__(self, core: Core, keeper: Keeper, writer: Writer, metrics: Metrics, positions: Positions) -> None:
        self.core = core
        self.keeper = keeper
        self.writer = writer
        self.metrics = metrics
        self.positions = dict(positions)
        self.batches = 0
        self.replayed = 0
        self.dead_letters = 0
        self._quiet_until = 0.0

    def apply(self, cuts: Sequence[Cut]) -> None:
        """Apply cuts; each is in the journal before anything changes."""
        for cut in cuts:
            failpoint("cut")
            self._journal(cut)
            if cut.kind is Kind.DONE:
                self._done_again()
            elif cut.kind is Kind.TICK:
                self.core.finish()
            else:
                self._batch(cut)
            self.positions.update(cut.positions())
            self.batches += 1
        self._report()

    def _report(self) -> None:
        """Tell metrics and log what has happened."""
        self.metrics.watch(self.core)
        while self.core.decisions:
            decision = self.core.decisions.popleft()
            figures = {name: round(value, 4) for name, value in decision.figures.items()}
            log.info(
                "release_decided", action=decision.action, reason=decision.reason, release=self.core.release, **figures
            )

    def _dead(self, bad: Sequence[Bad]) -> None:
        """Count records that could not be decoded, and describe one of them once in a while."""
        self.dead_letters += len(bad)
        now = time.monotonic()
        if bad and now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            record, error = bad[0].record, bad[0].error
            place = f"{record.stream}-{record.partition}-{record.offset}"
            log.warning("dead_letter", record=place, error=str(error), so_far=self.dead_letters)

    def _journal(self, cut: Cut) -> None:
        self.keeper.sequence += 1
        if cut.replayed:
            self.replayed += 1
            self.metrics.replayed()
            failpoint("replay")
            return
        self.keeper.append(Entry(self.keeper.sequence, cut.kind, self.core.watermark, cut.runs))

    def _batch(self, cut: Cut) -> None:
        good, bad = split(cut.items)
        self._dead(bad)
        positions = cut.positions()
        if cut.kind is Kind.DATA and good:
            self._answer(cast("list[Event]", good), bad, positions)  # a stream carries one kind
            return
        if good:
            started = time.perf_counter()
            self.core.feedback(cast("list[Feedback]", good))
            failpoint("feedback.joined")
            self.metrics.feedback(good, time.perf_counter() - started)
        self.writer.put(Outgoing(bad=bad, positions=positions))

    def _answer(self, events: list[Event], bad: Sequence[Bad], positions: Positions) -> None:
        started = time.perf_counter()
        answers = self.core.answer(events)
        answered = time.perf_counter()
        failpoint("answered")
        self.writer.put(Outgoing(answers, bad, positions))
        put = time.perf_counter()
        failpoint("answers.put")
        self.core.follow()
        failpoint("followed")
        self.metrics.batch(events, answered - started, time.perf_counter() - put)

    def _done_again(self) -> None:
        """Repeat a background job where the journal says that it was taken in; another policy may have made none."""
        if self.core.job is None:
            return
        self.core.learner.run(self.core.job)
        self.core.done()
        self.core.make_job()

    def done(self) -> None:
        """Take in the background job that has just finished. `Core.make_job` is to be called next."""
        self.keeper.sequence += 1
        self.keeper.append(Entry(self.keeper.sequence, Kind.DONE, self.core.watermark, ()))
        self.core.done()
        failpoint("job.taken")
        self._report()

    def finish(self) -> None:
        """Learn from what is left at the end of bounded streams; an entry of the journal like any batch."""
        if self.core.unfinished:
            self.apply([Cut(Kind.TICK, (), ())])

    def snapshot(self) -> Snapshot:
        """Copy the state of this instant. No background job may be under way."""
        return self.keeper.snapshot(self.core, self.positions)
