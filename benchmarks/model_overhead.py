"""What the daemon leaves of a model's own throughput: ResNet-20 on 32x32 images, adaptation none.

    python -m benchmarks.model_overhead [--events N] [--repeats N] [--core N] [--quick]

The bare loop is ``model(x)`` in inference mode over the same images in the same batches of 64, already decoded, scaled
and in memory; the clock sees nothing else. The daemon reads uint8 images from a ``.rec`` file, answers, writes binary
answers, and keeps journal, waiting inputs, audit, checkpoints and metrics as `benchmarks.engine_overhead` describes.
Both have one thread for tensor operations and are pinned to the same core, so that reading, writing and checkpoints
take their time from the model. They take turns; a ratio is that of two neighbours, and the median of the ratios counts.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.daemon import Stream, Timing, run_daemon, run_loop
from benchmarks.results import BENCH, Report, parser

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
  feedback: {{file: feedback.rec}}
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


def daemon(directory: Path, turn: int, core: int) -> Timing:
    policy = directory / f"run-{turn}.yaml"
    policy.write_text(POLICY.format(name=f"run-{turn}"))
    return run_daemon(policy, core)


def bare(directory: Path, core: int) -> Timing:
    form = ["--shape", "3", "32", "32", "--dtype", "uint8", "--scale", "0.00392156862745098", "--hwc"]
    model = ["--data", str(directory / "data.rec"), "--factory", f"{directory / 'resnet20.py'}:load"]
    return run_loop([*model, *form, "--bare"], core)


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    copy_model(directory)
    Stream(events=options.events, shape=(32, 32, 3), dtype="uint8").write(directory)
    loops: list[Timing] = []
    daemons: list[Timing] = []
    for turn in range(options.repeats):
        loops.append(bare(directory, options.core))
        daemons.append(daemon(directory, turn, options.core))
    walls = [loop.wall / run.wall for loop, run in zip(loops, daemons, strict=True)]
    spent = [loop.cpu / run.cpu for loop, run in zip(loops, daemons, strict=True)]
    return {
        "share_of_bare_loop": round(statistics.median(walls), 4),
        "reaches_target": statistics.median(walls) >= TARGET,
        "shares_of_runs": [round(share, 4) for share in walls],
        "share_by_cpu_time": round(statistics.median(spent), 4),
        "bare_loop": sorted(loops, key=lambda run: run.wall)[len(loops) // 2].figures(),
        "daemon": sorted(daemons, key=lambda run: run.wall)[len(daemons) // 2].figures(),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--events", type=int)
    made.add_argument("--repeats", type=int)
    made.add_argument("--core", type=int, default=0)
    options = made.parse_args()
    options.events = options.events or (1280 if options.quick else 19_200)
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
