"""The deterministic core: what a batch of records does to the model and to everything around it.

The core reads no clock, no stream and no file, and starts no thread. It is driven by three calls, each of which is one
entry of the journal: `Core.answer` with `Core.follow` (a batch of data), `Core.feedback` (a batch of feedback) and
`Core.done` (a background job is taken in). The same calls in the same order always give the same state and the same
answers; a restart relies on nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.audit import Audit, held_out
from engine.coretypes import Answers, CoreSettings
from engine.freeze import Freeze
from engine.host import ModelHost, clone
from engine.learner import Job, Learner
from engine.methods import Methods
from engine.needs import Needs
from engine.rows import pack, unpack
from engine.watermark import Watermark
from policies.interfaces import (
    Action,
    Adaptation,
    Batch,
    Decision,
    Outcome,
    State,
    StepKind,
    Verdict,
    load_weights,
)
from streams.codec import Event, Events, Feedback
from streams.join import Joined, JoinStore, Waiting, WaitingRows
from streams.seams import failpoint

MAX_DEFERRED = 64
"""Batches whose adaptation may wait for a background job before serving waits too; bounds memory."""


class Core:
    """Ties models, methods, joins and audit together. Used by one thread at a time.

    Attributes:
        counts: Everything counted, by name; part of the checkpoint.
        step: Updates applied to the live weights.
        release: Number of the current release; 0 is the source model.
        job: The background job to run or running, if any.
        decisions: Release decisions not yet reported, oldest first; whoever reports them takes them out.
        on_done: Told of every job that was taken in.
        freeze: What answers in place of adaptation where that was rolled back too often.
        foreign: The last label that names no class of the model, until whoever reports it takes it out.
    """

    def __init__(
        self,
        settings: CoreSettings,
        host: ModelHost,
        methods: Methods,
        learner: Learner,
        audit: Audit,
        joins: JoinStore,
    ) -> None:
        self.settings = settings
        self.host = host
        self.methods = methods
        self.learner = learner
        self.audit = audit
        self.joins = joins
        self.counts: Counter[str] = Counter()
        self.step = self.release = 0
        self.alpha = 0.0
        self.clock = Watermark(settings.window)
        self.freeze = Freeze(host, settings.freeze_after)
        self.job: Job | None = None
        self.on_done: Callable[[Job], object] = lambda job: None
        self.decisions: deque[Decision] = deque(maxlen=64)
        self.foreign: Joined | None = None
        self.entropy, self.deferred = 0.0, 0
        self._to_learn: deque[Joined] = deque()
        self._to_audit: deque[Joined] = deque()
        self._attempted_at, self._reset_due = 0, False
        self._batch: tuple[Batch, Tensor, Answers] | None = None
        self._needs = Needs(settings, host, methods, learner)
        self._updates = type(methods.adaptation).update is not Adaptation.update
        self._hears = type(methods.adaptation).labelled is not Adaptation.labelled

    @property
    def watermark(self) -> float:
        """How far event time has come, in seconds; the clock of all methods."""
        return self.clock.value

    @property
    def now(self) -> float:
        """The watermark, with the batch that was answered last."""
        return self.watermark if self._batch is None else self._batch[0].now

    # -- data ---------------------------------------------------------------------------------------------------

    def answer(self, events: Sequence[Event]) -> Answers:
        """Answer a batch of at least one event. `follow` must be called next, once the answers are on their way."""
        events = Events.of(events)
        batch = Batch(
            ids=tuple(events.ids),
            inputs=self.host.inputs.stack(events.inputs, self.host.device),
            times=torch.from_numpy(np.array(events.times, np.float64)),
            groups=tuple(events.groups),
            now=self.clock.advance(events.times),
        )
        logits = self.freeze.answer(batch) if self.freeze.on else self.methods.adaptation.adapt(batch)
        probabilities = logits.float().softmax(1).cpu().numpy()
        answers = Answers(events, probabilities.argmax(1), probabilities, self.release, self.step)
        self._batch = batch, logits, answers
        return answers

    def follow(self) -> None:
        """Do what follows from the batch just answered: adapt, let safeguards judge, let inputs wait for labels."""
        assert self._batch is not None
        (batch, logits, answers), self._batch = self._batch, None
        self.counts["events"] += len(batch)
        self._watch(batch, logits, answers)
        if not self.freeze.on:
            self._adapt(batch, logits)
        if self.settings.store_inputs:
            self._wait_for_labels(answers)
        self.make_job()

    def _adapt(self, batch: Batch, logits: Tensor) -> None:
        """Let adaptation and safeguards do what a batch makes them want to, now or after the job under way."""
        verdicts = [guard.verdict(batch, logits) for guard in self.methods.safeguards]
        if Verdict.RESET in verdicts:
            self._reset_due = True
        if self.job is not None:
            self.deferred += self._updates
        else:
            self._settle()

    def _wait_for_labels(self, answers: Answers) -> None:
        """Let the inputs of a batch wait; labels that came before their event join now."""
        events, steps = answers.events, [answers.step] * len(answers.events)
        columns = events.ids, self._needs.answered(events), events.times, events.groups
        waiting = WaitingRows(*columns, answers.labels.tolist(), steps, events.records.partitions)
        self._joined(self.joins.answered(waiting, self.watermark))

    def _watch(self, batch: Batch, logits: Tensor, answers: Answers) -> None:
        """Note the mean entropy of the answers in nats and count rows that were not finite."""
        p = answers.probabilities
        self.entropy = float(-np.vdot(p, np.log(np.maximum(p, 1e-30)))) / len(p)
        if batch.inputs.is_floating_point() and not math.isfinite(batch.inputs.sum()):
            self.counts["nonfinite_inputs"] += int((~batch.inputs.flatten(1).isfinite().all(1)).sum())

    def _settle(self) -> None:
        """Apply what adaptation and safeguards want done to the live weights. Never while a job is under way."""
        if self._reset_due:
            self._reset()
        elif self._updates and not self.freeze.on:
            self.counts["merged_batches"] += max(0, self.deferred - 1)
            self._count(StepKind.ADAPTATION, self.methods.adaptation.update())
        self.deferred = 0

    def _reset(self) -> None:
        """Return to the source model and forget what adaptation, safeguards and optimizer hold."""
        self._reset_due = False
        self.methods.adaptation.reset()
        for guard in self.methods.safeguards:
            guard.reset()
        self.learner.optimizer.state.clear()
        self.counts["resets"] += 1
        self.step += 1

    def _count(self, kind: StepKind, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.applied:
            self.step += 1
            self.counts[f"updates.{kind}"] += 1
        else:
            self.counts[f"skipped.{kind}.{outcome.reason}"] += 1

    # -- feedback -----------------------------------------------------------------------------------------------

    def feedback(self, items: Sequence[Feedback]) -> None:
        """Take in a batch of feedback."""
        self.clock.advance([item.time for item in items])
        self.counts["feedback"] += len(items)
        self._joined(self.joins.feedback(items, self.watermark))
        self.make_job()

    # -- partitions that move -----------------------------------------------------------------------------------

    def seen(self, events: Sequence[Event]) -> None:
        """Let events wait for their labels that somebody else has answered. Nothing is answered or adapted to."""
        self.clock.advance([event.time for event in events])
        if self.settings.store_inputs:
            rows = zip(events, self._needs.seen(Events.of(events)), strict=True)
            waiting = [Waiting(e.id, raw, e.time, e.group, -1, -1, e.record.partition) for e, raw in rows]
            self._joined(self.joins.seen(waiting, self.watermark))
        self.make_job()

    def seen_feedback(self, items: Sequence[Feedback]) -> None:
        """Let nothing wait any more for feedback that somebody else has learned from. Nothing is counted."""
        self.clock.advance([item.time for item in items])
        self.joins.seen_feedback(items, self.watermark)
        self.make_job()

    def moved(self, data: Collection[int], feedback: Collection[int]) -> None:
        """Forget what waits of partitions, by number, whose waiting joins somebody makes anew: others, or `seen`."""
        self.joins.drop(data, feedback)

    def _joined(self, rows: Sequence[Joined]) -> None:
        """Sort joined rows into those to learn from and those to audit; adaptation hears all labels that were named."""
        named: list[tuple[str, int, str | None]] = []
        for row in rows:
            label = self._label_of(row)
            if label is None:
                self.counts["unusable_labels"] += 1
                if row.label is not None:
                    self.counts["foreign_labels"] += 1
                    self.foreign = row
                continue
            if (
                self._hears and not self.freeze.on and row.label is not None
            ):  # a reward would speak for whatever way to answer is in force
                named.append((row.id, label, row.group))
            row = row._replace(label=label)
            self.counts["labels"] += 1
            self._sort(row)
        if named:
            self.methods.adaptation.labelled(*zip(*named, strict=True))

    def _sort(self, row: Joined) -> None:
        """Keep a labelled row to audit it or to learn from it, if there is a use for it."""
        if held_out(row.id, self.settings.audit_share):
            self._to_audit.append(row)
        elif self.freeze.on:
            self.counts["frozen_labels"] += self.learner.enabled
        elif self.learner.enabled and row.inputs:
            self._to_learn.append(row)
        else:
            self.counts["labels_without_inputs"] += self.learner.enabled

    def _label_of(self, row: Joined) -> int | None:
        """The class that feedback names. A positive reward confirms the class that was answered."""
        if row.label is not None:
            return row.label if 0 <= row.label < self.host.num_classes else None
        return row.predicted if row.reward is not None and row.reward > 0 and row.predicted >= 0 else None

    # -- jobs ---------------------------------------------------------------------------------------------------

    def make_job(self) -> None:
        """Make the next job if one is due, and run it at once unless jobs run in the background.

        Every call ends with this; after `done` it is the caller's, so that a checkpoint fits in between.
        """
        while self.job is None:
            job = self._next_job()
            if job is None:
                return
            self.learner.prepare(job)
            self.job = job
            if self.settings.background:
                return
            self.learner.run(job)
            self.done()

    def _next_job(self) -> Job | None:
        size = self.settings.batch_size
        learn = self._due(self._to_learn, size)
        audit = self._due(self._to_audit, max(1, size // 2))
        every = self.settings.release_every
        due = bool(every) and self.counts["labels"] - self._attempted_at >= every
        attempt = due and not self.freeze.on and self.audit.evidence > 0
        if not (learn or audit or attempt):
            return None
        if attempt:
            self._attempted_at = self.counts["labels"]
        learned = [self._to_learn.popleft() for _ in range(min(size, len(self._to_learn)) if learn else 0)]
        # an attempt judges the window as it stands, so rows to audit wait for the next job
        return Job(learned, [] if attempt else self._take_audited(), attempt, self.watermark)

    def _take_audited(self) -> list[Joined]:
        """Take the rows to audit that can be: an earlier policy may have had no use for the inputs of some."""
        audited = list(filter(self._needs.can_judge, self._to_audit))
        self.counts["labels_without_inputs"] += len(self._to_audit) - len(audited)
        self._to_audit.clear()
        return audited

    def _due(self, rows: deque[Joined], size: int) -> bool:
        oldest = rows[0].feedback_time if rows else math.inf
        return len(rows) >= size or self.watermark - oldest >= self.settings.max_delay

    def done(self) -> None:
        """Take in the finished job: its audit rows, what it learned, and its release decision."""
        assert self.job is not None
        failpoint("job.take")
        job, self.job = self.job, None
        self.audit.add(job.audited, job.source_classes, job.release_classes)
        if self._reset_due and job.outcome is not None:
            job.outcome = Outcome(False, "reset")
        self._count(StepKind.LEARNING, job.outcome)
        self.learner.take(job)
        if job.decision is not None and not self._reset_due:  # nothing is released from weights just condemned
            self._decided(job)
        self._settle()
        self.on_done(job)

    def _decided(self, job: Job) -> None:
        decision = job.decision
        assert decision is not None
        self.counts[f"decisions.{decision.action}.{decision.reason}"] += 1
        self.decisions.append(decision)
        if decision.action is Action.PROMOTE:
            assert job.chosen is not None
            assert job.chosen_classes is not None
            self.host.release = clone(job.chosen.weights)
            self.audit.promoted(job.chosen_classes)
            self.release += 1
            self.alpha = job.chosen.alpha
            for guard in self.methods.safeguards:
                guard.released(self.host.release)
        elif decision.action is Action.ROLL_BACK:
            self._roll_back()
        self.freeze.see(decision.action)
        if self.freeze.on:
            self.counts["frozen_labels"] += len(self._to_learn)
            self._to_learn.clear()

    def _roll_back(self) -> None:
        """Return the live weights to the release, and whatever adaptation keeps beside them."""
        self._reset()
        parameters = {name: tensor.detach() for name, tensor in self.host.live.named_parameters()}
        before = clone(parameters)
        load_weights(self.host.live, self.host.release)
        self.methods.adaptation.learned(before, parameters)
        self.counts["resets"] -= 1
        self.counts["rollbacks"] += 1
        self.audit.rolled_back(self.step)

    @property
    def unfinished(self) -> bool:
        """Whether rows wait to be learned from or audited."""
        return bool(self._to_learn or self._to_audit)

    def finish(self) -> None:
        """Learn from and audit what is left, once a bounded stream has ended."""
        while self.job is None and self.unfinished:
            learned = [self._to_learn.popleft() for _ in range(min(self.settings.batch_size, len(self._to_learn)))]
            self.job = Job(learned, self._take_audited(), False, self.watermark)
            self.learner.prepare(self.job)
            self.learner.run(self.job)
            self.done()

    # -- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Everything but weights, methods, optimizer and joins, which have files of their own.

        There is no state while a job is under way: the learner's thread is changing it.
        """
        assert self.job is None
        return {
            "counts": dict(self.counts),
            "step": self.step,
            "release": self.release,
            "alpha": self.alpha,
            "watermark": self.watermark,
            "clock": self.clock.state_dict(),
            "rolled_back": self.freeze.state_dict(),
            "attempted_at": self._attempted_at,
            "reset_due": self._reset_due,
            "deferred": self.deferred,
            "to_learn": pack(self._to_learn),
            "to_audit": pack(self._to_audit),
            "plain": self._needs.plain,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        self.counts = Counter(state["counts"])
        self.step, self.release, self.alpha = state["step"], state["release"], state["alpha"]
        self._attempted_at = state["attempted_at"]
        of_old = {"value": state["watermark"], "ahead": 0, "run": 0, "oldest": None}  # before there was a clock
        self.clock.load_state_dict(state.get("clock", of_old))
        self.freeze.load_state_dict(state.get("rolled_back", []))  # nobody counted them once
        self._reset_due, self.deferred = state["reset_due"], state["deferred"]
        self._to_learn, self._to_audit = deque(unpack(state["to_learn"])), deque(unpack(state["to_audit"]))
        self._needs.restored(plain=state.get("plain", False))  # nobody noted it once
