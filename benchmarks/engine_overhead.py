"""Events a second through the whole daemon on one core, with a model that costs next to nothing.

    python -m benchmarks.engine_overhead [--events N] [--repeats N] [--core N] [--quick]

The daemon reads 64 float32 an event from ``.rec`` files in the binary form, answers in batches of 64, writes binary
answers to a ``.rec`` file and keeps everything on that it keeps for users: events wait for their labels (a tenth of
them gets one, a thousand events later; inputs wait as well where labels are learned from), labels are audited, the
journal is written, checkpoints are taken every two seconds, and ``/metrics`` is served. ``merged_by_time`` is what
files that end get by default; ``by_arrival`` is how live streams are cut; with ``learning``, the model also learns
from its labels, which is more than overhead. The loop beside it (``benchmarks.plain_loop``) reads, decodes, predicts,
encodes and writes the same stream with the same codecs, and does nothing else. All take turns on the same core with
one thread for tensor operations; figures are those of the median run.

The time of the daemon runs from the end of its start (the first checkpoint is on the disk) until it has drained: every
answer flushed and synced, and a last checkpoint written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.daemon import Stream, Timing, run_daemon, run_loop
from benchmarks.results import Report, parser

TARGET = 30_000

MODEL = """\
from torch import nn


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""

POLICY = """\
version: 1
state: ./{name}
model: {{factory: "./model.py:build", threads: 1, inputs: {{shape: [64]}}}}
streams:
  data: {{file: data.rec}}
  feedback: {{file: feedback.rec}}
  predictions: {{file: {name}.rec, format: binary}}
  dead_letters: {{file: {name}-letters.jsonl}}
batching: {{max_size: 64}}
adaptation: {{method: none}}
learning: {{enabled: {learning}}}
order: {order}
checkpoint: {{every: 2s}}
metrics: {{port: 0}}
"""

VARIANTS = {
    "merged_by_time": {"order": "time", "learning": "false"},
    "by_arrival": {"order": "arrival", "learning": "false"},
    "by_time_and_learning": {"order": "time", "learning": "true"},
}


def daemon(directory: Path, variant: str, turn: int, core: int) -> Timing:
    """One run of the daemon with a fresh state."""
    name = f"{variant}-{turn}"
    policy = directory / f"{name}.yaml"
    policy.write_text(POLICY.format(name=name, **VARIANTS[variant]))
    return run_daemon(policy, core)


def loop(directory: Path, core: int) -> Timing:
    files = ["--data", str(directory / "data.rec"), "--output", str(directory / "loop.rec")]
    return run_loop([*files, "--factory", f"{directory / 'model.py'}:build", "--shape", "64"], core)


def measure(directory: Path, options: argparse.Namespace) -> dict[str, list[Timing]]:
    """All variants and the plain loop in turn."""
    (directory / "model.py").write_text(MODEL)
    Stream(events=options.events, shape=(64,), dtype="float32").write(directory)
    timings: dict[str, list[Timing]] = {name: [] for name in ("plain_loop", *options.variants)}
    for turn in range(options.repeats):
        timings["plain_loop"].append(loop(directory, options.core))
        for variant in options.variants:
            timings[variant].append(daemon(directory, variant, turn, options.core))
    return timings


def summary(timings: dict[str, list[Timing]]) -> dict[str, Any]:
    """The median run of each, and how the daemon compares with the loop run beside it."""
    out: dict[str, Any] = {}
    for name, runs in timings.items():
        chosen = sorted(runs, key=lambda run: run.wall)[len(runs) // 2]
        out[name] = chosen.figures() | {"events_per_second_of_runs": [round(run.events / run.wall) for run in runs]}
        if name != "plain_loop":
            pairs = list(zip(timings["plain_loop"], runs, strict=True))
            out[name]["share_of_plain_loop"] = round(statistics.median(a.wall / b.wall for a, b in pairs), 3)
            out[name]["share_by_cpu_time"] = round(statistics.median(a.cpu / b.cpu for a, b in pairs), 3)
            out[name]["reaches_target"] = out[name]["events_per_second"] >= TARGET
    return out


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--events", type=int)
    made.add_argument("--repeats", type=int)
    made.add_argument("--core", type=int, default=0)
    made.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    options = made.parse_args()
    options.events = options.events or (20_000 if options.quick else 300_000)
    options.repeats = options.repeats or (1 if options.quick else 3)
    report = Report("engine_overhead", options)
    with tempfile.TemporaryDirectory() as name:
        timings = measure(Path(name), options)
    report.write({"target_events_per_second": TARGET, "core": options.core, "variants": summary(timings)})


if __name__ == "__main__":
    main()
