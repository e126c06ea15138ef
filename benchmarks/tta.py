"""Error and speed of adaptation methods on streams of corrupted images, beside the plain forward pass.

    python -m benchmarks.tta [METHODS ...] [--stream correlated iid] [--per-class N] [--bench FOLDER] [--quick]

A method is a name of the registry, with parameters after a colon: ``bn:alpha=1`` or ``lame:affinity=knn,neighbours=3``.
The streams come from ``vision_stream.py`` in the benchmark's folder of data (``--bench``, or ``ADAPTD_BENCH``, or
``shared/bench`` beside the project) and are kept in the folder for temporary files. Labels are only counted with.

Plain and adapted answers alternate batch by batch, in one thread and one memory layout, so that a shared machine slows
both alike. Figures, by stream and method: the error in percent, that of the source model, the speed as a share of the
plain pass and what it could be if nothing but the passes over rows cost, and the share of batches stepped on.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from benchmarks.results import BENCH, Report, one_thread, parser
from benchmarks.rotta import LAYOUTS, batches, load_model
from engine.allocator import keep_freed_memory
from policies.interfaces import Adaptation, Context
from policies.registry import find
from policies.stepping import SafeStepper

STREAMS: dict[str, list[str]] = {"correlated": [], "iid": ["--iid"]}
"""What ``vision_stream.py`` is called with."""

PASSES: dict[str, float] = {
    "none": 1,
    "bn": 1,
    "class_bn": 1,
    "lame": 1,
    "t3a": 1,
    "adanpc": 1,
    "tent": 2,
    "eta": 2,
    "eata": 2,
    "rdumb": 2,
    "delta": 2,
    "deyo": 2.5,
    "sar": 4,
    "roid": 3,
    "cmf": 3,
    "mezo": 3,
    "rotta": 4,
    "note": 3,
    "sotta": 5,
    "petta": 8,
    "tribe": 6,
}
"""Passes over a batch, a backward to the normalisation layers counted as one; of chosen rows half, of a bank as many as
its interval. One divided by it is the speed if nothing else cost."""

METHODS = (
    "none",
    "auto",
    "class_bn",
    "bn:alpha=1",
    "bn:alpha=0.1",
    "tent",
    "eta",
    "eata",
    "sar",
    "roid",
    "cmf",
    "lame",
    "rotta",
)


def recorded(bench: Path, stream: str, per_class: int, seed: int) -> dict[str, np.ndarray]:
    """A stream; made where it is not kept yet."""
    path = Path(tempfile.gettempdir()) / "adaptd-benchmarks" / f"vision-{stream}-{per_class}-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        made = path.with_name(f"new-{os.getpid()}-{path.name}")
        script = [sys.executable, "vision_stream.py", str(made), "--per-class", str(per_class), "--seed", str(seed)]
        subprocess.run([*script, *STREAMS[stream]], cwd=bench, check=True, env=one_thread(), stdout=subprocess.DEVNULL)
        made.rename(path)
    with np.load(path) as archive:
        return {name: archive[name] for name in ("x", "y", "domain")}


def build(text: str, source: nn.Module, seed: int) -> Adaptation:
    """The method that ``name`` or ``name:key=value,...`` stands for, on a live copy of ``source``."""
    name, _, given = text.partition(":")
    params = {
        key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in given.split(",") if item)
    }
    method: type[Adaptation] = find("adaptation", name)
    context = Context(
        model=copy.deepcopy(source),
        source=copy.deepcopy(source).requires_grad_(False),
        num_classes=10,
        seed=seed,
        stepper=SafeStepper(),
    )
    return method(method.Params.model_validate(params), context)


class Count:
    """Wrong answers and CPU seconds."""

    def __init__(self) -> None:
        self.wrong = 0
        self.seconds = 0.0

    def add(self, logits: Tensor, labels: Tensor, started: float) -> None:
        """Count one batch that took from ``started`` till now."""
        self.seconds += time.thread_time() - started
        self.wrong += int((logits.argmax(1) != labels).sum())


def run(stream: dict[str, np.ndarray], method: Adaptation, layout: torch.memory_format, size: int) -> dict[str, Any]:
    """One pass over the stream; which of the two answers first alternates."""
    images = torch.from_numpy(stream["x"]).permute(0, 3, 1, 2).float().div_(255)
    labels = torch.from_numpy(stream["y"])
    plain, adapted, steps = Count(), Count(), 0
    for number, batch in enumerate(batches(images, size, layout)):
        wanted = labels[number * size : (number + 1) * size]
        for turn in (0, 1):
            start = time.thread_time()
            if (number + turn) % 2:
                with torch.inference_mode():
                    plain.add(method.context.source(batch.inputs), wanted, start)
            else:
                logits = method.adapt(batch)
                outcome = method.update()
                adapted.add(logits, wanted, start)
                steps += outcome is not None and outcome.applied
    count = len(labels)
    return {
        "error_percent": round(100 * adapted.wrong / count, 2),
        "source_error_percent": round(100 * plain.wrong / count, 2),
        "share_of_plain_speed": round(plain.seconds / adapted.seconds, 3),
        "speed_of_passes_alone": round(1 / PASSES[method.name], 3) if method.name in PASSES else None,
        "stepped": round(steps / -(-count // size), 3),
        "gauges": {name: round(value, 4) for name, value in method.gauges.items()},
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("methods", nargs="*", metavar="METHOD", help=f"by default: {' '.join(METHODS)}")
    made.add_argument("--bench", type=Path, default=Path(os.environ.get("ADAPTD_BENCH", BENCH)), help="folder of data")
    made.add_argument("--stream", nargs="+", choices=sorted(STREAMS), default=list(STREAMS))
    made.add_argument("--per-class", type=int, help="images of each class in each domain")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--seed", type=int, default=0, help="of the stream and of the methods")
    made.add_argument("--layout", choices=sorted(LAYOUTS), default="contiguous")
    options = made.parse_args()
    report = Report("tta", options)
    if not (options.bench / "vision_stream.py").exists():
        report.skip(f"{options.bench} with vision_stream.py does not exist on this machine; name it with --bench")
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    source = load_model(options.bench).to(memory_format=LAYOUTS[options.layout])
    per_class = options.per_class or (10 if options.quick else 100)
    results: dict[str, dict[str, Any]] = {}
    for stream in options.stream:
        data = recorded(options.bench, stream, per_class, options.seed)
        for text in options.methods or METHODS:
            method = build(text, source, options.seed)
            results.setdefault(stream, {})[text] = run(data, method, LAYOUTS[options.layout], options.batch_size)
    report.write({"images": 100 * per_class, "batch_size": options.batch_size, "streams": results})


if __name__ == "__main__":
    main()
