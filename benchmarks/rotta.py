"""Error and speed of RoTTA on a class-correlated stream of corrupted images, beside the plain forward pass.

    python -m benchmarks.rotta [--stream STREAM.npz] [--seeds 0 1] [--layout channels_last] [--quick]

``STREAM.npz`` holds ``x (N, 32, 32, 3)`` uint8 and ``y (N,)``; by default the stream of `benchmarks.backtest_rotta`.
The method runs alone here, without the engine, and its time is given by phase. Both passes see the same batches in the
same memory layout, alternating batch by batch, so that a shared machine slows
both alike. Figures: errors in percent, the speed as a share of the plain pass, and the CPU milliseconds
a batch spends in each phase.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.backtest_rotta import stream as recorded_stream
from benchmarks.results import BENCH, Report, parser
from engine.allocator import keep_freed_memory
from policies.adaptation import rotta
from policies.interfaces import Batch, Context
from policies.stepping import SafeStepper

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def load_model(bench: Path) -> nn.Module:
    """The benchmark's source model."""
    spec = importlib.util.spec_from_file_location("resnet20", bench / "resnet20.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    model: nn.Module = module.load()
    return model


def batches(images: Tensor, size: int, layout: torch.memory_format) -> Iterator[Batch]:
    """The stream in batches, a batch a second."""
    for start in range(0, len(images), size):
        inputs = images[start : start + size].contiguous(memory_format=layout)
        count = len(inputs)
        times = torch.full((count,), float(start), dtype=torch.float64)
        ids = tuple(str(start + row) for row in range(count))
        yield Batch(ids=ids, inputs=inputs, times=times, groups=(None,) * count, now=float(start))


class Phases:
    """CPU time by phase, by wrapping the calls that bound one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time inside."""
        start = time.thread_time()
        try:
            yield
        finally:
            self.seconds[name] += time.thread_time() - start

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Count the time of every call of ``owner.attribute``."""
        call: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return call(*args, **kwargs)

        setattr(owner, attribute, timed)


def run(
    stream: dict[str, np.ndarray], source: nn.Module, layout: torch.memory_format, size: int, seed: int
) -> dict[str, Any]:
    """One pass over the stream; plain and adapted answers alternate, and which goes first alternates too."""
    live = copy.deepcopy(source)
    phases = Phases()
    stepper = SafeStepper()
    phases.wrap(stepper, "step", "backward_and_step")
    method = rotta.RoTTA(
        rotta.RoTTA.Params(), Context(model=live, source=source, num_classes=10, seed=seed, stepper=stepper)
    )
    phases.wrap(method._bank, "insert", "bank")  # noqa: SLF001
    phases.wrap(method, "_loss", "teacher_student_forward")
    original = vars(rotta)["augment"]
    phases.wrap(rotta, "augment", "augmentation")
    images = torch.from_numpy(stream["x"]).permute(0, 3, 1, 2).float().div_(255)
    labels = torch.from_numpy(stream["y"])
    plain_time: list[float] = []
    adapted_time: list[float] = []
    wrong = {"source": 0, "rotta": 0}

    def plain(batch: Batch) -> None:
        start = time.thread_time()
        with torch.inference_mode():
            logits = source(batch.inputs)
        plain_time.append(time.thread_time() - start)
        wrong["source"] += count_wrong(batch, logits)

    def adapted(batch: Batch) -> None:
        start = time.thread_time()
        with phases.of("answer"):
            logits = method.adapt(batch)
        method.update()
        adapted_time.append(time.thread_time() - start)
        wrong["rotta"] += count_wrong(batch, logits)

    def count_wrong(batch: Batch, logits: Tensor) -> int:
        start = int(batch.ids[0])
        return int((logits.argmax(1) != labels[start : start + len(logits)]).sum())

    try:
        for number, batch in enumerate(batches(images, size, layout)):
            for call in (plain, adapted) if number % 2 else (adapted, plain):
                call(batch)
    finally:
        setattr(rotta, "augment", original)  # noqa: B010
    phases.seconds["teacher_student_forward"] -= phases.seconds["augmentation"]
    ratios = sorted(sum(plain_time[i : i + 20]) / sum(adapted_time[i : i + 20]) for i in range(0, len(plain_time), 20))
    return {
        "error_percent": {name: round(100 * count / len(labels), 2) for name, count in wrong.items()},
        "share_of_plain_speed": round(sum(plain_time) / sum(adapted_time), 4),
        "share_by_20_batches": {
            "lowest": round(ratios[0], 4),
            "median": round(statistics.median(ratios), 4),
            "highest": round(ratios[-1], 4),
        },
        "plain_ms_per_batch": round(1e3 * sum(plain_time) / len(plain_time), 2),
        "adapted_ms_per_batch": round(1e3 * sum(adapted_time) / len(adapted_time), 2),
        "phases_ms_per_batch": {
            name: round(1e3 * seconds / len(plain_time), 2) for name, seconds in sorted(phases.seconds.items())
        },
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--stream", type=Path)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--limit", type=int, default=None, help="images to use")
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each")
    made.add_argument("--layout", choices=sorted(LAYOUTS), default="contiguous")
    options = made.parse_args()
    benchmark = Report("rotta", options)
    if not (BENCH / "resnet20.py").exists():
        benchmark.skip(f"{BENCH} with resnet20.py does not exist on this machine")
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    with np.load(options.stream or recorded_stream(10 if options.quick else 100)) as archive:
        stream = {name: archive[name][: options.limit] for name in ("x", "y")}
    source = load_model(BENCH).to(memory_format=LAYOUTS[options.layout])
    runs = [run(stream, source, LAYOUTS[options.layout], options.batch_size, seed) for seed in options.seeds]
    benchmark.write(
        {
            "images": len(stream["y"]),
            "batch_size": options.batch_size,
            "layout": options.layout,
            "threads": torch.get_num_threads(),
            "runs": dict(zip(map(str, options.seeds), runs, strict=True)),
        }
    )


if __name__ == "__main__":
    main()
