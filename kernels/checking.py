"""The cases of the self-check, and what counts as agreement with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SIZES = (1, 41, 1271)
"""Elements of the tensors of `lerp_`: one, and two sizes that no block divides."""

WEIGHTS = (0.001, 0.75)
"""One of a slow moving average, and one beyond the half where `lerp_` counts from the other end."""

CLASSES = (1, 10, 41, 1000, 1271)
ROWS = 7

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest difference, relative and absolute: some roundings of the dtype itself."""

Kernel = Callable[..., Any]


def first_disagreement(op: str, load: Callable[[], Kernel], reference: Kernel, device: torch.device) -> str:
    """Run all cases of ``op``; give the first one that differs from the reference, in words, or an empty string.

    An implementation that raises, even while it loads, differs. It must not bring the program down: that is what the
    check is for.
    """
    cases = {"lerp_": _lerp_cases, "softmax_entropy": _entropy_cases}[op]
    try:
        kernel = load()
        with torch.enable_grad():
            for case, actual, expected, tolerance in cases(kernel, reference, device):
                if difference := _difference(actual, expected, tolerance):
                    return f"{case}: {difference}"
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


Comparison = tuple[str, Tensor, Tensor, float]
"""A case in words, what the kernel gave, what the reference gave, and how far they may differ."""


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32, torch.bfloat16)


def _lerp_cases(kernel: Kernel, reference: Kernel, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(0)
    for dtype in _dtypes(device):
        for weight in WEIGHTS:
            starts = [torch.randn(size, generator=generator).to(device, dtype) for size in SIZES]
            ends = [torch.randn(size, generator=generator).to(device) for size in SIZES]
            ends[0] = ends[0].to(dtype)
            actual, expected = [start.clone() for start in starts], [start.clone() for start in starts]
            kernel(actual, ends, weight)
            reference(expected, ends, weight)
            for size, got, wanted in zip(SIZES, actual, expected, strict=True):
                yield f"{dtype}, {size} elements, weight {weight}", got, wanted, _TOLERANCES[dtype]


def _entropy_cases(kernel: Kernel, reference: Kernel, device: torch.device) -> Iterator[Comparison]:
    generator = torch.Generator().manual_seed(0)
    for dtype in _dtypes(device):
        for classes in CLASSES:
            logits = (5 * torch.randn(classes, ROWS, generator=generator)).to(device, dtype).T
            if classes > 1:
                logits[0, 0] = -torch.inf
            outcomes = []
            for function in (kernel, reference):
                leaf = logits.detach().requires_grad_()
                result = function(leaf)
                (gradient,) = torch.autograd.grad((result.entropy * torch.arange(ROWS, device=device)).sum(), leaf)
                outcomes.append((*(part.detach() for part in result), gradient))
            tolerances = (_TOLERANCES[torch.float32],) * 3 + (_TOLERANCES[dtype],)
            names = ("entropy", "confidence", "argmax", "gradient")
            for name, got, wanted, tolerance in zip(names, *outcomes, tolerances, strict=True):
                yield f"{name} of {dtype} logits ({ROWS}, {classes})", got, wanted, tolerance


def _difference(actual: Tensor, expected: Tensor, tolerance: float) -> str:
    """How the tensors differ, in words; empty where they agree."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    got, wanted = actual.double(), expected.double()
    wrong = ~torch.isclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not bool(wrong.any()):
        return ""
    first = tuple(wrong.nonzero()[0].tolist())
    return f"{got[first].item():.6g} instead of {wanted[first].item():.6g} at {first}"
