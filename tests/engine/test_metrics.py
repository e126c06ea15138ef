import math
import time
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import kernels
from engine.core import Core
from engine.daemon import Daemon
from engine.learner import Job
from engine.metrics import Metrics
from engine.retention import Margin
from policies.interfaces import Action, Decision, Outcome
from streams.base import Record
from streams.codec import Event, Events
from streams.join import Joined
from tests.engine.cores import events, feedback, make_core

FROZEN = {
    "adaptd_merged_batches": ("counter", ()),
    "adaptd_times_ahead": ("counter", ()),
    "adaptd_policy": ("info", ()),
    "adaptd_reload": ("counter", ("result",)),
    "adaptd_audit_accuracy_ratio": ("gauge", ("model",)),
    "adaptd_audit_rows": ("gauge", ()),
    "adaptd_background_jobs": ("gauge", ()),
    "adaptd_batch_size": ("histogram", ()),
    "adaptd_build": ("info", ()),
    "adaptd_bytes_in": ("counter", ()),
    "adaptd_candidate_negative_flip_ratio": ("gauge", ()),
    "adaptd_candidate_negative_flip_upper_ratio": ("gauge", ()),
    "adaptd_checkpoint_attempts": ("counter", ()),
    "adaptd_checkpoint_duration_seconds": ("histogram", ()),
    "adaptd_checkpoint_failures": ("counter", ()),
    "adaptd_checkpoint_fallbacks": ("counter", ()),
    "adaptd_checkpoint_size_bytes": ("gauge", ()),
    "adaptd_checkpoint_timestamp_seconds": ("gauge", ()),
    "adaptd_dead_letters": ("counter", ("reason",)),
    "adaptd_device_allocated_bytes": ("gauge", ()),
    "adaptd_device_reserved_bytes": ("gauge", ()),
    "adaptd_entropy_nats": ("summary", ()),
    "adaptd_events": ("counter", ()),
    "adaptd_foreign_labels": ("counter", ()),
    "adaptd_feedback": ("counter", ("result",)),
    "adaptd_feedback_timestamp_seconds": ("gauge", ()),
    "adaptd_join_bytes": ("gauge", ()),
    "adaptd_join_disk_bytes": ("gauge", ()),
    "adaptd_join_early": ("gauge", ()),
    "adaptd_join_pending": ("gauge", ()),
    "adaptd_kernel_fallback": ("gauge", ("op",)),
    "adaptd_label_delay_seconds": ("histogram", ()),
    "adaptd_labels": ("counter", ()),
    "adaptd_labels_without_inputs": ("counter", ()),
    "adaptd_lag_records": ("gauge", ("stream", "partition")),
    "adaptd_lag_seconds": ("gauge", ("stream", "partition")),
    "adaptd_retention_margin_records": ("gauge", ("stream", "partition")),
    "adaptd_retention_margin_seconds": ("gauge", ("stream", "partition")),
    "adaptd_latency_seconds": ("histogram", ()),
    "adaptd_learning_loss": ("gauge", ()),
    "adaptd_method_value": ("gauge", ("method", "name")),
    "adaptd_model_step": ("gauge", ()),
    "adaptd_negative_flip_impact_ratio": ("gauge", ()),
    "adaptd_negative_flip_ratio": ("gauge", ()),
    "adaptd_nonfinite_inputs": ("counter", ()),
    "adaptd_paused": ("gauge", ("stream",)),
    "adaptd_positive_flip_ratio": ("gauge", ()),
    "adaptd_progress_timestamp_seconds": ("gauge", ()),
    "adaptd_queue_depth": ("gauge", ("queue",)),
    "adaptd_records_in": ("counter", ("stream",)),
    "adaptd_records_out": ("counter", ("stream",)),
    "adaptd_release_alpha_ratio": ("gauge", ()),
    "adaptd_release_decisions": ("counter", ("action", "reason")),
    "adaptd_release_number": ("gauge", ()),
    "adaptd_frozen": ("gauge", ()),
    "adaptd_release_timestamp_seconds": ("gauge", ()),
    "adaptd_replayed_batches": ("counter", ()),
    "adaptd_rebuild_records": ("gauge", ()),
    "adaptd_replaying_batches": ("gauge", ()),
    "adaptd_resets": ("counter", ()),
    "adaptd_restarts": ("counter", ()),
    "adaptd_rollbacks": ("counter", ()),
    "adaptd_sample_weight_ess_ratio": ("gauge", ()),
    "adaptd_sample_weight_max": ("gauge", ()),
    "adaptd_source_agreement_ratio": ("gauge", ()),
    "adaptd_stage_duration_seconds": ("histogram", ("stage",)),
    "adaptd_stream_available": ("gauge", ("stream",)),
    "adaptd_transactions": ("counter", ("result",)),
    "adaptd_transaction_commit_duration_seconds": ("histogram", ()),
    "adaptd_unusable_labels": ("counter", ()),
    "adaptd_updates": ("counter", ("kind",)),
    "adaptd_updates_skipped": ("counter", ("kind", "reason")),
}
"""Dashboards and alerts of users stand on these. Counters are exposed with ``_total`` behind the name."""


