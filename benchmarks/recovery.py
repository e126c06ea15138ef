"""Time from the start of a daemon to its first answer, with many joins waiting in the checkpoint.

    python -m benchmarks.recovery [--events N] [--repeats N] [--quick]

A daemon answers events whose labels never come, and leaves them in its last checkpoint. It is then started again, with
one more event in its stream, and killed once that is answered, so often. ``first_answer_seconds`` runs from the start
of the process until the answer is in its file; ``restored_seconds`` until the state is restored; ``cpu_seconds`` is the
processor's time until the answer. ``nothing`` is the same with no join to restore: interpreter, libraries, model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.daemon import Stream
from benchmarks.results import Report, one_thread, parser
from streams.codec import encode_event
from streams.framing import frame_of

TARGET_SECONDS = 5.0
PATIENCE = 120.0

MODEL = """\
from torch import nn


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear({size}, 10))
"""

POLICY = """\
version: 1
state: ./state
model: {{factory: "./model.py:build", threads: 1, inputs: {{shape: [{size}], dtype: {dtype}}}}}
streams:
  data: {{file: data.rec, follow: true}}
  feedback: {{file: feedback.rec, follow: true}}
  predictions: {{file: answers.rec, format: binary}}
batching: {{max_size: 256}}
join: {{window: 30d, max_bytes: {memory}}}
adaptation: {{method: none}}
checkpoint: {{every: 1s}}
metrics: {{port: 0}}
"""

VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {"share": 0.0, "size": 64, "dtype": "float32", "memory": "256MB"},
    "in_memory": {"share": 1.0, "size": 64, "dtype": "float32", "memory": "256MB"},
    "on_disk": {"share": 1.0, "size": 64, "dtype": "float32", "memory": "8MB"},
    "images": {"share": 1.0, "size": 3072, "dtype": "uint8", "memory": "256MB"},
}
"""Bytes of the inputs and of the memory that joins may take; ``images`` are of 3 KB, so that some lie on the disk."""


class Log:
    """What a daemon logs, read on a thread of its own so that the daemon never waits for it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.entries: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.entries.append(json.loads(line) if line.startswith("{") else {"event": line})

    def first(self, event: str) -> dict[str, Any]:
        """The first entry of a kind; waits for it."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            for entry in list(self.entries):
                if entry["event"] == event:
                    return entry
            time.sleep(0.005)
        raise RuntimeError(f"no {event} was logged: {self.entries[-5:]}")


@contextmanager
def daemon(directory: Path) -> Iterator[Log]:
    """A daemon that is killed at the end of the block."""
    command = [sys.executable, "-m", "engine.cli", "run", str(directory / "policy.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread())
    try:
        yield Log(process)
    finally:
        process.kill()
        process.wait()


def pending(log: Log) -> tuple[int, int]:
    """Events answered and joins waiting, as the daemon tells them."""
    with urllib.request.urlopen(f"{log.first('listening')['address']}/status", timeout=10) as answer:
        status = json.load(answer)
    return status["events"], status["joins"]["pending"]


def fill(directory: Path, events: int) -> int:
    """Have events answered and a checkpoint made that covers them; joins that wait in it."""
    with daemon(directory) as log:
        while pending(log)[0] < events:
            time.sleep(0.2)
        waiting = pending(log)[1]
        log.process.terminate()
        log.process.wait(PATIENCE)
    return waiting


def restart(directory: Path, number: int, variant: dict[str, Any]) -> dict[str, float]:
    """Start the daemon on a stream with one more event."""
    row = np.zeros(variant["size"], variant["dtype"])
    with (directory / "data.rec").open("ab") as file:
        file.write(frame_of(encode_event(f"new-{number}", row, float(number + 1_000_000))))
    answers = directory / "answers.rec"
    size = answers.stat().st_size
    started = time.time()
    with daemon(directory) as log:
        deadline = time.monotonic() + PATIENCE
        while answers.stat().st_size <= size and time.monotonic() < deadline:
            time.sleep(0.005)
        answered = time.time()
        spent = psutil.Process(log.process.pid).cpu_times()
        restored = datetime.fromisoformat(log.first("restored")["timestamp"]).timestamp()
    return {"restored": restored - started, "first_answer": answered - started, "cpu": spent.user + spent.system}


def run(variant: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "model.py").write_text(MODEL.format(**variant))
        (directory / "policy.yaml").write_text(POLICY.format(**variant))
        events = int(options.events * variant["share"]) or 1
        Stream(events=events, shape=(variant["size"],), dtype=variant["dtype"], label_every=10**9).write(directory)
        (directory / "feedback.rec").write_bytes((directory / "feedback.rec").read_bytes()[:8])
        waiting = fill(directory, events)
        saved = max(path.stat().st_size for path in (directory / "state").rglob("*") if path.is_file())
        runs = [restart(directory, number, variant) for number in range(options.repeats)]
    return {
        "waiting_joins": waiting,
        "input_bytes": variant["size"] * np.dtype(variant["dtype"]).itemsize,
        "join_memory": variant["memory"],
        "largest_file_mib": round(saved / 2**20, 1),
        "restored_seconds": round(statistics.median(run["restored"] for run in runs), 2),
        "first_answer_seconds": round(statistics.median(run["first_answer"] for run in runs), 2),
        "cpu_seconds": round(statistics.median(run["cpu"] for run in runs), 2),
        "first_answer_seconds_of_runs": [round(run["first_answer"], 2) for run in runs],
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--events", type=int)
    made.add_argument("--repeats", type=int)
    made.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    options = made.parse_args()
    options.events = options.events or (5_000 if options.quick else 100_000)
    options.repeats = options.repeats or (1 if options.quick else 5)
    report = Report("recovery", options)
    results = {name: run(VARIANTS[name], options) for name in options.variants}
    for result in results.values():
        if "nothing" in results:
            of_nothing = results["nothing"]["cpu_seconds"]
            result["restore_share_of_cpu"] = round(1 - of_nothing / result["cpu_seconds"], 3)
        result["reaches_target"] = result["first_answer_seconds"] < TARGET_SECONDS
    report.write({"target_seconds": TARGET_SECONDS, "variants": results})


if __name__ == "__main__":
    main()
