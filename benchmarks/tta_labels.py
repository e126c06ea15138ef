"""What late labels are worth to ``adaptation: auto``: without any, with one in ten, and with all of them.

    python -m benchmarks.tta_labels [--streams NAMES ...] [--seeds N ...] [--quick]

Labels come some rows late and are told to the method, which chooses by them between ways to answer; no weights are
learned from them. Tables of prices and weather are taken with several seeds of their model, images with the first. A
stream is a name of `benchmarks.tta_streams`, with changes after a colon. Regret is the error minus the source model's.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import BENCH, Report, parser
from benchmarks.tta_cells import batches, build, prepare
from benchmarks.tta_streams import Spec, load, spec_of
from policies.interfaces import Batch

STREAMS = (
    "elec:per_class=400",
    "weather:per_class=400",
    "correlated:per_class=30",
    "iid:per_class=15",
    "recurring20:visits=10",
)
DELAYS = {"elec": 48, "weather": 30}
"""Rows until a label comes: a day of prices, a month of weather."""

DELAY = 64
SHARES = {"without labels": 0, "one label in ten": 10, "all labels": 1}


class Labels:
    """Labels under way: of one row in ``every``, chosen at random, ``delay`` rows late; 0 brings none."""

    def __init__(self, every: int, delay: int, seed: int) -> None:
        self._every, self._delay = every, delay
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = 0
        self._waiting: deque[tuple[int, str, int, str | None]] = deque()

    def after(self, batch: Batch, labels: Tensor) -> list[tuple[str, int, str | None]]:
        """What has come by the end of a batch: ids, labels and groups of rows."""
        if not self._every:
            return []
        drawn = torch.randint(self._every, (len(batch),), generator=self._generator) == 0
        for row in drawn.nonzero().flatten().tolist():
            self._waiting.append((self._rows + row, batch.ids[row], int(labels[row]), batch.groups[row]))
        self._rows += len(batch)
        come = []
        while self._waiting and self._waiting[0][0] + self._delay < self._rows:
            come.append(self._waiting.popleft()[1:])
        return come


def measured(spec: Spec, bench: Path, every: int) -> dict[str, Any]:
    """Auto on one stream with the labels of one row in ``every``."""
    stream, forwards = load(spec, bench), [0]
    images = stream.inputs.dim() == 4
    source = stream.source.to(memory_format=torch.channels_last) if images else stream.source
    method = build("auto", source, stream.classes, spec.seed, forwards)
    labels = Labels(every, DELAYS.get(spec.kind, DELAY), spec.seed)
    wrong = plain = rows = 0
    for batch, truth in batches(stream, spec, torch.channels_last):
        wrong += int((method.adapt(batch).argmax(1) != truth).sum())
        method.update()
        if come := labels.after(batch, truth):
            method.labelled(*zip(*come, strict=True))
        with torch.inference_mode():
            plain += int((source(batch.inputs).argmax(1) != truth).sum())
        rows += len(truth)
    watched = ("adapting", "correlated", "changes", "labels_adapting", "labels_adapting_won", "labels_vetoes")
    return {
        "rows": rows,
        "error_percent": round(100 * wrong / rows, 2),
        "source_error_percent": round(100 * plain / rows, 2),
        "regret": round(100 * (wrong - plain) / rows, 2),
        "forwards_per_event": round(forwards[0] / rows, 3),
        "gauges": {name: round(method.gauges[name], 3) for name in watched},
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--streams", nargs="+", default=STREAMS)
    made.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    made.add_argument("--bench", type=Path, default=Path(os.environ.get("ADAPTD_BENCH", BENCH)))
    options = made.parse_args()
    report = Report("tta_labels", options)
    if not (options.bench / "vision_stream.py").exists():
        report.skip(f"{options.bench} with vision_stream.py does not exist on this machine")
        return
    prepare()
    found: dict[str, Any] = {}
    for text in options.streams:
        specs = [spec_of(text, seed, 2 if options.quick else None, None) for seed in options.seeds]
        for spec in specs[: 1 if specs[0].kind == "vision" else None]:
            cells = {name: measured(spec, options.bench, every) for name, every in SHARES.items()}
            found[f"{text} seed={spec.seed}"] = cells
    worst = {name: max(cells[name]["regret"] for cells in found.values()) for name in SHARES}
    report.write({"streams": found, "worst_regret": worst})


if __name__ == "__main__":
    main()
