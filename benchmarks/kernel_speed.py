"""Speed of every kernel against the plain reference and against what one would write without it.

    python -m benchmarks.kernel_speed [--device cpu|cuda] [--output FILE] [--quick]

All contenders of a case take turns in one run, so that a shared machine slows them alike; a figure is the median of
the turns. Prints one JSON object: microseconds, and how many times faster than ``reference`` and than ``usual``.
``usual`` is, for `lerp_`, a loop of ``Tensor.lerp_``; for `softmax_entropy`, ``softmax`` times ``log_softmax`` with
``max`` for confidence and class. The entropy is timed with its gradient, as adaptation uses it. Triton takes part on
GPUs alone: in its interpreter its speed means nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Report, parser
from kernels import pytorch, reference

TURNS = 15
TURN_SECONDS = 0.02

RESNET20 = [(16, 3, 3, 3), *[(16,)] * 38, *[(16, 16, 3, 3)] * 6, *[(32, 32, 3, 3)] * 6, *[(64, 64, 3, 3)] * 6, (10, 64)]
"""Shapes like those of a ResNet-20: many small tensors, 0.28 million elements."""

LARGE = [(1024, 1024)] * 24
"""25 million elements in a few large tensors."""

LOGITS = [(64, 10), (256, 1000), (8, 50_257)]


def implementations(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"reference": reference, "pytorch": pytorch}
    if device == "cuda":
        from kernels import triton_ops

        found["triton"] = triton_ops
    return found


def usual_lerp(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.lerp_(source, 0.001)


def usual_entropy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = logits.softmax(1)
    entropy = -(probabilities * logits.log_softmax(1)).sum(1)
    return entropy, *probabilities.max(1)


def measure(contenders: dict[str, Callable[[], object]], device: str, turns: int) -> dict[str, float]:
    """Median seconds a call, the contenders in turn."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else int  # int() costs next to nothing
    repeats: dict[str, int] = {}
    for name, call in contenders.items():
        call()
        wait()
        started = time.perf_counter()
        call()
        wait()
        repeats[name] = max(1, int(TURN_SECONDS / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, call in contenders.items():
            started = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            wait()
            times[name].append((time.perf_counter() - started) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def lerp_case(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    targets = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    sources = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    calls: dict[str, Callable[[], object]] = {"usual": lambda: usual_lerp(targets, sources)}
    for name, module in implementations(device).items():
        calls[name] = lambda module=module: module.lerp_(targets, sources, 0.001)  # type: ignore[misc]
    return calls


def entropy_case(shape: tuple[int, int], dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    logits = torch.randn(shape, device=device).to(dtype).requires_grad_()

    def with_gradient(function: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(logits)[0].mean(), logits)

    calls = {"usual": with_gradient(usual_entropy)}
    return calls | {n: with_gradient(module.softmax_entropy) for n, module in implementations(device).items()}


def row(calls: dict[str, Callable[[], object]], device: str, turns: int) -> dict[str, Any]:
    seconds = measure(calls, device, turns)
    ours = [name for name in seconds if name not in ("usual", "reference")]
    return {
        "microseconds": {name: round(value * 1e6, 1) for name, value in seconds.items()},
        "times_faster_than_reference": {name: round(seconds["reference"] / seconds[name], 2) for name in ours},
        "times_faster_than_usual": {name: round(seconds["usual"] / seconds[name], 2) for name in ours},
    }


def results(device: str, turns: int) -> dict[str, Any]:
    cases: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        cases[f"lerp_ {kind} resnet20"] = row(lerp_case(RESNET20, dtype, device), device, turns)
        cases[f"lerp_ {kind} 25M"] = row(lerp_case(LARGE, dtype, device), device, turns)
        for shape in LOGITS:
            cases[f"softmax_entropy {kind} {shape[0]}x{shape[1]}"] = row(
                entropy_case(shape, dtype, device), device, turns
            )
    return cases


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = made.parse_args()
    report = Report("kernel_speed" if options.device == "cpu" else "kernel_speed_gpu", options)
    torch.manual_seed(0)
    found = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cases": results(options.device, 1 if options.quick else TURNS),
    }
    report.write(found)


if __name__ == "__main__":
    main()
