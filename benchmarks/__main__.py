"""Runs benchmarks one after another, each in a process of its own.

python -m benchmarks [NAMES ...] [--quick]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

NAMES = (
    "kernel_speed",
    "engine_overhead",
    "model_overhead",
    "backtest_rotta",
    "rotta",
    "tta",
    "tta_labels",
    "label_free",
    "join_memory",
    "flat_memory",
    "kafka",
    "recovery",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="short runs that show that they work; write no results")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    failed = []
    for name in options.names or NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if options.quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
