"""What happens beside serving: labelled learning, auditing and release attempts, one job after another.

A `Job` is made from the state between two batches, runs anywhere (it touches nothing that serving uses), and is
taken in between two later batches. Making it and taking it in are points in the journal, so a replay does the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.audit import Audit
from engine.host import ModelHost, clone
from engine.methods import Methods
from policies.interfaces import (
    Action,
    Candidate,
    Decision,
    Evidence,
    LabelledBatch,
    Outcome,
    Proposal,
    StepKind,
    Weights,
)
from policies.weighting import compose
from streams.join import Joined
from streams.seams import failpoint


@dataclass(slots=True)
class Job:
    """One piece of work beside serving: rows to learn from, rows to audit, and whether to attempt a release."""

    learned: Sequence[Joined]
    audited: Sequence[Joined]
    attempt: bool
    now: float
    outcome: Outcome | None = None
    seconds: float = 0.0
    losses: float = 0.0
    ess_ratio: float = 1.0
    max_weight: float = 1.0
    source_classes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    release_classes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    decision: Decision | None = None
    chosen: Proposal | None = None
    chosen_classes: Tensor | None = None


class Learner:
    """Runs jobs on the learner's copy of the model.

    Args:
        host: The models.
        methods: The policy's methods.
        audit: The audit window.
        optimizer: Steps the learner's trainable parameters.
        names: Names of these parameters.
        enabled: Whether labels are learned from at all.
    """

    def __init__(
        self,
        host: ModelHost,
        methods: Methods,
        audit: Audit,
        *,
        optimizer: torch.optim.Optimizer,
        names: Sequence[str],
        enabled: bool,
    ) -> None:
        self.host = host
        self.methods = methods
        self.audit = audit
        self.optimizer = optimizer
        self.names = tuple(names)
        self.enabled = enabled
        self._before: Weights = {}

    def prepare(self, job: Job) -> None:
        """Give the learner's copy the live weights of this instant. Runs where the live model is owned."""
        own = self.host.learner.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, tensor in self.host.live.state_dict().items():
                own[name].copy_(tensor)
            shared = self.methods.adaptation.adapted & set(self.names)
            self._before = {name: own[name].detach().clone() for name in shared}

    def run(self, job: Job) -> None:
        """Audit, learn, attempt a release. Touches nothing that serving uses."""
        failpoint("learn.begin")
        started = time.perf_counter()
        self._judge(job)
        if job.learned and self.enabled:
            self._learn(job)
        if job.attempt:
            self._attempt(job)
        if self.host.device.type == "cuda":
            torch.cuda.current_stream(self.host.device).synchronize()
        job.seconds = time.perf_counter() - started
        failpoint("learn.end")

    def _judge(self, job: Job) -> None:
        """Have source model and release predict the audited rows; for those without inputs both did what was answered.

        See `engine.needs`.
        """
        here = [at for at, row in enumerate(job.audited) if row.inputs]
        job.source_classes = torch.tensor([row.predicted for row in job.audited])
        job.release_classes = job.source_classes.clone()
        if not here:
            return
        inputs = self.host.inputs.stack([job.audited[at].inputs for at in here], self.host.device)
        job.source_classes[here] = self.host.predict(self.host.source, inputs)
        job.release_classes[here] = self.host.predict_with(self.host.release, inputs)
        if any(row.predicted < 0 for row in job.audited):  # inline feedback: what live weights would answer now
            live = dict(zip(here, self.host.predict(self.host.learner, inputs).tolist(), strict=True))
            rows = enumerate(job.audited)
            job.audited = [row if row.predicted >= 0 else row._replace(predicted=live[at]) for at, row in rows]

    def _learn(self, job: Job) -> None:
        """One weighted optimizer step with every safeguard in force."""
        batch, rewards = self._labelled(job)
        if not len(batch):
            job.outcome = Outcome(False, "nonfinite_inputs")
            return
        for guard in self.methods.safeguards:
            guard.observe(batch)
        model = self.host.learner
        losses = F.cross_entropy(model(batch.inputs), batch.labels, reduction="none")
        weights = [method.weigh(batch, losses) for method in self.methods.reweightings]
        composed = compose([*weights, rewards] if weights else [rewards])
        job.losses = float(losses.detach().mean())
        job.ess_ratio = composed.ess_ratio
        job.max_weight = float(composed.weights.max())
        loss = (composed.weights * losses).mean()
        job.outcome = self.methods.stepper.step(model, self.optimizer, loss, StepKind.LEARNING)

    def _labelled(self, job: Job) -> tuple[LabelledBatch, Tensor]:
        rows, device = job.learned, self.host.device
        batch = LabelledBatch(
            ids=tuple(row.id for row in rows),
            inputs=self.host.inputs.stack([row.inputs for row in rows], device),
            times=torch.tensor([row.time for row in rows], dtype=torch.float64),
            groups=tuple(row.group for row in rows),
            now=job.now,
            labels=torch.tensor([row.label for row in rows], device=device),
            feedback_times=torch.tensor([row.feedback_time for row in rows], dtype=torch.float64),
            predicted=torch.tensor([row.predicted for row in rows]),
        )
        rewards = torch.tensor([1.0 if row.reward is None else row.reward for row in rows], device=device)
        finite = batch.inputs.flatten(1).isfinite().all(1)
        if not bool(finite.all()):  # one such row would make the whole step not finite
            keep = finite.nonzero().flatten()
            return batch.rows(keep.cpu()), rewards[keep]
        return batch, rewards

    def _attempt(self, job: Job) -> None:
        """Propose weights between release and live, judge them on the audit window, and let the gate decide."""
        if self.methods.interpolation is None or self.methods.gate is None:
            return
        window = self.audit.window()
        proposals: list[Proposal] = []
        candidates: list[Candidate] = []
        live = clone(self.host.learner.state_dict())
        for proposal in self.methods.interpolation.propose(self.host.release, live, window):
            proposals.append(proposal)
            candidates.append(Candidate(proposal.alpha, self.host.predict_with(proposal.weights, window.inputs)))
        job.decision = self.methods.gate.decide(Evidence(window, tuple(candidates)))
        if job.decision.action is Action.PROMOTE:
            job.chosen = proposals[job.decision.chosen]
            job.chosen_classes = candidates[job.decision.chosen].predicted

    def take(self, job: Job) -> None:
        """Take what was learned into the live model, by exchanging references. Runs where the live model is owned."""
        if job.outcome is None or not job.outcome.applied:
            return
        live: dict[str, nn.Parameter] = dict(self.host.live.named_parameters())
        learner = dict(self.host.learner.named_parameters())
        before: Weights = {}
        for name in self.names:
            if name in self._before:
                before[name] = self._before[name]
                with torch.no_grad():
                    live[name].add_(learner[name] - self._before[name])
            else:
                live[name].data, learner[name].data = learner[name].data, live[name].data
                before[name] = learner[name].detach()
        after = {name: live[name].detach() for name in before}
        self.methods.adaptation.learned(before, after)
