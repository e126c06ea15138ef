"""Memory of the daemon over millions of events while its waiting joins stay at their caps.

    python -m benchmarks.flat_memory [--events N] [--core N] [--quick]

The whole daemon on file streams in the binary form, with learning, replay, audit, releases, journal, checkpoints every
five seconds and ``/status``, which this benchmark asks for events and joins twice a second while it reads the resident
memory of the process. One event in fifty gets a label, so nearly every event waits until it is evicted: from memory to
disk, and from disk for good. ``mib_per_million_events`` is the slope of a straight line through the points of the last
four fifths of the run; ``spread_mib`` is what lies between the least and the most of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.daemon import Stream
from benchmarks.engine_overhead import MODEL
from benchmarks.results import Report, one_thread, parser, pinned

SECONDS_BETWEEN_POINTS = 0.5
WARM_SHARE = 0.2
SHOWN_POINTS = 40

POLICY = """\
version: 1
state: ./state
model: {factory: "./model.py:build", threads: 1, inputs: {shape: [64]}}
streams:
  data: {file: data.rec}
  feedback: {file: feedback.rec}
  predictions: {file: answers.rec, format: binary}
  dead_letters: {file: letters.jsonl}
batching: {max_size: 64}
join: {window: 30d, max_bytes: 32MB, max_disk_bytes: 64MB}
adaptation: {method: none}
safeguards: [{method: replay, capacity: 1000}]
interpolation: {method: linear}
gate: {method: flips}
checkpoint: {every: 5s}
metrics: {port: 0}
"""


def addresses(process: subprocess.Popen[str], found: list[str]) -> None:
    """Read the daemon's log to its end, so that it never waits for us; note where it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == "listening":
            found.append(entry["address"])


def points(process: subprocess.Popen[str], found: list[str]) -> Iterator[dict[str, int]]:
    """Events, resident memory and joins, for as long as the daemon runs."""
    usage = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(SECONDS_BETWEEN_POINTS)
        try:
            with urllib.request.urlopen(f"{found[0]}/status", timeout=10) as answer:
                status = json.load(answer)
            rss = usage.memory_info().rss
        except (OSError, IndexError, psutil.Error):  # it starts, or is gone
            continue
        joins = status["joins"]
        yield {"events": status["events"], "rss": rss, "pending": joins["pending"], "join_bytes": joins["bytes"]}


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    (directory / "model.py").write_text(MODEL)
    (directory / "policy.yaml").write_text(POLICY)
    Stream(events=options.events, shape=(64,), dtype="float32", label_every=50).write(directory)
    command = [*pinned(options.core), sys.executable, "-m", "engine.cli", "run", str(directory / "policy.yaml")]
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread())
    found: list[str] = []
    log = threading.Thread(target=addresses, args=(process, found))
    log.start()
    taken = list(points(process, found))
    log.join()
    if process.returncode:
        raise RuntimeError(f"the daemon ended with {process.returncode}")
    return summary(taken, options.events) | {"seconds": round(time.perf_counter() - started, 1)}


def summary(taken: list[dict[str, int]], events: int) -> dict[str, Any]:
    warm = [point for point in taken if point["events"] >= WARM_SHARE * events]
    count, rss = np.array([[point["events"], point["rss"]] for point in warm], dtype=float).T
    slope = np.polyfit(count / 1e6, rss / 2**20, 1)[0] if len(set(count)) > 1 else float("nan")
    every = max(1, len(taken) // SHOWN_POINTS)
    return {
        "events": events,
        "mib_per_million_events": round(float(slope), 2),
        "spread_mib": round((rss.max() - rss.min()) / 2**20, 1),
        "first_warm_mib": round(rss[0] / 2**20, 1),
        "last_mib": round(rss[-1] / 2**20, 1),
        "most_mib": round(max(point["rss"] for point in taken) / 2**20, 1),
        "points": [point | {"rss": round(point["rss"] / 2**20, 1)} for point in taken[::every]],
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--events", type=int)
    made.add_argument("--core", type=int, default=1)
    options = made.parse_args()
    options.events = options.events or (100_000 if options.quick else 2_000_000)
    report = Report("flat_memory", options)
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), options)
    report.write({"core": options.core} | results)


if __name__ == "__main__":
    main()