class Value:
    """Reads samples of one exposition by name and label values, these in the order of the label names."""

    def __init__(self, metrics: Metrics) -> None:
        self.samples = {
            (sample.name.removeprefix("adaptd_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(metrics.exposition().decode())
            for sample in family.samples
        }

    def __getitem__(self, key: str | tuple[str, ...]) -> float:
        return self.samples[(key,) if isinstance(key, str) else key]

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self.samples


def event(timestamp: float, partition: int = 0) -> Event:
    return Event("e", b"", 0.0, None, Record("data", partition, 0, 1, timestamp, None, b""))


def daemon_of(
    core: Core, *, lag: dict[tuple[str, int], int] | None = None, waiting: int = 0, available: bool = True
) -> Daemon:
    reader = SimpleNamespace(bytes=100, paused=("data",), lag=lag or {}, waiting=lambda taken: waiting)
    reader.streams, reader.available = ("data", "feedback"), available
    reader.retention = SimpleNamespace(margins={p: Margin(9, 1.0) for p in lag or {}})
    keeper = SimpleNamespace(store=SimpleNamespace(epoch=3), fallbacks=1)
    found = SimpleNamespace(
        core=core,
        readers=[reader],
        cutter=SimpleNamespace(taken={"data": 7, "feedback": 2}, replaying=4),
        writer=SimpleNamespace(depth=5, available={"predictions": available, "letters": True}),
        runner=SimpleNamespace(keeper=keeper),
        handover=SimpleNamespace(rebuilding=(2, 900)),
    )
    return cast("Daemon", found)


def test_names_types_and_labels_stay_as_they_are() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    families = [vars(family) for family in registry._collector_to_names if "_labelnames" in vars(family)]
    found = {family["_name"]: family["_labelnames"] for family in families}
    types = {family.name: family.type for family in registry.collect()}
    assert {name: (types[name], labels) for name, labels in found.items()} == FROZEN


def test_several_engines_fit_into_one_process() -> None:
    first, second = Metrics(), Metrics()
    first.dead_letter("shape")
    assert Value(first)["dead_letters_total", "shape"] == 1
    assert Value(second)["dead_letters_total", "shape"] == 0


def test_the_process_itself_and_its_versions_are_exported() -> None:
    value = Value(Metrics())
    assert value["process_resident_memory_bytes"] > 1e6
    (build,) = [key for key in value.samples if key[0] == "build_info"]
    assert torch.__version__ in build


def test_figures_not_known_yet_are_no_number() -> None:
    value = Value(Metrics())
    assert math.isnan(value["negative_flip_ratio"])
    assert math.isnan(value["feedback_timestamp_seconds"])
    assert time.time() - value["checkpoint_timestamp_seconds"] < 60


def test_a_batch_gives_its_size_stages_and_the_latency_of_its_oldest_record() -> None:
    metrics = Metrics()
    metrics.batch(Events.of([event(time.time()), event(time.time() - 45)]), 0.02, 0.003)
    value = Value(metrics)
    assert value["batch_size_sum"] == 2
    assert value["stage_duration_seconds_sum", "predict"] == 0.02
    assert value["stage_duration_seconds_sum", "adapt"] == 0.003
    assert 44 < value["latency_seconds_sum"] < 45 + 60
    assert time.time() - value["progress_timestamp_seconds"] < 60


def test_records_without_a_timestamp_have_no_latency() -> None:
    metrics = Metrics()
    metrics.batch(Events.of([event(math.nan)]), 0.0, 0.0)
    assert Value(metrics)["latency_seconds_count"] == 0


def test_checkpoints_count_attempts_and_failures() -> None:
    metrics = Metrics()
    metrics.checkpoint(2048, 0.5)
    metrics.checkpoint_failed()
    value = Value(metrics)
    assert (value["checkpoint_attempts_total"], value["checkpoint_failures_total"]) == (2, 1)
    assert value["checkpoint_size_bytes"] == 2048
    assert value["checkpoint_duration_seconds_sum"] == 0.5


def test_stages_sinks_and_replayed_batches_are_counted() -> None:
    metrics = Metrics()
    metrics.stage("learn", 0.25)
    metrics.records_out("predictions", 64)
    metrics.records_out("predictions", 6)
    metrics.replayed()
    metrics.feedback(feedback(0, 1), 0.125)
    value = Value(metrics)
    assert value["stage_duration_seconds_sum", "learn"] == 0.25
    assert value["stage_duration_seconds_sum", "join"] == 0.125
    assert value["records_out_total", "predictions"] == 70
    assert value["replayed_batches_total"] == 1
    assert time.time() - value["feedback_timestamp_seconds"] < 60


def test_a_look_at_the_daemon_shows_streams_queues_and_state() -> None:
    metrics, core = Metrics(), make_core()
    metrics.look(daemon_of(core, waiting=9))
    metrics.look(daemon_of(core, waiting=9))
    value = Value(metrics)
    assert value["records_in_total", "data"] == 7
    assert value["bytes_in_total"] == 100
    assert [value["queue_depth", queue] for queue in ("input", "output", "deferred")] == [9, 5, 0]
    assert (value["paused", "data"], value["paused", "feedback"]) == (1, 0)
    assert (value["restarts_total"], value["checkpoint_fallbacks_total"]) == (2, 1)
    assert value["replaying_batches"] == 4
    assert value["rebuild_records"] == 900


def test_the_core_is_seen_in_counts_joins_quality_and_jobs() -> None:
    metrics, core = Metrics(), make_core(audit_share=0.5)
    metrics.begin(core)
    core.on_done = metrics.job
    core.answer(events(0, 64))
    core.follow()
    core.feedback(feedback(0, 60))
    core.finish()
    metrics.watch(core)
    metrics.look(daemon_of(core))
    value = Value(metrics)
    assert value["events_total"] == 64
    assert value["labels_total"] == value["feedback_total", "joined"] == 60
    assert value["join_pending"] == 4
    assert value["updates_total", "learning"] == value["model_step"] == core.step > 0
    assert value["audit_accuracy_ratio", "live"] == core.audit.accuracies()["live"]
    assert value["audit_rows"] == len(core.audit) > 0
    assert (value["entropy_nats_count"], value["entropy_nats_sum"]) == (1, core.entropy)
    assert value["label_delay_seconds_count"] == 60, "each label once, however many jobs took them"
    assert value["sample_weight_ess_ratio"] == 1
    assert not math.isnan(value["negative_flip_ratio"])


def test_entropy_is_noted_once_for_each_look_at_new_events() -> None:
    metrics, core = Metrics(), make_core()
    core.answer(events(0, 4))
    core.follow()
    metrics.watch(core)
    metrics.watch(core)
    assert Value(metrics)["entropy_nats_count"] == 1


def test_counters_start_at_zero_although_a_checkpoint_carries_counts() -> None:
    core = make_core()
    core.counts.update({"events": 1000, "skipped.learning.nonfinite_loss": 3})
    core.joins.counts["late"] = 40
    metrics = Metrics()
    metrics.begin(core)
    core.counts["events"] += 5
    core.joins.counts["late"] += 1
    metrics.look(daemon_of(core))
    value = Value(metrics)
    assert (value["events_total"], value["feedback_total", "late"]) == (5, 1)
    assert value["updates_skipped_total", "learning", "nonfinite_loss"] == 0


def test_a_counter_never_falls() -> None:
    metrics, core = Metrics(), make_core()
    for resets in (1, 0, 1):
        core.counts["resets"] = resets
        metrics.look(daemon_of(core))
        assert Value(metrics)["resets_total"] == 1


def test_skips_and_decisions_carry_their_reasons() -> None:
    metrics, core = Metrics(), make_core()
    core.counts.update({"skipped.adaptation.gradient_norm": 2, "decisions.hold.too_few": 3})
    metrics.look(daemon_of(core))
    value = Value(metrics)
    assert value["updates_skipped_total", "adaptation", "gradient_norm"] == 2
    assert value["release_decisions_total", "hold", "too_few"] == 3


def test_a_job_shows_weights_label_delays_and_the_candidate() -> None:
    metrics, core = Metrics(), make_core()
    metrics.begin(core)
    row = Joined(
        id="e", inputs=b"", time=100.0, group=None, predicted=0, label=1, reward=None, feedback_time=400.0, step=0
    )
    decision = Decision(Action.HOLD, "flips", figures={"nfr": 0.02, "nfr_upper": 0.03})
    core.release = 1
    metrics.job(Job([row], [], True, 0.0, Outcome(True), 0.25, 0.7, 0.5, 3.0, decision=decision))
    metrics.watch(core)
    value = Value(metrics)
    assert (value["sample_weight_max"], value["sample_weight_ess_ratio"], value["learning_loss"]) == (3.0, 0.5, 0.7)
    assert value["label_delay_seconds_sum"] == 300
    assert value["stage_duration_seconds_sum", "learn"] == 0.25
    assert (value["candidate_negative_flip_ratio"], value["candidate_negative_flip_upper_ratio"]) == (0.02, 0.03)
    assert time.time() - value["release_timestamp_seconds"] < 60


def test_methods_show_their_own_gauges() -> None:
    metrics, core = Metrics(), make_core()
    core.methods.adaptation.gauges |= {"rows": 12, "agreement": 0.9}
    metrics.look(daemon_of(core))
    value = Value(metrics)
    assert value["method_value", "none", "rows"] == 12
    assert value["source_agreement_ratio"] == 0.9


def test_lag_in_seconds_is_the_age_of_the_newest_record_applied_while_more_wait() -> None:
    metrics, core = Metrics(), make_core()
    metrics.batch(Events.of([event(time.time() - 100, partition) for partition in (0, 1)]), 0.0, 0.0)
    metrics.look(daemon_of(core, lag={("data", 0): 0, ("data", 1): 8, ("data", 2): 8}))
    value = Value(metrics)
    assert (value["lag_records", "0", "data"], value["lag_seconds", "0", "data"]) == (0, 0)
    assert value["lag_records", "1", "data"] == 8
    assert 99 < value["lag_seconds", "1", "data"] < 160
    assert math.isnan(value["lag_seconds", "2", "data"])


def test_while_a_stream_does_not_answer_that_is_exported_and_its_lag_is_not_known() -> None:
    metrics, core = Metrics(), make_core()
    for available in (True, False, True):
        metrics.look(daemon_of(core, lag={("data", 0): 0, ("data", 1): 8}, available=available))
        value = Value(metrics)
        streams = ("data", "feedback", "predictions", "letters")
        assert [value["stream_available", stream] for stream in streams] == [*[available] * 3, True]
        for partition in ("0", "1"):
            assert math.isnan(value["lag_records", partition, "data"]) is not available
        assert math.isnan(value["lag_seconds", "0", "data"]) is not available


def test_partitions_that_go_take_their_lag_with_them() -> None:
    metrics, core = Metrics(), make_core()
    metrics.look(daemon_of(core, lag={("data", 0): 5, ("data", 1): 5}))
    assert ("lag_records", "0", "data") in Value(metrics)
    metrics.revoked([("data", 0), ("other", 9)])
    assert ("lag_records", "0", "data") not in Value(metrics)
    assert ("retention_margin_records", "0", "data") not in Value(metrics)
    metrics.look(daemon_of(core))
    assert ("lag_seconds", "1", "data") not in Value(metrics)


def test_a_kernel_that_was_switched_off_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics()
    monkeypatch.setattr(kernels, "fallbacks", lambda: {"lerp_": "wrong"})
    metrics.look(daemon_of(make_core()))
    value = Value(metrics)
    assert (value["kernel_fallback", "lerp_"], value["kernel_fallback", "softmax_entropy"]) == (1, 0)
