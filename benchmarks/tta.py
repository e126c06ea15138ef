"""Error, speed and memory of adaptation methods on many streams, beside the source model on the same rows.

    python -m benchmarks.tta [METHODS ...] [--streams NAMES ...] [--per-class N] [--minutes M] [--resume] [--quick]

A method is a name of the registry, with parameters after a colon (``bn:alpha=1``), or ``preset=NAME``; all by default.
A stream is a name of `benchmarks.tta_streams`, with changes after a colon (``correlated:severity=3,gamma=0.5``). Data
comes from the benchmark's folder (``--bench``, or ``ADAPTD_BENCH``, or ``shared/bench`` beside the project). Labels are
only counted with.

First every method is measured alone, in a process of its own, for speed and memory: plain and adapted answers alternate
batch by batch, on one thread, so that a shared machine slows both alike. Then errors, in as many processes as
``--workers`` says, each on one thread. The dearer a method the fewer images of each class it gets, a half, a quarter,
...; ``images`` tells how many, and the source model's error is that on the same images. What does not fit into
``--minutes`` is named under ``skipped``; ``--resume`` makes up for it, and measures nothing twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.results import BENCH, DIRECTORY, Report, one_thread, parser
from benchmarks.rotta import LAYOUTS
from benchmarks.tta_cells import Task, measure, prepare
from benchmarks.tta_streams import STREAMS, Spec, recorded, spec_of
from benchmarks.tta_table import markdown, summary
from policies.registry import known

FIRST = ("none", "auto", "lame", "class_bn", "bn:alpha=1", "bn:alpha=0.1", "tent", "eata", "sar", "roid", "rotta")
"""Measured first, so that a run cut short has them."""

AS_PUBLISHED = ("roid:prior_weight=2",)
"""With parameters that come nearest to published code where that departs from its paper."""

SPEED_STREAMS = {"auto": ("correlated", "iid", "clean_iid"), "drm": ("sequence_heads",)}
"""Where a method's speed is measured: on the correlated stream, if not told otherwise."""

SPEED_BATCHES = 72
WHOLE = ("none", "auto")
"""What always gets all images."""

PASSES_KEPT = 1.3
PASSES_KEPT_CORRELATED = 8.0
"""Plain passes a row above which a method gets fewer images; the latter of the first methods on the correlated stream,
where there are figures of published code to compare with."""

Results = dict[str, Any]


def all_methods() -> list[str]:
    """Every registered method, the most wanted first."""
    rest = [name for name in sorted(known("adaptation")) if name not in FIRST and name != "bn"]
    return [*FIRST, *AS_PUBLISHED, *rest]


def divisor(stream: str, method: str, share: float) -> int:
    """By how much fewer images a method gets that answers at this share of the plain speed: a power of two."""
    if method in WHOLE or share <= 0:
        return 1
    compared = stream == "correlated" and method in (*FIRST, *AS_PUBLISHED)
    kept = PASSES_KEPT_CORRELATED if compared else PASSES_KEPT
    return 1 << max(0, math.ceil(math.log2(1 / (share * kept))))


