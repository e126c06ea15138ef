"""Running the real daemon, and the loop that somebody would write without it, over the same recorded stream."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.results import one_thread, pinned
from streams.codec import encode_events, encode_feedback
from streams.framing import MAGIC, frame_of

CHUNK = 8192
RATE = 1000.0
"""Events a second of event time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A recorded stream to make.

    Attributes:
        events: How many.
        shape: Of one row, as records hold it.
        dtype: Of its values.
        label_every: One event in so many gets a label.
        label_delay: Events by which it is late.
        classes: Of the model.
    """

    events: int
    shape: tuple[int, ...]
    dtype: str
    label_every: int = 10
    label_delay: int = 1000
    classes: int = 10

    def write(self, directory: Path) -> None:
        """Write ``data.rec`` and ``feedback.rec`` in the binary form."""
        rng = np.random.default_rng(0)
        with (directory / "data.rec").open("wb") as file:
            file.write(MAGIC)
            for start in range(0, self.events, CHUNK):
                count = min(CHUNK, self.events - start)
                size = (count, *self.shape)
                rows = rng.integers(0, 256, size).astype(self.dtype) if self.dtype == "uint8" else rng.normal(size=size)
                ids = [f"event-{start + i}" for i in range(count)]
                times = [(start + i) / RATE for i in range(count)]
                file.write(b"".join(map(frame_of, encode_events(ids, rows.astype(self.dtype), times))))
        with (directory / "feedback.rec").open("wb") as file:
            file.write(MAGIC)
            for event in range(0, self.events, self.label_every):
                label = int(rng.integers(self.classes))
                moment = (event + self.label_delay) / RATE
                file.write(frame_of(encode_feedback(f"event-{event}", label=label, time=moment)))


@dataclass(frozen=True, slots=True)
class Timing:
    """What a run took, from its first to its last event.

    Attributes:
        events: Answered.
        wall: Seconds.
        cpu: Seconds of all threads.
        rss: Memory at the end, in bytes.
        drain: Seconds of ``wall`` that went by after the last batch: flushing, the last checkpoint, leaving.
    """

    events: int
    wall: float
    cpu: float
    rss: int
    drain: float = 0.0

    @property
    def serving(self) -> float:
        """Seconds from the first batch to the last."""
        return self.wall - self.drain

    def figures(self) -> dict[str, Any]:
        return {
            "events": self.events,
            "seconds": round(self.wall, 3),
            "cpu_seconds": round(self.cpu, 3),
            "events_per_second": round(self.events / self.wall),
            "events_per_cpu_second": round(self.events / self.cpu),
            "cpu_microseconds_per_event": round(1e6 * self.cpu / self.events, 2),
            "events_per_second_without_drain": round(self.events / self.serving),
            "rss_mib": round(self.rss / 2**20, 1),
        }


def run_daemon(policy: Path, core: int) -> Timing:
    """Run ``adaptd run`` on one core until its streams end.

    The time runs from the moment when the first checkpoint is on the disk, which is when reading begins, until the
    daemon says that it has drained: every answer flushed and synced, and a last checkpoint written and read back.
    """
    command = [*pinned(core), sys.executable, "-m", "engine.cli", "run", str(policy)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread())
    usage = psutil.Process(process.pid)
    first: tuple[float, float] | None = None
    last: Timing | None = None
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        entry = json.loads(line) if line.startswith("{") else {}
        spent = sum(usage.cpu_times()[:2]) if entry.get("event") in ("checkpoint", "drained") else 0.0
        if entry.get("event") == "checkpoint" and first is None:
            first = _moment(entry), spent
        elif entry.get("event") == "drained":
            rss = usage.memory_info().rss
            last = Timing(entry["events"], _moment(entry), spent, rss, entry["seconds"])
    if process.wait() or first is None or last is None:
        raise RuntimeError(f"the daemon ended with {process.returncode}:\n{''.join(lines[-20:])}")
    return replace(last, wall=last.wall - first[0], cpu=last.cpu - first[1])


def _moment(entry: dict[str, Any]) -> float:
    return datetime.fromisoformat(entry["timestamp"]).timestamp()


def run_loop(arguments: Sequence[str], core: int) -> Timing:
    """Run ``benchmarks.plain_loop`` on one core; it times itself, likewise without its start."""
    command = [*pinned(core), sys.executable, "-m", "benchmarks.plain_loop", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread())
    figures = json.loads(done.stdout)
    return Timing(figures["events"], figures["wall"], figures["cpu"], figures["rss"])
