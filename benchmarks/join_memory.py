"""Memory and disk of the join store while events wait at its bounds: prints one JSON object per point.

Half of the feedback never comes, the other half comes after a random delay, so that both bounds are always reached.
Flat figures after the first fifth are what counts; ``rss_bytes`` above the first point is to be held against the bound.

Usage: python benchmarks/join_memory.py --events 2000000
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from streams.join import JoinStore, Waiting

BATCH = 64
RATE = 1000.0  # events a second of event time


class Feedback(NamedTuple):
    id: str
    label: int | None
    reward: float | None
    time: float
    inputs: bytes | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--input-bytes", type=int, default=3072)
    parser.add_argument("--memory-mib", type=int, default=64)
    parser.add_argument("--disk-mib", type=int, default=256, help="0 keeps everything in memory")
    parser.add_argument("--window", type=float, default=3600.0, help="seconds of event time")
    parser.add_argument("--delay", type=int, default=60_000, help="longest delay of feedback, in events")
    parser.add_argument("--points", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        store = JoinStore(
            window=arguments.window,
            max_bytes=arguments.memory_mib << 20,
            max_disk_bytes=arguments.disk_mib << 20,
            directory=directory,
        )
        run(store, directory, arguments)
        store.close()


def run(store: JoinStore, directory: Path, arguments: argparse.Namespace) -> None:
    chance = random.Random(1)
    body = chance.randbytes(max(arguments.input_bytes - 8, 0))
    due: list[list[int]] = [[] for _ in range(arguments.delay // BATCH + 1)]
    report(store, directory, 0, 0.0)
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
            report(store, directory, first + BATCH, spent)


def report(store: JoinStore, directory: Path, events: int, spent: float) -> None:
    figures = {
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
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