class Matrix:
    """The table being filled; after every cell it is kept in a file beside the result, until that is written.

    Args:
        options: As parsed.
        specs: Of the streams, by name.
        methods: In order.
    """

    def __init__(self, options: argparse.Namespace, specs: dict[str, Spec], methods: list[str]) -> None:
        self._options = options
        self._specs, self._methods = specs, methods
        self._deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
        self.results: Results = {
            "specs": {name: asdict(spec) for name, spec in specs.items()},
            "speed": {},
            "cells": {},
        }
        self._path: Path = options.output or DIRECTORY / "tta.json"
        self._partial = self._path.with_suffix(".partial")
        self._kept = self._earlier()

    def _earlier(self) -> Results:
        """What a run before this one measured."""
        found = [path for path in (self._partial, self._path) if path.exists()]
        if not self._options.resume or not found:
            return {}
        kept: Results = json.loads(found[0].read_text())["results"]
        return kept

    def _task(self, stream: str, method: str, spec: Spec) -> Task:
        options = self._options
        return Task(stream, method, spec, str(options.bench.resolve()), options.layout, deadline=self._deadline)

    def speeds(self) -> None:
        """Every method alone, one after another."""
        for method in self._methods:
            for stream in SPEED_STREAMS.get(method.partition(":")[0], ("correlated",)):
                if stream not in self._specs:
                    continue
                spec = self._specs[stream]
                found = self._before("speed", stream, method, spec)
                if found is None and self._options.no_speed:
                    continue
                if found is None:
                    task = replace(
                        self._task(stream, method, spec), batches=5 if self._options.quick else SPEED_BATCHES
                    )
                    found = run_alone(task) | {"spec": asdict(spec)}
                self._take("speed", stream, method, found)

    def errors(self) -> None:
        """Every stream by every method, on all workers; the dear ones last."""
        todo = []
        for method in self._methods:
            share = self.results["speed"].get("correlated", {}).get(method, {}).get("share_of_plain_speed", 1.0)
            for stream, spec in self._specs.items():
                fewer = divisor(stream, method, share)
                smaller = spec.smaller(fewer)
                found = self._before("cells", stream, method, smaller)
                if found is not None:
                    self._take("cells", stream, method, found)
                else:
                    todo.append((fewer, self._task(stream, method, smaller)))
        todo.sort(key=lambda item: item[0])
        for task, found in in_parallel([task for _, task in todo], self._options.workers):
            self._take("cells", task.stream, task.method, found | {"spec": asdict(task.spec)})

    def _before(self, part: str, stream: str, method: str, spec: Spec) -> Results | None:
        """What was measured before of the very same."""
        found: Results | None = self._kept.get(part, {}).get(stream, {}).get(method)
        return found if found and "skipped" not in found and found.get("spec") == asdict(spec) else None

    def _take(self, part: str, stream: str, method: str, found: Results) -> None:
        """Put a measurement into the table."""
        self.results[part].setdefault(stream, {})[method] = found
        if self._options.output or not self._options.quick:
            self._partial.write_text(json.dumps({"results": self.results}))
        figure = found.get("error_percent", found.get("skipped", found.get("refused")))
        sys.stderr.write(f"{part} {stream} {method}: {figure}\n")

    def done(self) -> Results:
        """The whole, with the worst regret of each method, and what there was no time for."""
        skipped = [
            f"{part} {stream} {method}"
            for part in ("speed", "cells")
            for stream, row in self.results[part].items()
            for method, found in row.items()
            if "skipped" in found
        ]
        ordered = {
            stream: {method: row[method] for method in self._methods if method in row}
            for stream in self._specs
            if (row := self.results["cells"].get(stream))
        }
        self._partial.unlink(missing_ok=True)
        whole = self.results | {"cells": ordered, "skipped": skipped}
        return whole | {"summary": summary(whole, self._methods)}


def run_alone(task: Task) -> Results:
    """Measure in a new process."""
    if task.deadline is not None and time.monotonic() > task.deadline:
        return {"skipped": "the time allowed was up"}
    command = [sys.executable, "-m", "benchmarks.tta_cells", task.text()]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread())
    found: Results = json.loads(done.stdout)
    return found


def in_parallel(tasks: list[Task], workers: int) -> Iterator[tuple[Task, Results]]:
    """Measure tasks in as many processes, each on one thread; in the order in which they end."""
    os.environ |= one_thread()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare) as pool:
        waiting = {pool.submit(measure, task): task for task in tasks}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def prepared(specs: dict[str, Spec], bench: Path, workers: int) -> None:
    """Have every stream of images in its file before anything is timed."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(recorded, spec, bench) for spec in specs.values() if spec.kind == "vision"]:
            future.result()


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    made = parser(__doc__)
    made.add_argument("methods", nargs="*", metavar="METHOD", help="every registered one by default")
    made.add_argument("--streams", nargs="+", metavar="STREAM", default=list(STREAMS), help=f"of {', '.join(STREAMS)}")
    made.add_argument("--bench", type=Path, default=Path(os.environ.get("ADAPTD_BENCH", BENCH)), help="folder of data")
    made.add_argument("--per-class", type=int, help="images of each class in each domain")
    made.add_argument("--batch-size", type=int, help="of all streams but those of single rows")
    made.add_argument("--seed", type=int, default=0, help="of streams and methods")
    made.add_argument("--layout", choices=sorted(LAYOUTS), default="contiguous")
    made.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes that measure errors")
    made.add_argument("--minutes", type=float, help="begin no measurement after so long")
    made.add_argument("--no-speed", action="store_true", help="errors alone")
    made.add_argument("--resume", action="store_true", help="keep what the last result has of the same measurements")
    made.add_argument("--json", type=Path, dest="output", help="write the result here, and a .md beside it")
    return made.parse_args(arguments)


def main() -> None:
    options = options_of()
    report = Report("tta", options)
    if not (options.bench / "vision_stream.py").exists():
        report.skip(f"{options.bench} with vision_stream.py does not exist on this machine; name it with --bench")
        return
    per_class = options.per_class or (2 if options.quick else None)
    try:
        specs = {text: spec_of(text, options.seed, per_class, options.batch_size) for text in options.streams}
    except ValueError as error:
        sys.exit(str(error))
    prepared(specs, options.bench, options.workers)
    matrix = Matrix(options, specs, options.methods or all_methods())
    matrix.speeds()
    matrix.errors()
    results = matrix.done()
    path = report.write(results)
    if path is not None:
        path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
