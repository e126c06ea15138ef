"""How good the error estimated without labels is, and how often its alarms go for nothing.

    python -m benchmarks.label_free [--streams NAMES ...] [--methods NAMES ...] [--quick]

After each window of 64 rows that is looked at, one of ``every``, the estimate (`policies.label_free`) is compared with
the true error of the model's own answers, smoothed in the same way: once with ``ln K`` as the entropy of answers that
have not collapsed, once with the mean of the stream's windows so far, and for auto as it chooses between them.
``falls`` counts alarms of a fall of the estimated accuracy, ``false_falls`` those where the true accuracy had not
fallen as much; ``low_windows`` is the longest run of those looked at below the floor relative to what is estimated for
the source model on the same stream, whether auto was adapting or not, and ``lowest_percent`` the lowest accuracy
estimated, beside that floor. ``given_up`` counts how often auto went back to the source model. A stream is a name of
`benchmarks.tta_streams`, with changes after a colon. Labels are only counted with.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.results import BENCH, Report, parser
from benchmarks.tta_cells import batches, build, prepare
from benchmarks.tta_streams import Spec, load, spec_of
from policies.adaptation.auto import Auto
from policies.features import found_linear_head
from policies.label_free import ENTRIES, LabelFreeError, accuracy_floor, has_fallen, smoothed_error, windows_apart

STREAMS = (
    "correlated:per_class=30",
    "iid",
    "recurring20:visits=8",
    "gamma1:per_class=20",
    "clean",
    "single_iid:per_class=20",
    "elec",
    "weather",
    "sequence",
    "sequence_iid",
)
METHODS = ("none", "tent", "auto")
WINDOW = 64


class First:
    """What a model gives in the first forward since it was told to wait for one."""

    def __init__(self, model: nn.Module) -> None:
        self.logits: Tensor | None = None
        model.register_forward_hook(self._catch)

    def _catch(self, _model: nn.Module, _inputs: object, logits: Tensor) -> None:
        if self.logits is None:
            self.logits = logits.detach().clone()


@dataclass
class Series:
    """Windows: estimated and true errors, smoothed alike."""

    estimated: list[float] = field(default_factory=list)
    true: list[float] = field(default_factory=list)

    def add(self, estimated: float | None, true: float) -> None:
        """One window; the true error is smoothed here."""
        if estimated is not None:
            self.estimated.append(estimated)
            self.true.append(smoothed_error(self.true[-1] if self.true else None, true, true))

    def falls(self) -> tuple[int, int]:
        """Alarms of a fall, and those where the true accuracy had not fallen as much."""
        falls = false = first = 0
        for end in range(1, len(self.estimated) + 1):
            part = slice(max(first, end - ENTRIES), end)
            if has_fallen([1 - error for error in self.estimated[part]]):
                falls += 1
                false += not has_fallen([1 - error for error in self.true[part]])
                first = end
        return falls, false

    def figures(self, classes: int, source: float | None) -> dict[str, Any]:
        """In percent and points; ``source`` is the accuracy estimated for the source model on the same stream."""
        if not self.estimated:
            return {"absent": "the head is not what answers"}
        apart = [mine - true for mine, true in zip(self.estimated, self.true, strict=True)]
        longest, run, floor = 0, 0, accuracy_floor(classes, source)
        for error in self.estimated:
            run = run + 1 if 1 - error < floor else 0
            longest = max(longest, run)
        falls, false = self.falls()
        return {
            "estimated_percent": round(100 * fmean(self.estimated), 1),
            "off_by_points": round(100 * fmean(map(abs, apart)), 1),
            "bias_points": round(100 * fmean(apart), 1),
            "falls": falls,
            "false_falls": false,
            "low_windows": longest,
            "lowest_percent": round(100 * (1 - max(self.estimated)), 1),
            "floor_percent": round(100 * floor, 1),
        }


def finite(value: float) -> float | None:
    """None where it is not known."""
    return value if math.isfinite(value) else None


def measured(name: str, spec: Spec, bench: Path) -> dict[str, Any]:
    """One method on one stream: its true error, and a series for each way to estimate it."""
    stream = load(spec, bench)
    images = stream.inputs.dim() == 4
    source = stream.source.to(memory_format=torch.channels_last) if images else stream.source
    method = build(name, source, stream.classes, spec.seed, [0])
    head = found_linear_head(method.context.model, stream.classes)
    every = 1 if head is None else windows_apart(head, method.context.model)
    estimates = {"ln_k": LabelFreeError(method.context, WINDOW), "long_run": LabelFreeError(method.context, WINDOW)}
    series = {key: Series() for key in (*estimates, *(["auto"] if isinstance(method, Auto) else []))}
    first, wrong, rows, errors = First(method.context.model), 0, 0, []
    for batch, labels in batches(stream, spec, torch.channels_last):
        first.logits = None
        for estimate in estimates.values():
            estimate.begin()
        method.adapt(batch)
        assert first.logits is not None
        for estimate in estimates.values():
            estimate.add(first.logits)
        method.update()
        wrong += int((first.logits.argmax(1) != labels).sum())
        rows += len(labels)
        if rows < WINDOW:
            continue
        for key, estimate in estimates.items():
            estimate.look(correlated=key == "long_run", usual=True)
            if len(errors) % every == 0:
                series[key].add(estimate.error, wrong / rows)
        if isinstance(method, Auto) and len(errors) % every == 0:
            series["auto"].add(finite(method.gauges["estimated_error"]), wrong / rows)
        errors.append(wrong / rows)
        wrong = rows = 0
    row = {"windows": len(errors), "every": every, "error_percent": round(100 * fmean(errors), 1), "series": series}
    return row | ({"given_up": int(method.gauges["falls"])} if isinstance(method, Auto) else {})


def compared(spec: Spec, methods: tuple[str, ...], bench: Path) -> dict[str, Any]:
    """All methods on one stream."""
    classes, usual, found = load(spec, bench).classes, {}, {}
    for name in methods:
        row = measured(name, spec, bench)
        series: dict[str, Series] = row.pop("series")
        if name == methods[0]:
            usual = {key: 1 - fmean(one.estimated) for key, one in series.items() if one.estimated}
        levels = usual | {"auto": usual.get("long_run")}
        found[name] = row | {key: one.figures(classes, levels.get(key)) for key, one in series.items()}
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--streams", nargs="+", default=STREAMS)
    made.add_argument("--methods", nargs="+", default=METHODS, help="the first is what others are to be compared with")
    made.add_argument("--bench", type=Path, default=Path(os.environ.get("ADAPTD_BENCH", BENCH)))
    options = made.parse_args()
    report = Report("label_free", options)
    if not (options.bench / "vision_stream.py").exists():
        report.skip(f"{options.bench} with vision_stream.py does not exist on this machine")
        return
    prepare()
    found = {}
    for text in options.streams:
        spec = spec_of(text, 0, 2 if options.quick else None, None)
        found[text] = compared(spec, tuple(options.methods), options.bench)
    report.write({"streams": found})


if __name__ == "__main__":
    main()
