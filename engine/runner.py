"""The runner: applies cuts to the core, on the one thread that owns the model."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import cast

import structlog

from engine.core import Core
from engine.coretypes import Answers
from engine.cutter import MOVES, Bad, Cut, split, times_of
from engine.floors import Floors
from engine.keeper import Keeper, Snapshot
from engine.metrics import Metrics
from engine.writer import Outgoing, Writer
from streams.base import Partition, Positions
from streams.codec import Event, Feedback
from streams.journal import Entry, Kind
from streams.seams import CLOCK, failpoint

log = structlog.get_logger("adaptd")

QUIET_SECONDS = 60.0
"""Time after which another dead letter, or label of no class, is described in the log; all are counted."""


class Runner:
    """Journals and applies cuts, in order.

    Attributes:
        positions: The next offset to read of every partition, for what has been applied.
        batches: Cuts applied by this process.
        replayed: Of these, cuts repeated from the journal.
        taken: Of the partitions that came from others, the position up to which these had worked.
        floors: From where whoever comes next can make what waits of each partition.
        dead_letters: Records in them that could not be decoded.
    """

    def __init__(
        self,
        core: Core,
        keeper: Keeper,
        writer: Writer,
        metrics: Metrics,
        positions: Positions,
        floors: Floors | None = None,
    ) -> None:
        self.metrics = metrics
        self.core = core
        self.keeper = keeper
        self.writer = writer
        self.positions = dict(positions)
        self.batches = 0
        self.replayed = 0
        self.dead_letters = 0
        self._quiet_until = self._labels_quiet_until = 0.0
        self._told_frozen = False
        self.taken = {(stream, number): at for stream, number, at in keeper.membership.get("taken", [])}
        self.floors = floors or Floors({}, None)
        self.floors.load_state_dict(keeper.membership.get("marks", []))

    @property
    def core(self) -> Core:
        """What the cuts are applied to. Metrics hear of every job of it, of which one cut may make many."""
        return self._core

    @core.setter
    def core(self, core: Core) -> None:
        core.on_done = self.metrics.job
        self._core = core

    def apply(self, cuts: Sequence[Cut]) -> None:
        """Apply cuts; each is in the journal before anything changes."""
        for cut in cuts:
            failpoint("cut")
            self._journal(cut)
            if cut.kind is Kind.DONE:
                self._done_again()
            elif cut.kind is Kind.TICK:
                self.core.finish()
            elif cut.kind in MOVES:
                self._move(cut)
            else:
                self._batch(cut)
                self.positions.update(cut.positions())
            self.batches += 1
        self._report()

    def _report(self) -> None:
        """Tell metrics and log what has happened."""
        self.metrics.watch(self.core)
        self._foreign_label()
        while self.core.decisions:
            decision = self.core.decisions.popleft()
            figures = {name: round(value, 4) for name, value in decision.figures.items()}
            log.info(
                "release_decided", action=decision.action, reason=decision.reason, release=self.core.release, **figures
            )
        if self.core.freeze.on and not self._told_frozen:
            log.error("frozen", rollbacks=self.core.freeze.rollbacks, answers="release", until="the policy changes")
        self._told_frozen = self.core.freeze.on

    def _foreign_label(self) -> None:
        """Describe a label that names no class of the model once in a while."""
        row, self.core.foreign = self.core.foreign, None
        now = CLOCK.monotonic()
        if row is not None and now >= self._labels_quiet_until:
            self._labels_quiet_until = now + QUIET_SECONDS
            known = f"classes 0 to {self.core.host.num_classes - 1}"
            so_far = self.core.counts["foreign_labels"]
            log.warning("unusable_label", id=row.id, label=row.label, model_has=known, so_far=so_far)

    @property
    def unused(self) -> dict[str, int]:
        """Of what nothing is learned, by reason: dead letters of this process, the rest as checkpoints carry it on."""
        counts, joins = self.core.counts, self.core.joins
        return {
            "dead_letters": self.dead_letters,
            "unusable_labels": counts["unusable_labels"],
            "orphans": joins.counts["orphan"],
            "late": joins.counts["late"],
            "still_waiting": joins.early,
        }

    def _dead(self, bad: Sequence[Bad]) -> None:
        """Count records that could not be decoded, and describe one of them once in a while."""
        self.dead_letters += len(bad)
        now = CLOCK.monotonic()
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
        if cut.kind is Kind.DATA and good:
            self._answer(cut, cast("Sequence[Event]", good), bad)  # a stream carries one kind
            return
        if cut.kind is Kind.SEEN_DATA and good:
            self.core.seen(cast("Sequence[Event]", good))
        elif cut.kind is Kind.SEEN_FEEDBACK and good:
            self.core.seen_feedback(cast("Sequence[Feedback]", good))
        elif good:
            started = time.perf_counter()
            feedback = cast("Sequence[Feedback]", good)
            self.core.feedback(feedback)
            failpoint("feedback.joined")
            self.metrics.feedback(feedback, time.perf_counter() - started)
        self._mark(cut)
        if cut.kind is Kind.DATA or cut.kind is Kind.FEEDBACK:  # what was seen before is out and committed
            self.writer.put(self._outgoing(cut, bad))

    def _answer(self, cut: Cut, events: Sequence[Event], bad: Sequence[Bad]) -> None:
        started = time.perf_counter()
        answers = self.core.answer(events)
        answered = time.perf_counter()
        failpoint("answered")
        self._mark(cut)
        self.writer.put(self._outgoing(cut, bad, answers))
        put = time.perf_counter()
        failpoint("answers.put")
        self.core.follow()
        failpoint("followed")
        self.metrics.batch(answers.events, answered - started, time.perf_counter() - put)

    def _outgoing(self, cut: Cut, bad: Sequence[Bad], answers: Answers | None = None) -> Outgoing:
        positions = cut.positions()
        waiting = answers is not None or self.core.joins.pending > 0 or self.core.joins.early > 0
        return Outgoing(answers, bad, positions, floors=self.floors.of(positions, waiting=waiting))

    def covered(self, partitions: Collection[Partition] | None = None) -> Outgoing:
        """Everything that was applied, of these partitions or of all, to be committed once it is out."""
        positions = {p: at for p, at in self.positions.items() if partitions is None or p in partitions}
        return Outgoing(positions=positions, floors=self.floors.of(positions, waiting=True))

    def _mark(self, cut: Cut) -> None:
        """Note where the records of a cut lie in time."""
        if not self.floors.kept:
            return
        at, times = 0, times_of(cut.items)
        for run in cut.runs:
            newest = max(times[at : at + run.count])
            at += run.count
            if newest > -math.inf:  # a record that could not be decoded has no time, and nothing waits of it
                self.floors.mark((run.stream, run.partition), run.first, newest, self.core.now)

    def _move(self, cut: Cut) -> None:
        """Forget what waits of partitions that went, or that came and are made anew."""
        partitions: list[Partition] = [(run.stream, run.partition) for run in cut.runs]
        data, feedback = (
            {number for stream, number in partitions if self.floors.carries(stream) is kind}
            for kind in (Kind.DATA, Kind.FEEDBACK)
        )
        self.core.moved(data, feedback)
        self.floors.forget(partitions)
        for partition, run in zip(partitions, cut.runs, strict=True):
            self.positions.pop(partition, None)
            self.taken.pop(partition, None)
            if cut.kind is Kind.TAKEN:
                self.positions[partition], self.taken[partition] = run.first, run.end

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
        taken = [[*partition, at] for partition, at in sorted(self.taken.items())]
        membership = {"taken": taken, "marks": self.floors.state_dict()}
        return self.keeper.snapshot(self.core, self.positions, membership)
