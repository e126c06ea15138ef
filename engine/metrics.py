"""What is exported to Prometheus, and how it gets there; `engine.metric_families` names it.

Three ways lead here. Threads that do something say so at once, a batch at a time (`Metrics.batch`, `Metrics.stage`);
the thread that owns the model lets `Metrics.watch` look at the core between two batches; everything that can be read
off the daemon is read when somebody asks (`Metrics.look`). Counters count what this process did: those that a
checkpoint carries over start at 0 all the same, as a counter must after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import generate_latest

import kernels
from engine.metric_families import Families
from policies.interfaces import StepKind
from streams.base import Partition
from streams.codec import Events, Feedback, Reason
from streams.columns import Records
from streams.join import KINDS
from streams.seams import CLOCK, Clock

if TYPE_CHECKING:
    from engine.core import Core
    from engine.daemon import Daemon
    from engine.learner import Job

STAGES = ("predict", "adapt", "join", "learn", "send", "checkpoint")
RELOADS = ("applied", "rejected", "unchanged")
TRANSACTIONS = ("committed", "given_up")
QUEUES = ("input", "output", "deferred")


class Metrics(Families):
    """The families with the calls that keep them up to date.

    Calls are safe from any thread; `look` and `revoked` belong to the event loop.

    Args:
        registry: Where to register; a new one unless given, so that several engines fit into one process.
        clock: Tells the wall-clock time that ages and delays are reported by; nothing else of the engine looks at it.
    """

    def __init__(self, registry: CollectorRegistry | None = None, clock: Clock = CLOCK) -> None:
        super().__init__(registry, clock)
        self._stages = {stage: self.stage_duration.labels(stage) for stage in STAGES}
        # Series that exist from the start: an increase from nothing to 1 is none to Prometheus.
        for kind in StepKind:
            self.updates.labels(kind)
        for reason in Reason:
            self.dead_letters.labels(reason)
        for result in RELOADS:
            self.reloads.labels(result)
        for result in TRANSACTIONS:
            self.transactions.labels(result)
        self._levels: dict[Counter, float] = {}
        self._newest: dict[Partition, float] = {}
        self._lagging: set[Partition] = set()
        self._near: set[Partition] = set()
        self._events = 0
        self._release: int | None = None
        self._counts: Mapping[str, int] = {}
        self._joins: Mapping[str, int] = {}
        self._ahead = 0

    # -- what threads say ---------------------------------------------------------------------------------------

    def stage(self, name: str, seconds: float) -> None:
        """Note the time of one stage of a batch; ``name`` is one of `STAGES`."""
        self.stage_duration.labels(name).observe(seconds)

    def batch(self, events: Events, predict: float, adapt: float) -> None:
        """Note a batch of data that was answered in ``predict`` seconds and then adapted to in ``adapt`` seconds."""
        now = self.clock.time()
        self.batch_size.observe(len(events))
        self._stages["predict"].observe(predict)
        self._stages["adapt"].observe(adapt)
        oldest = min(events.records.timestamps)
        if oldest == oldest:  # NaN where the stream has no timestamps
            self.latency.observe(max(0.0, now - adapt - oldest))
        self._applied(events.records, now)

    def feedback(self, items: Sequence[Feedback], seconds: float) -> None:
        """Note a batch of feedback that was joined in ``seconds``."""
        now = self.clock.time()
        self._stages["join"].observe(seconds)
        self.feedback_received.set(now)
        self._applied(Records.of([item.record for item in items]), now)

    def _applied(self, records: Records, now: float) -> None:
        self.progress.set(now)
        self._newest.update({at[:2]: records.timestamps[at.stop - 1] for at in records.stretches})

    def records_out(self, stream: str, count: int) -> None:
        """Note records handed to a sink."""
        self.records_sent.labels(stream).inc(count)

    def transaction_committed(self, seconds: float) -> None:
        """Note a transaction whose commit took ``seconds``."""
        self.transactions.labels("committed").inc()
        self.transaction_commit.observe(seconds)

    def transaction_given_up(self) -> None:
        """Note a transaction that failed, or whose commit was not heard of."""
        self.transactions.labels("given_up").inc()

    def dead_letter(self, reason: str) -> None:
        """Note a record that could not be decoded."""
        self.dead_letters.labels(reason).inc()

    def replayed(self) -> None:
        """Note a batch repeated from the journal."""
        self.replayed_batches.inc()

    def checkpoint(self, size: int, seconds: float) -> None:
        """Note a durable checkpoint of ``size`` bytes that took ``seconds``."""
        self.checkpoint_attempts.inc()
        self.checkpoint_duration.observe(seconds)
        self._stages["checkpoint"].observe(seconds)
        self.checkpoint_size.set(size)
        self.checkpointed.set(self.clock.time())

    def checkpoint_failed(self) -> None:
        """Note a checkpoint that could not be written."""
        self.checkpoint_attempts.inc()
        self.checkpoint_failures.inc()

    def reloaded(self, digest: str) -> None:
        """Note another policy: series of methods that it may not have go, or their last values would stay for ever."""
        self.policy.info({"digest": digest})
        self.method_value.clear()
        self.agreement.set(math.nan)

    def revoked(self, partitions: Sequence[Partition]) -> None:
        """Drop the series of partitions that somebody else reads now: their last values would stay for ever."""
        for partition in partitions:
            self._newest.pop(partition, None)
            self._forget(partition)

    def _forget(self, partition: Partition) -> None:
        if partition in self._lagging:
            self._lagging.discard(partition)
            self.lag_records.remove(*map(str, partition))
            self.lag_seconds.remove(*map(str, partition))
        if partition in self._near:
            self._near.discard(partition)
            self.retention_records.remove(*map(str, partition))
            self.retention_seconds.remove(*map(str, partition))

    # -- what the core shows ------------------------------------------------------------------------------------

    def begin(self, core: Core) -> None:
        """Take what a restored core has counted already as the zero of this process."""
        self._counts, self._joins = dict(core.counts), dict(core.joins.counts)
        self._ahead = core.clock.ahead
        self._events, self._release = core.counts["events"], core.release

    def watch(self, core: Core) -> None:
        """Look at the core between two batches, on the thread that owns it.

        What happened more than once since the last look is seen in its last state: one entropy, one release.
        """
        if core.counts["events"] != self._events:
            self._events = core.counts["events"]
            self.entropy.observe(core.entropy)
        if core.release != self._release:
            if self._release is not None:
                self.released.set(self.clock.time())
            self._release = core.release

    def job(self, job: Job) -> None:
        """Note what a job took, learned and decided, beside serving or between two batches."""
        self._stages["learn"].observe(job.seconds)
        for row in (*job.learned, *job.audited):
            self.label_delay.observe(max(0.0, row.feedback_time - row.time))
        if job.outcome is not None:
            self.weight_max.set(job.max_weight)
            self.ess_ratio.set(job.ess_ratio)
            self.loss.set(job.losses)
        if job.decision is not None:
            figures = job.decision.figures
            self.candidate_negative_flips.set(figures.get("nfr", math.nan))
            self.candidate_negative_flips_upper.set(figures.get("nfr_upper", math.nan))

    # -- what is read off the daemon ----------------------------------------------------------------------------

    def look(self, daemon: Daemon) -> None:
        """Bring everything up to date that can be read off the daemon; for each scrape, on the event loop."""
        self._look_at_streams(daemon)
        self._look_at_counts(daemon.core)
        self._look_at_model(daemon.core)
        keeper = daemon.runner.keeper
        self._raise(self.restarts, keeper.store.epoch - 1)
        self._raise(self.checkpoint_fallbacks, keeper.fallbacks)
        self.replaying.set(daemon.cutter.replaying)
        self.rebuilding.set(daemon.handover.rebuilding[1])
        fallen = kernels.fallbacks()
        for op in kernels.OPS:
            self.kernel_fallback.labels(op).set(op in fallen)
        device = daemon.core.host.device
        if device.type == "cuda":
            self.device_allocated.set(torch.cuda.memory_allocated(device))
            self.device_reserved.set(torch.cuda.memory_reserved(device))

    def _look_at_streams(self, daemon: Daemon) -> None:
        taken = daemon.cutter.taken
        for stream, count in taken.items():
            self._raise(self.records_in.labels(stream), count)
        self._raise(self.bytes_in, sum(reader.bytes for reader in daemon.readers))
        waiting = [reader.waiting(taken) for reader in daemon.readers]
        depths = (sum(waiting), daemon.writer.depth, daemon.core.deferred)
        for queue, depth in zip(QUEUES, depths, strict=True):
            self.queue_depth.labels(queue).set(depth)
        paused = {stream for reader in daemon.readers for stream in reader.paused}
        for stream in taken:
            self.paused.labels(stream).set(stream in paused)
        self._look_at_availability(daemon)
        now, seen = self.clock.time(), set[Partition]()
        for reader, behind in zip(daemon.readers, waiting, strict=True):
            for partition, lag in dict(reader.lag).items():
                seen.add(partition)
                self._lag(partition, lag if reader.available else math.nan, now if lag or behind else None)
            for partition, margin in dict(reader.retention.margins).items():
                seen.add(partition)
                self._near.add(partition)
                self.retention_records.labels(*map(str, partition)).set(margin.records)
                self.retention_seconds.labels(*map(str, partition)).set(margin.seconds)
        for partition in (self._lagging | self._near) - seen:
            self._forget(partition)

    def _look_at_availability(self, daemon: Daemon) -> None:
        read = {stream: reader.available for reader in daemon.readers for stream in reader.streams}
        for stream, available in (read | daemon.writer.available).items():
            self.stream_available.labels(stream).set(available)

    def _lag(self, partition: Partition, lag: float, now: float | None) -> None:
        """Set the lag of one partition, NaN where it is not known; ``now`` is None where nothing waits."""
        self._lagging.add(partition)
        labels = tuple(map(str, partition))
        self.lag_records.labels(*labels).set(lag)
        if now is None:
            self.lag_seconds.labels(*labels).set(0.0 * lag)  # a NaN stays one
            return
        newest = self._newest.get(partition, math.nan)
        # The order of the arguments keeps a NaN.
        self.lag_seconds.labels(*labels).set(max(now - newest, 0.0))

    def _look_at_counts(self, core: Core) -> None:
        """Raise counters to what core and join store have counted since `begin`."""
        single = {
            "events": self.events,
            "labels": self.labels,
            "unusable_labels": self.unusable_labels,
            "foreign_labels": self.foreign_labels,
            "labels_without_inputs": self.labels_without_inputs,
            "nonfinite_inputs": self.nonfinite_inputs,
            "merged_batches": self.merged_batches,
            "resets": self.resets,
            "rollbacks": self.rollbacks,
        }
        several: dict[str, Callable[..., Counter]] = {
            "updates": self.updates.labels,
            "skipped": self.updates_skipped.labels,
            "decisions": self.decisions.labels,
        }
        for name, count in dict(core.counts).items():
            head, *rest = name.split(".")
            counter = single.get(name) or (several[head](*rest) if head in several else None)
            if counter is not None:
                self._raise(counter, count - self._counts.get(name, 0))
        self._raise(self.times_ahead, core.clock.ahead - self._ahead)
        for kind in KINDS:
            count = core.joins.counts[kind] - self._joins.get(kind, 0)
            self._raise(self.feedback_results.labels(kind), count)

    def _raise(self, counter: Counter, level: float) -> None:
        """Count up to ``level``; a level that has fallen waits until it is passed again."""
        before = self._levels.get(counter, 0)
        if level > before:
            self._levels[counter] = level
            counter.inc(level - before)

    def _look_at_model(self, core: Core) -> None:
        self.step.set(core.step)
        self.release.set(core.release)
        self.frozen.set(core.freeze.on)
        if core.release:
            self.alpha.set(core.alpha)
        self.learning.set(core.job is not None)
        joins = core.joins
        self.join_pending.set(joins.pending)
        self.join_early.set(joins.early)
        self.join_bytes.set(joins.bytes)
        self.join_disk_bytes.set(joins.disk_bytes)
        for _, method in core.methods:
            # dict() copies in one step, so a method may add a gauge meanwhile.
            for name, value in dict(method.gauges).items():
                self.method_value.labels(method.name, name).set(value)
                if name == "agreement":
                    self.agreement.set(value)
        self._look_at_audit(core)

    def _look_at_audit(self, core: Core) -> None:
        self.audit_rows.set(len(core.audit))
        accuracies = core.audit.accuracies()
        for model, accuracy in accuracies.items():
            self.accuracy.labels(model).set(accuracy)
        if accuracies:
            negative, positive = core.audit.flips()
            self.negative_flips.set(negative)
            self.positive_flips.set(positive)
            errors = 1 - accuracies["live"]
            self.negative_flip_impact.set(negative / errors if errors > 0 else 0.0)

    def exposition(self) -> bytes:
        """Everything in the text format of Prometheus."""
        return generate_latest(self.registry)
