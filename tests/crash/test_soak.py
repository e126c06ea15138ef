"""Weeks in minutes: event time runs, drift comes and goes, feedback stops and returns, checkpoints and restarts go on.

Memory, descriptors, threads, the state directory and the series of metrics must not grow.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest
from prometheus_client import CollectorRegistry

from engine.checkpoint.store import CheckpointStore
from engine.core import Core
from engine.cutter import Cut
from engine.keeper import Keeper
from engine.metrics import Metrics
from engine.runner import Runner
from engine.writer import Writer
from streams.base import Positions, Record
from streams.codec import Event, Feedback
from streams.join import JoinStore
from streams.journal import Journal, Kind, runs_of
from tests.engine.cores import CLASSES, FEATURES, choice, make_core
from tests.engine.lives import Answered

EVENTS = int(float(os.environ.get("ADAPTD_SOAK_EVENTS", "3e5")))
SIZE = 64
SAVE_EVERY = 12
LIVES = 12
WARM_UP = 0.3


def make() -> Core:
    guards = [choice("safeguard", "replay", capacity=200), choice("safeguard", "collapse")]
    releases = [choice("interpolation", "linear"), choice("gate", "flips", budget=0.05)]
    adaptation = choice("adaptation", "bn", mode="ema", momentum=0.1)
    core = make_core(adaptation, *guards, *releases, batch_size=64, release_every=2000, lr=1e-3)
    core.joins = JoinStore(window=3600.0, max_bytes=1 << 20)
    return core


class Life:
    """One life of the engine, fed by hand."""

    def __init__(self, directory: Path) -> None:
        self.store = CheckpointStore(directory)
        self.store.lock()
        self.store.sweep()
        self.core = make()
        self.keeper = Keeper(self.store, Journal(directory), "0" * 64)
        restored = self.keeper.restore(self.core)
        positions: Positions = restored[0] if restored is not None else {}
        assert restored is None or restored[1] == []
        self.metrics = Metrics(CollectorRegistry())
        self.metrics.begin(self.core)
        self.runner = Runner(self.core, self.keeper, cast("Writer", Answered()), self.metrics, positions)
        if restored is None:
            self.keeper.write(self.runner.snapshot())

    def apply(self, kind: Kind, items: list[Event] | list[Feedback]) -> None:
        records = [item.record for item in items]
        self.runner.apply([Cut(kind, items, runs_of(records))])
        cast("Answered", self.runner.writer).rows.clear()

    def save(self) -> None:
        if self.keeper.sequence != self.keeper.saved_step:
            self.keeper.write(self.runner.snapshot())

    def end(self) -> None:
        self.save()
        self.core.joins.close()
        self.keeper.journal.close()
        self.store.close()


def batch(first: int, rng: np.random.Generator) -> list[Event]:
    """Events one second apart, drifting to and fro over a day."""
    shift = math.sin(first / 86_400 * 2 * math.pi)
    x = rng.normal(shift, 1.0, (SIZE, FEATURES)).astype(np.float32)
    return [
        Event(f"e{n}", row.tobytes(), float(n), None, Record("data", 0, n, n + 1, float(n), None, b""))
        for n, row in enumerate(x, first)
    ]


def labels(events: list[Event], at: int) -> list[Feedback]:
    """Labels of every fourth event; none at all for a third of each day."""
    if (events[0].time % 86_400) < 28_800:
        return []
    told: list[Feedback] = []
    for event in events[::4]:
        label = int(np.frombuffer(event.inputs, np.float32)[:CLASSES].argmax())
        number = at + len(told)
        record = Record("feedback", 0, number, number + 1, event.time, None, b"")
        told.append(Feedback(event.id, label, None, event.time + 30.0, None, record))
    return told


@dataclass
class Samples:
    """What is looked at after every checkpoint."""

    events: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    disk: list[int] = field(default_factory=list)
    series: set[frozenset[str]] = field(default_factory=set)

    def take(self, events: int, state: Path, metrics: Metrics) -> None:
        process = psutil.Process()
        self.events.append(events)
        self.memory.append(process.memory_info().rss)
        self.descriptors.append(process.num_fds())
        self.threads.append(threading.active_count())
        self.disk.append(sum(path.stat().st_size for path in state.rglob("*") if path.is_file()))
        lines = metrics.exposition().decode().splitlines()
        self.series.add(frozenset(line.rpartition(" ")[0] for line in lines if not line.startswith("#")))

    def slope(self) -> float:
        """Theil-Sen slope of the memory after the warm-up, in bytes for each 100,000 events."""
        begin = int(len(self.events) * WARM_UP)
        points = list(zip(self.events[begin:], self.memory[begin:], strict=True))
        points = points[:: max(1, len(points) // 200)]
        return 1e5 * statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2))


@pytest.mark.timeout(7200)
def test_weeks_of_events_leave_everything_as_large_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    life, samples, told = Life(tmp_path), Samples(), 0
    batches = EVENTS // SIZE
    for number in range(batches):
        events = batch(number * SIZE, rng)
        life.apply(Kind.DATA, events)
        if feedback := labels(events, told):
            told += len(feedback)
            life.apply(Kind.FEEDBACK, feedback)
        if number % SAVE_EVERY == SAVE_EVERY - 1:
            life.save()
            samples.take(number * SIZE, tmp_path, life.metrics)
        if number % (batches // LIVES) == batches // LIVES - 1:
            life.end()
            life = Life(tmp_path)
    assert life.core.counts["events"] == batches * SIZE
    assert life.core.counts["labels"] == told
    print(
        f"\n{batches * SIZE} events, {len(samples.events)} checkpoints, {samples.slope() / 1e6:.3f} MB per 1e5 events,"
        f" {max(samples.disk) / 1e6:.1f} MB of state"
    )
    assert samples.slope() < 1e6
    half = len(samples.events) // 2
    assert max(samples.descriptors[half:]) <= max(samples.descriptors[:half])
    assert max(samples.threads[half:]) <= max(samples.threads[:half])
    assert max(samples.disk[half:]) <= 1.5 * max(samples.disk[:half])
    late = set.union(*map(set, samples.series))
    assert len(late) <= len(min(samples.series, key=len)) + 40, "series grow with time"
    life.end()
