"""Error and speed of ``adaptd backtest`` with the preset ``rotta`` on a class-correlated stream of corrupted CIFAR-10.

    python -m benchmarks.backtest_rotta [--repeats N] [--core N] [--quick]

No label is ever learned from. ``relative_speed`` is the daemon's core (answering, the memory bank, the teacher and
student, the step) against batches of the bare source model that the backtest runs in between, on the same core with one
thread, in the same memory layout. The stream is generated once and kept in the folder for temporary files.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.model_overhead import copy_model
from benchmarks.results import BENCH, Report, one_thread, parser, pinned

TARGET_ERROR = 39.9
"""Percent, of the published code on this stream; one point to either side will do."""

TARGET_SPEED = 0.2

POLICY = """\
version: 1
preset: rotta
model:
  factory: "./resnet20.py:load"
  threads: 1
  device: cpu
  inputs: {shape: [3, 32, 32], dtype: uint8, scale: 0.00392156862745098, layout: hwc}
"""


def stream(per_class: int) -> Path:
    """The recorded stream; made where it is not kept yet."""
    path = Path(tempfile.gettempdir()) / "adaptd-benchmarks" / f"vision-stream-{per_class}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        made = path.with_name(f"new-{path.name}")
        script = [sys.executable, "vision_stream.py", str(made), "--per-class", str(per_class)]
        subprocess.run(script, cwd=BENCH, check=True, env=one_thread(), stdout=subprocess.DEVNULL)
        made.rename(path)
    return path


def backtest(directory: Path, data: Path, core: int) -> dict[str, Any]:
    """One backtest on one core, as a user runs it."""
    command = [*pinned(core), sys.executable, "-m", "engine.cli", "backtest", str(directory / "policy.yaml")]
    options = ["--data", str(data), "--feedback-share", "0", "--json"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True, env=one_thread())
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--repeats", type=int)
    made.add_argument("--core", type=int, default=1)
    options = made.parse_args()
    report = Report("backtest_rotta", options)
    if not (BENCH / "vision_stream.py").exists():
        report.skip(f"{BENCH} with vision_stream.py does not exist on this machine")
        return
    data = stream(10 if options.quick else 100)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        copy_model(directory)
        (directory / "policy.yaml").write_text(POLICY)
        runs = [backtest(directory, data, options.core) for _ in range(options.repeats or (1 if options.quick else 3))]
    report.write({"core": options.core} | summary(runs))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first run's answers, which are the same in every run, and the median of the speeds."""
    first = runs[0]
    error = 100 * (1 - first["accuracy"])
    speed = statistics.median(run["relative_speed"] for run in runs)
    return {
        "events": first["events"],
        "error_percent": round(error, 2),
        "source_error_percent": round(100 * (1 - first["source_accuracy"]), 2),
        "target_error_percent": TARGET_ERROR,
        "error_within_a_point": abs(error - TARGET_ERROR) <= 1.0,
        "same_answers_in_every_run": len({run["accuracy"] for run in runs}) == 1,
        "relative_speed": round(speed, 4),
        "relative_speed_of_runs": [round(run["relative_speed"], 4) for run in runs],
        "target_relative_speed": TARGET_SPEED,
        "reaches_target_speed": speed >= TARGET_SPEED,
        "events_per_second": round(statistics.median(run["events_per_second"] for run in runs), 1),
        "plain_events_per_second": round(statistics.median(run["plain_events_per_second"] for run in runs), 1),
        "updates": first["updates"],
        "skipped": first["skipped"],
        "accuracy_by_domain": {name: round(value, 4) for name, value in first["accuracy_by_domain"].items()},
    }


if __name__ == "__main__":
    main()
