"""Memory and disk of the join store alone, while events wait at its bounds.

    python -m benchmarks.join_memory [--events N] [--quick]

Half of the feedback never comes, the other half comes after a random delay, so that both bounds are always reached.
Flat figures after the first fifth are what counts; ``rss_bytes`` above the first point is to be held against the bound.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.results import Report, parser
from streams.base import Record
from streams.join import JoinStore, Waiting

BATCH = 64
RATE = 1000.0  # events a second of event time


class Feedback(NamedTuple):
    id: str
    label: int | None
    reward: float | None
    time: float
    inputs: bytes | None
    record: Record = Record("feedback", 0, 0, 1, 0.0, None, b"")


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--events", type=int)
    made.add_argument("--input-bytes", type=int, default=3072)
    made.add_argument("--memory-mib", type=int, default=64)
    made.add_argument("--disk-mib", type=int, default=256, help="0 keeps everything in memory")
    made.add_argument("--window", type=float, default=3600.0, help="seconds of event time")
    made.add_argument("--delay", type=int, default=60_000, help="longest delay of feedback, in events")
    made.add_argument("--points", type=int, default=20)
    arguments = made.parse_args()
    arguments.events = arguments.events or (50_000 if arguments.quick else 2_000_000)
    report = Report("join_memory", arguments)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        store = JoinStore(
            window=arguments.window,
            max_bytes=arguments.memory_mib << 20,
            max_disk_bytes=arguments.disk_mib << 20,
            directory=directory,
        )
        points = run(store, directory, arguments)
        store.close()
    bounds = {"memory_mib": arguments.memory_mib, "disk_mib": arguments.disk_mib, "input_bytes": arguments.input_bytes}
    report.write(bounds | {"points": points})


def run(store: JoinStore, directory: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    chance = random.Random(1)
    body = chance.randbytes(max(arguments.input_bytes - 8, 0))
    due: list[list[int]] = [[] for _ in range(arguments.delay // BATCH + 1)]
    points = [figures(store, directory, 0, 0.0)]
    spent = 0.0
    point = max(arguments.events // BATCH // arguments.points, 1)
    for batch in range(arguments.events // BATCH):
        first = batch * BATCH
        now = (first + BATCH) / RATE
        events = [
            Waiting(f"events-{i % 8}-{i}", body + i.to_bytes(8, "little"), i / RATE, None, i % 10, batch)
            for i in range(first, first + BATCH)
        ]
        ready = due[batch % len(due)]
        feedback = [Feedback(f"events-{i % 8}-{i}", i % 10, None, now, None) for i in ready]
        ready.clear()
        for i in range(first, first + BATCH, 2):
            due[(batch + chance.randrange(len(due))) % len(due)].append(i)
        start = time.perf_counter()
        store.answered(events, now)
        store.feedback(feedback, now)
        spent += time.perf_counter() - start
        if (batch + 1) % point == 0:
            points.append(figures(store, directory, first + BATCH, spent))
    return points


def figures(store: JoinStore, directory: Path, events: int, spent: float) -> dict[str, Any]:
    return {
        "events": events,
        "rss_bytes": psutil.Process().memory_info().rss,
        "memory_bytes": store.bytes,
        "disk_bytes": store.disk_bytes,
        "file_bytes": sum(path.stat().st_size for path in directory.iterdir()),
        "pending": store.pending,
        "early": store.early,
        "us_per_event": round(spent / events * 1e6, 2) if events else None,
        "counts": {kind: count for kind, count in store.counts.items() if count},
    }


if __name__ == "__main__":
    main()
