"""The families of metrics: names, labels, help texts, buckets.

Names follow the conventions of Prometheus: prefix ``adaptd_``, base units, counters end in ``_total``, moments are
``_timestamp_seconds``. Labels take their values from small fixed sets (streams, partitions, stages, reasons, methods),
never from records. Figures that are not known yet are NaN, which no alert takes for a value.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, Summary

from engine import __version__
from streams.seams import CLOCK, Clock

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Buckets of durations."""

LATENCY_SECONDS = (*SECONDS, 30.0, 60.0, 300.0, 1800.0, 7200.0)
"""Buckets of the end-to-end latency, which covers the time that records waited in their stream."""

DELAY_SECONDS = (1, 10, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86400, 2 * 86400, 4 * 86400, 7 * 86400)
"""Buckets of the time from an event to its label: 1 s to 7 d."""

ROWS = tuple(2**power for power in range(11))
"""Buckets of batch sizes: 1 to 1024."""


class Families:
    """Every family of metrics, each an attribute.

    Args:
        registry: Where to register; a new one unless given, so that several engines fit into one process.
    """

    def __init__(self, registry: CollectorRegistry | None = None, clock: Clock = CLOCK) -> None:
        self.clock = clock
        self.registry = CollectorRegistry() if registry is None else registry
        self._declare_streams()
        self._declare_lag()
        self._declare_transactions()
        self._declare_joins()
        self._declare_updates()
        self._declare_quality()
        self._declare_releases()
        self._declare_checkpoints()
        self._declare_process()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"adaptd_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str, unknown: bool = False) -> Gauge:
        gauge = Gauge(f"adaptd_{name}", text, labels, registry=self.registry)
        if unknown:
            gauge.set(math.nan)
        return gauge

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"adaptd_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _declare_streams(self) -> None:
        self.records_in = self._counter("records_in", "Records taken into batches, undecodable ones included", "stream")
        self.bytes_in = self._counter("bytes_in", "Bytes of the values of records read")
        self.records_sent = self._counter("records_out", "Records handed to a sink", "stream")
        self.dead_letters = self._counter("dead_letters", "Records that could not be decoded", "reason")
        self.stream_available = self._gauge(
            "stream_available", "0 while a stream is not open yet, or is known to give or take no records", "stream"
        )
        self.queue_depth = self._gauge(
            "queue_depth", "What waits: input in records, output and deferred in batches", "queue"
        )
        self.paused = self._gauge("paused", "1 while a stream is paused because too much of it waits", "stream")
        self.batch_size = self._histogram("batch_size", "Events in a batch", ROWS)
        self.stage_duration = self._histogram(
            "stage_duration_seconds", "Time of one stage of a batch", SECONDS, "stage"
        )
        self.latency = self._histogram(
            "latency_seconds", "From the oldest record of a batch being appended to its answers", LATENCY_SECONDS
        )
        self.progress = self._gauge("progress_timestamp_seconds", "When a batch was last applied; at first, the start")
        self.progress.set(self.clock.time())

    def _declare_lag(self) -> None:
        self.lag_records = self._gauge(
            "lag_records",
            "Records (bytes, for files) behind the end of a partition; NaN while its stream does not answer",
            "stream",
            "partition",
        )
        self.lag_seconds = self._gauge(
            "lag_seconds",
            "Age of the newest record applied while more wait; 0 when none do, NaN where that is not known",
            "stream",
            "partition",
        )
        self.retention_records = self._gauge(
            "retention_margin_records",
            "Offsets between the first that a partition still has and where a restart would read on",
            "stream",
            "partition",
        )
        self.retention_seconds = self._gauge(
            "retention_margin_seconds",
            "Time until retention gets to where a restart would read on, going on as in the last hour",
            "stream",
            "partition",
        )

    def _declare_transactions(self) -> None:
        self.transactions = self._counter(
            "transactions", "Transactions: committed, or given up to be made again without what is committed", "result"
        )
        self.transaction_commit = self._histogram(
            "transaction_commit_duration_seconds",
            "Time of a commit, its offsets included; messages are flushed before",
            SECONDS,
        )

    def _declare_joins(self) -> None:
        self.events = self._counter("events", "Events answered")
        self.feedback_results = self._counter("feedback", "What became of feedback and of waiting inputs", "result")
        self.feedback_received = self._gauge("feedback_timestamp_seconds", "When feedback last came in", unknown=True)
        self.times_ahead = self._counter(
            "times_ahead", "Events and feedback dated ahead of the watermark by more than join.window"
        )
        self.labels = self._counter("labels", "Usable labels joined with their event")
        self.unusable_labels = self._counter(
            "unusable_labels", "Joined feedback that names no class of the model, rewards that confirm none included"
        )
        self.foreign_labels = self._counter(
            "foreign_labels", "Of these, labels: outside the classes that the model has"
        )
        self.labels_without_inputs = self._counter(
            "labels_without_inputs", "Usable labels that nothing could be done with, as no inputs were kept (join.keep)"
        )
        self.label_delay = self._histogram("label_delay_seconds", "From an event to its label", DELAY_SECONDS)
        self.join_pending = self._gauge("join_pending", "Events that wait for feedback")
        self.join_early = self._gauge("join_early", "Feedback that waits for its event")
        self.join_bytes = self._gauge("join_bytes", "Memory that waiting events and feedback take")
        self.join_disk_bytes = self._gauge("join_disk_bytes", "Disk that waiting events take")

    def _declare_updates(self) -> None:
        self.updates = self._counter("updates", "Updates applied to the live weights", "kind")
        self.updates_skipped = self._counter("updates_skipped", "Updates that left the weights alone", "kind", "reason")
        self.merged_batches = self._counter(
            "merged_batches", "Batches without an adaptation step of their own: they waited for a job and shared one"
        )
        self.resets = self._counter("resets", "Returns of the live weights to the source model")
        self.frozen = self._gauge("frozen", "1 while the release answers as it is, after too many rollbacks")
        self.rollbacks = self._counter("rollbacks", "Returns of the live weights to the release")
        self.nonfinite_inputs = self._counter("nonfinite_inputs", "Rows whose inputs held NaN or infinity")
        self.step = self._gauge("model_step", "Updates applied to the live weights since the source model")
        self.learning = self._gauge("background_jobs", "Background jobs under way: learning, auditing, releasing")
        self.weight_max = self._gauge("sample_weight_max", "Largest weight in the last learning step", unknown=True)
        self.ess_ratio = self._gauge(
            "sample_weight_ess_ratio", "Effective sample size of the last learning step, by its rows", unknown=True
        )
        self.loss = self._gauge("learning_loss", "Mean loss of the last learning step, unweighted", unknown=True)
        self.method_value = self._gauge(
            "method_value", "Numbers that methods want watched; NaN where one is not known", "method", "name"
        )

    def _declare_quality(self) -> None:
        self.entropy = Summary("adaptd_entropy_nats", "Mean entropy of the answers of a batch", registry=self.registry)
        self.agreement = self._gauge(
            "source_agreement_ratio",
            "Answers that the source model shares, where a safeguard measures it",
            unknown=True,
        )
        self.accuracy = self._gauge("audit_accuracy_ratio", "Accuracy on the audit window", "model")
        self.audit_rows = self._gauge("audit_rows", "Rows in the audit window")
        self.negative_flips = self._gauge(
            "negative_flip_ratio", "Audited rows that the release has right and the live answer wrong", unknown=True
        )
        self.positive_flips = self._gauge(
            "positive_flip_ratio", "Audited rows that the release has wrong and the live answer right", unknown=True
        )
        self.negative_flip_impact = self._gauge(
            "negative_flip_impact_ratio", "Share of negative flips among the errors of the live answers", unknown=True
        )

    def _declare_releases(self) -> None:
        self.decisions = self._counter("release_decisions", "Decisions of the gate", "action", "reason")
        self.release = self._gauge("release_number", "Number of the current release; 0 is the source model")
        self.released = self._gauge("release_timestamp_seconds", "When this process last made a release", unknown=True)
        self.alpha = self._gauge("release_alpha_ratio", "Share of the old weights in the current release", unknown=True)
        self.candidate_negative_flips = self._gauge(
            "candidate_negative_flip_ratio", "Negative flips of the candidate last judged", unknown=True
        )
        self.candidate_negative_flips_upper = self._gauge(
            "candidate_negative_flip_upper_ratio", "Upper confidence bound of these flips", unknown=True
        )

    def _declare_checkpoints(self) -> None:
        self.checkpoint_attempts = self._counter("checkpoint_attempts", "Checkpoints begun to be written")
        self.checkpoint_failures = self._counter("checkpoint_failures", "Checkpoints that could not be written")
        self.checkpoint_fallbacks = self._counter("checkpoint_fallbacks", "Checkpoints found bad and passed over")
        self.checkpoint_duration = self._histogram(
            "checkpoint_duration_seconds", "From the copy of the state to a durable checkpoint", (*SECONDS, 30.0, 60.0)
        )
        self.checkpoint_size = self._gauge("checkpoint_size_bytes", "Size of the newest checkpoint", unknown=True)
        self.checkpointed = self._gauge(
            "checkpoint_timestamp_seconds", "When a checkpoint last became durable; at first, the start"
        )
        self.checkpointed.set(self.clock.time())
        self.restarts = self._counter("restarts", "Times that the state was taken over from another process")
        self.replayed_batches = self._counter("replayed_batches", "Batches repeated from the journal")
        self.rebuilding = self._gauge("rebuild_records", "Records still to read before waiting joins are complete")
        self.replaying = self._gauge("replaying_batches", "Batches still to repeat from the journal")

    def _declare_process(self) -> None:
        self.kernel_fallback = self._gauge("kernel_fallback", "1 where a fast kernel was switched off as wrong", "op")
        self.device_allocated = self._gauge("device_allocated_bytes", "Memory of the device that tensors take")
        self.device_reserved = self._gauge("device_reserved_bytes", "Memory of the device that the allocator holds")
        self.policy = Info("adaptd_policy", "Digest of the policy in force", registry=self.registry)
        self.reloads = self._counter("reload", "Reloads of the policy: applied, rejected, unchanged", "result")
        self.build = Info("adaptd_build", "Versions of what runs", registry=self.registry)
        self.build.info(
            {
                "version": __version__,
                "torch": torch.__version__,
                "cuda": torch.version.cuda or "none",
                "python": platform.python_version(),
            }
        )
        ProcessCollector(registry=self.registry)
