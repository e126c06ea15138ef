"""What the daemon leaves of a model's own throughput: ResNet-20 on 32x32 images, adaptation none.

    python -m benchmarks.model_overhead [--events N] [--repeats N] [--core N] [--quick]

The daemon reads uint8 images from a ``.rec`` file, answers in batches of 64, writes binary answers, and keeps journal,
waiting inputs, checkpoints and metrics. The bare loop is ``model(x)`` in inference mode over the same batches, decoded,
scaled and in memory. Both have one thread for tensor operations, memory allocated as `engine.allocator` sets it (which
the daemon does by itself), and one and the same core, so that reading, writing and checkpoints take their time from
the model. It is measured in two ways, from the first batch to the last:

- ``interleaved``: `benchmarks.interleaved`, the bare model beside the daemon batch for batch, by the processor's time.
  This decides, because whatever else runs on the machine slows both alike. ``with_labels`` is the same with a feedback
  stream: a tenth of the events gets a label, a tenth of these is audited by two more forwards each, 2 % on top.
- ``in_turn``: a process for each, one after another, by the clock; a ratio is that of two neighbours.
  ``default_allocator`` is the bare loop with memory allocated as the C library does by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.daemon import Stream, Timing, run_daemon, run_loop
from benchmarks.results import BENCH, Report, one_thread, parser, pinned

TARGET = 0.95

POLICY = """\
version: 1
state: ./{name}
model:
  factory: "./resnet20.py:load"
  threads: 1
  device: cpu
  inputs: {{shape: [3, 32, 32], dtype: uint8, scale: 0.00392156862745098, layout: hwc}}
streams:
  data: {{file: data.rec}}
  {feedback}
  predictions: {{file: {name}.rec, format: binary}}
  dead_letters: {{file: {name}-letters.jsonl}}
batching: {{max_size: 64}}
adaptation: {{method: none}}
learning: {{enabled: false}}
metrics: {{port: 0}}
"""


def copy_model(directory: Path) -> None:
    """Put the model and its weights beside the policy."""
    (directory / "data").mkdir()
    shutil.copy(BENCH / "resnet20.py", directory)
    shutil.copy(BENCH / "data" / "resnet20_cifar10.safetensors", directory / "data")


def policy(directory: Path, name: str, *, labels: bool = False) -> Path:
    """A policy with a state of its own."""
    feedback = "feedback: {file: feedback.rec}" if labels else ""
    path = directory / f"{name}.yaml"
    path.write_text(POLICY.format(name=name, feedback=feedback))
    return path


def interleaved(path: Path, core: int) -> dict[str, float]:
    command = [*pinned(core), sys.executable, "-m", "benchmarks.interleaved", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread())
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def share(figures: dict[str, float]) -> float:
    return round(figures["bare"] / figures["daemon"], 4)


def bare(directory: Path, core: int, *extra: str) -> Timing:
    form = ["--shape", "3", "32", "32", "--dtype", "uint8", "--scale", "0.00392156862745098", "--hwc"]
    model = ["--data", str(directory / "data.rec"), "--factory", f"{directory / 'resnet20.py'}:load"]
    return run_loop([*model, *form, "--bare", *extra], core)


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    copy_model(directory)
    Stream(events=options.events, shape=(32, 32, 3), dtype="uint8").write(directory)
    core = options.core
    beside: list[dict[str, float]] = []
    loops: list[Timing] = []
    daemons: list[Timing] = []
    for turn in range(options.repeats):
        beside.append(interleaved(policy(directory, f"beside-{turn}"), core))
        loops.append(bare(directory, core))
        daemons.append(run_daemon(policy(directory, f"turn-{turn}"), core))
    labelled = interleaved(policy(directory, "labels", labels=True), core)
    default = bare(directory, core, "--default-allocator")
    decides = statistics.median(map(share, beside))
    last = beside[-1]
    return {
        "share_of_bare_model": decides,
        "reaches_target": decides >= TARGET,
        "interleaved": {
            "shares_of_runs": [share(figures) for figures in beside],
            "events": last["events"],
            "bare_microseconds_per_event": round(1e6 * last["bare"] / last["events"], 1),
            "daemon_microseconds_per_event": round(1e6 * last["daemon"] / last["events"], 1),
            "share_with_labels": share(labelled),
        },
        "in_turn": in_turn(loops, daemons) | {"bare_loop_default_allocator": default.figures()},
    }


def in_turn(loops: list[Timing], daemons: list[Timing]) -> dict[str, Any]:
    """Ratios of neighbours, and the median run of each."""
    shares = [loop.wall / run.serving for loop, run in zip(loops, daemons, strict=True)]
    drained = [loop.wall / run.wall for loop, run in zip(loops, daemons, strict=True)]
    return {
        "share": round(statistics.median(shares), 4),
        "shares_of_runs": [round(share, 4) for share in shares],
        "share_with_start_to_drained": round(statistics.median(drained), 4),
        "bare_loop": sorted(loops, key=lambda run: run.wall)[len(loops) // 2].figures(),
        "daemon": sorted(daemons, key=lambda run: run.wall)[len(daemons) // 2].figures(),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--events", type=int)
    made.add_argument("--repeats", type=int)
    made.add_argument("--core", type=int, default=0)
    options = made.parse_args()
    options.events = options.events or (1280 if options.quick else 9600)
    options.repeats = options.repeats or (1 if options.quick else 5)
    report = Report("model_overhead", options)
    if not (BENCH / "resnet20.py").exists():
        report.skip(f"{BENCH} with resnet20.py does not exist on this machine")
        return
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), options)
    report.write({"target_share": TARGET, "core": options.core} | results)


if __name__ == "__main__":
    main()
