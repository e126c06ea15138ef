"""One method on one stream, beside the plain forward of the same rows.

    python -m benchmarks.tta_cells TASK

``TASK`` is the JSON of a `Task`; its measurement comes as JSON on standard output. Run so, in a process of its own, the
peak of memory is that of this method.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from benchmarks.rotta import LAYOUTS
from benchmarks.tta_streams import Spec, Stream, load
from engine.allocator import keep_freed_memory
from policies.interfaces import Adaptation, Batch, Context, PolicyError
from policies.registry import find
from policies.stepping import SafeStepper

ROUND = 8
"""Batches whose times make one ratio. The median over rounds is what a busy machine moves least; the first half of them
is left out, in which some methods prepare what they need once."""

PATIENCE_S = 15.0
"""After so long a measurement of some batches ends early."""


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        stream: Its name in the result.
        method: A name of the registry, with parameters after a colon, or ``preset=NAME``.
        spec: Of the stream.
        bench: Folder of data.
        layout: Of images in memory, for the plain forward and as they are given to the method.
        batches: How many to measure at most, and no more after 15 seconds; None for the whole stream.
        deadline: On the monotonic clock; what has not ended by then is given up. None for never.
    """

    stream: str
    method: str
    spec: Spec
    bench: str
    layout: str
    batches: int | None = None
    deadline: float | None = None

    def text(self) -> str:
        """The task as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Task:
        """The task that `text` gave."""
        given = json.loads(text)
        return Task(**given | {"spec": Spec(**given["spec"])})


def build(text: str, source: nn.Module, classes: int, seed: int, forwards: list[int]) -> Adaptation:
    """The method that ``name``, ``name:key=value,...`` or ``preset=NAME`` stands for, on a live copy of ``source``.

    Every row that goes through the model, or through a copy that the method makes of it, is added to ``forwards[0]``.
    """
    name, _, given = text.partition(":")
    params: dict[str, Any] = {}
    if name.startswith("preset="):
        preset = files("policies.presets").joinpath(f"{name.removeprefix('preset=')}.yaml").read_text()
        params = dict(yaml.safe_load(preset)["adaptation"])
        name = params.pop("method")
    for item in filter(None, given.split(",")):
        key, _, value = item.partition("=")
        params[key] = yaml.safe_load(value)

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        forwards[0] += len(inputs[0])

    live, frozen = copy.deepcopy(source), copy.deepcopy(source).requires_grad_(False)
    live.register_forward_pre_hook(count)
    frozen.register_forward_pre_hook(count)
    context = Context(model=live, source=frozen, num_classes=classes, seed=seed, stepper=SafeStepper())
    method: type[Adaptation] = find("adaptation", name)
    return method(method.Params.model_validate(params), context)


def batches(stream: Stream, spec: Spec, layout: torch.memory_format) -> Iterator[tuple[Batch, Tensor]]:
    """Batches and their labels, a batch a second, through all visits."""
    size, second = spec.batch_size, 0
    for _ in range(spec.visits):
        for start in range(0, len(stream.labels), size):
            inputs = stream.inputs[start : start + size]
            if inputs.dim() == 4:
                inputs = (inputs.float() / 255).contiguous(memory_format=layout)
            rows = range(start, start + len(inputs))
            groups = tuple(f"d{stream.domains[row]}" if spec.grouped else None for row in rows)
            times = torch.full((len(inputs),), float(second), dtype=torch.float64)
            ids = tuple(f"{second}-{row}" for row in rows)
            batch = Batch(ids=ids, inputs=inputs, times=times, groups=groups, now=float(second))
            yield batch, stream.labels[start : start + size]
            second += 1


class Tally:
    """Wrong answers and seconds of the processor, batch by batch."""

    def __init__(self) -> None:
        self.wrong: list[int] = []
        self.rows: list[int] = []
        self.seconds: list[float] = []

    def add(self, logits: Tensor, labels: Tensor, started: float) -> None:
        """Count one batch that took from ``started`` till now."""
        self.seconds.append(time.thread_time() - started)
        self.wrong.append(int((logits.argmax(1) != labels).sum()))
        self.rows.append(len(labels))

    def error(self, visit: int | None = None, visits: int = 1) -> float:
        """Percent of rows answered wrong, in all or in one visit."""
        length = len(self.rows) // visits
        part = slice(None) if visit is None else slice(visit * length, (visit + 1) * length)
        return round(100 * sum(self.wrong[part]) / sum(self.rows[part]), 2)


def measure(task: Task) -> dict[str, Any]:
    """Run a task; ``skipped`` or ``refused`` in the result says why there is no figure."""
    stream, layout = load(task.spec, Path(task.bench)), LAYOUTS[task.layout]
    source = stream.source.to(memory_format=layout) if stream.inputs.dim() == 4 else stream.source
    forwards = [0]
    try:
        method = build(task.method, source, stream.classes, task.spec.seed, forwards)
    except PolicyError as error:
        return {"refused": str(error)}
    plain, adapted, steps, patience = Tally(), Tally(), 0, time.monotonic() + PATIENCE_S
    for number, (batch, labels) in enumerate(batches(stream, task.spec, layout)):
        if task.batches is not None and (number == task.batches or (number > 2 and time.monotonic() > patience)):
            break
        if task.deadline is not None and time.monotonic() > task.deadline:
            return {"skipped": "the time allowed was up"}
        for turn in (0, 1):
            start = time.thread_time()
            if (number + turn) % 2:
                with torch.inference_mode():
                    plain.add(source(batch.inputs), labels, start)
            else:
                logits = method.adapt(batch)
                outcome = method.update()
                adapted.add(logits, labels, start)
                steps += outcome is not None and outcome.applied
    return figures(task.spec, plain, adapted) | {
        "forwards_per_event": round(forwards[0] / sum(adapted.rows), 3),
        "stepped": round(steps / len(adapted.rows), 3),
        "gauges": {name: round(value, 4) for name, value in method.gauges.items() if math.isfinite(value)},
    }


def figures(spec: Spec, plain: Tally, adapted: Tally) -> dict[str, Any]:
    """Error and speed of a whole run."""
    rounds = [
        sum(plain.seconds[at : at + ROUND]) / sum(adapted.seconds[at : at + ROUND])
        for at in range(0, len(plain.seconds), ROUND)
    ]
    found: dict[str, Any] = {
        "images": sum(adapted.rows),
        "error_percent": adapted.error(),
        "source_error_percent": plain.error(),
        "share_of_plain_speed": round(statistics.median(rounds[len(rounds) // 2 :]), 3),
        "plain_ms_per_batch": round(1e3 * statistics.median(plain.seconds), 2),
    }
    if spec.visits > 1:
        found["first_visit_percent"] = adapted.error(0, spec.visits)
        found["last_visit_percent"] = adapted.error(spec.visits - 1, spec.visits)
    return found


def prepare() -> None:
    """One thread, and the allocator as the daemon has it."""
    torch.set_num_threads(1)
    keep_freed_memory()


def peak_mib() -> float | None:
    """The most memory that this process held; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return round(int(lines[0].split()[1]) / 1024, 1) if lines else None


def alone(task: Task) -> dict[str, Any]:
    """Measure in this process, which does nothing else: with memory beyond what the plain forward needs."""
    stream, layout = load(task.spec, Path(task.bench)), LAYOUTS[task.layout]
    with torch.inference_mode():
        for number, (batch, _) in enumerate(batches(stream, task.spec, layout)):
            if number == 3:
                break
            stream.source(batch.inputs)
    before = peak_mib()
    found = measure(task)
    after = peak_mib()
    if before is not None and after is not None:
        found["peak_mib"] = after
        found["peak_mib_over_plain"] = round(after - before, 1)
    return found


def main() -> None:
    prepare()
    json.dump(alone(Task.read(sys.argv[1])), sys.stdout)


if __name__ == "__main__":
    main()
