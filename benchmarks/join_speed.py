"""Time in the join store while a million events come to wait: a batch, a label, and a checkpoint of them.

    python -m benchmarks.join_speed [--events N] [--input-bytes N] [--quick]

The longest batch is what stops serving: a table that is made anew as it grows, or a pass of the garbage collector.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from typing import Any

from benchmarks.join_memory import Feedback
from benchmarks.results import Report, parser
from streams.join import JoinStore, WaitingRows

RATE = 1000.0  # events a second of event time
DELAY = 20_000  # events after which labels come, in no order
CASES = {
    "one_label_in_100": {"batch": 512, "every": 100},
    "one_label_in_2": {"batch": 512, "every": 2},
    "all_labelled": {"batch": 512, "every": 1},
    "batches_of_one": {"batch": 1, "every": 0},
}


class Counted(io.RawIOBase):
    """Takes bytes and keeps none."""

    count = 0

    def write(self, data: Any, /) -> int:
        """Take bytes."""
        self.count += len(data)
        return len(data)


def batch_of(first: int, count: int, body: bytes) -> WaitingRows:
    numbers = range(first, first + count)
    inputs = [body + number.to_bytes(8, "little") for number in numbers]
    times = [number / RATE for number in numbers]
    return WaitingRows(
        [f"event-{number:07d}" for number in numbers],
        inputs,
        times,
        [None] * count,
        [1] * count,
        [0] * count,
        [0] * count,
    )


def run(events: int, size: int, batch: int, every: int) -> dict[str, Any]:
    """One store, filled once."""
    store = JoinStore(window=1e9, max_bytes=1 << 33)
    chance, body = random.Random(1), bytes(size - 8)
    batches, labels, spent = list[float](), 0, 0.0
    for first in range(0, events, batch):
        rows, now = batch_of(first, batch, body), first / RATE
        start = time.perf_counter()
        store.answered(rows, now)
        batches.append(time.perf_counter() - start)
        if every and first >= DELAY:
            chosen = chance.sample(range(first - DELAY, first - DELAY + batch), batch // every)
            feedback = [Feedback(f"event-{number:07d}", 1, None, now, None) for number in chosen]
            start = time.perf_counter()
            store.feedback(feedback, now)
            spent += time.perf_counter() - start
            labels += len(feedback)
    file, start = Counted(), time.perf_counter()
    snapshot = store.snapshot()
    copied, started = time.perf_counter() - start, time.thread_time()
    snapshot.write(file)  # type: ignore[arg-type]
    return {
        "us_per_event": round(1e6 * sum(batches) / events, 2),
        "batch_ms": round(1e3 * statistics.median(batches), 3),
        "longest_batch_ms": round(1e3 * max(batches), 1),
        "us_per_label": round(1e6 * spent / labels, 1) if labels else None,
        "snapshot_ms": round(1e3 * copied, 1),
        "checkpoint_cpu_seconds": round(time.thread_time() - started, 2),
        "checkpoint_mib": file.count >> 20,
        "waiting": store.pending,
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--events", type=int)
    made.add_argument("--input-bytes", type=int, default=256)
    options: argparse.Namespace = made.parse_args()
    events = options.events or (20_000 if options.quick else 1_000_000)
    report = Report("join_speed", options)
    cases = {
        name: run(events if case["batch"] > 1 else events // 5, options.input_bytes, **case)
        for name, case in CASES.items()
    }
    report.write({"events": events, "input_bytes": options.input_bytes} | cases)


if __name__ == "__main__":
    main()
