"""Which implementation an operation runs on, and the self-check that takes a wrong one out of use."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.reference import SoftmaxEntropy

OPS = ("lerp_", "softmax_entropy")
"""Every operation, by name."""

_MODULES = {"triton": "kernels.triton_ops", "pytorch": "kernels.pytorch", "reference": "kernels.reference"}
_FAST_FIRST = {"cuda": ("triton", "pytorch", "reference")}
_ELSEWHERE = ("pytorch", "reference")

_log = logging.getLogger(__name__)
_off: dict[tuple[str, str], str] = {}
_chosen: dict[tuple[str, str], Callable[..., Any]] = {}


class Disagreement(NamedTuple):
    """An implementation that the self-check took out of use.

    Attributes:
        op: Name of the operation.
        backend: ``triton`` or ``pytorch``.
        reason: The first case in which it differed from the reference, or what it raised.
    """

    op: str
    backend: str
    reason: str


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each target towards its source, in place: ``target <- target + weight * (source - target)``.

    This is one step of an exponential moving average (``weight`` = 1 - decay) or an interpolation of two sets of
    weights. It is computed in float32 (float64 if either is) and rounded once; a weight of 0 leaves the target, a
    weight of 1 gives the source exactly. Autograd does not see it.

    Args:
        targets: Floating-point tensors of any shapes, which share no memory with one another.
        sources: As many tensors of the same shapes, on the same device; dtypes may differ from the targets'.
        weight: Finite; in [0, 1] to interpolate, beyond to extrapolate.

    Raises:
        TypeError: If a tensor is not floating-point (copy integer buffers instead).
        ValueError: If numbers, shapes or devices of the tensors differ, or the weight is not finite.
    """
    weight = float(weight)
    _check_lerp(targets, sources, weight)
    if targets:
        _kernel("lerp_", targets[0].device.type)(targets, sources, weight)


def _check_lerp(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    if len(targets) != len(sources):
        raise ValueError(f"lerp_ needs as many sources as targets, got {len(sources)} and {len(targets)}")
    if not math.isfinite(weight):
        raise ValueError(f"lerp_ needs a finite weight, got {weight}")
    device = targets[0].device if targets else None
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if not (target.is_floating_point() and source.is_floating_point()):
            raise TypeError(
                f"lerp_ needs floating-point tensors, pair {i} is {target.dtype} and {source.dtype}; "
                "copy integer buffers instead"
            )
        if target.shape != source.shape:
            raise ValueError(f"lerp_ needs equal shapes, pair {i} is {tuple(target.shape)} and {tuple(source.shape)}")
        if target.device != device or source.device != device:
            raise ValueError(
                f"lerp_ needs one device, pair {i} is on {target.device} and {source.device}, not {device}"
            )


def softmax_entropy(logits: Tensor) -> SoftmaxEntropy:
    """Entropy of the softmax with confidence and argmax, in one pass over the logits.

    ``H = -sum_k p_k ln p_k``, whose gradient is ``dH/dz_k = -p_k (ln p_k + H)``. Accumulates in float32 (float64 for
    float64 logits); logits of any size are safe, and a logit of -inf is a class of probability 0. A row that holds
    NaN or +inf, or nothing but -inf, has NaN for entropy and confidence, and any class for argmax.

    Args:
        logits: ``(B, K)`` floating-point, K >= 1; need not be contiguous.

    Returns:
        ``(B,)`` each: see `SoftmaxEntropy`. Only ``entropy`` is differentiable, and only once.

    Raises:
        TypeError: If ``logits`` is not floating-point.
        ValueError: If ``logits`` is not a matrix or has no classes.
    """
    if not logits.is_floating_point():
        raise TypeError(f"softmax_entropy needs floating-point logits, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"softmax_entropy needs logits (B, K) with K >= 1, got shape {tuple(logits.shape)}")
    result: SoftmaxEntropy = _kernel("softmax_entropy", logits.device.type)(logits)
    return result


def backend(op: str, device: torch.device | str = "cpu") -> str:
    """Name of the implementation that ``op`` runs on for tensors of ``device``: triton, pytorch or reference."""
    return next(name for name in _candidates(device) if (op, name) not in _off)


def fallbacks() -> Mapping[str, str]:
    """Operations that lost an implementation, with the reason; empty when all is well."""
    return MappingProxyType({op: reason for (op, _), reason in _off.items()})


def self_check(device: torch.device | str) -> tuple[Disagreement, ...]:
    """Compare every implementation with the reference on a few shapes; take those that differ out of use.

    For the start of a program: takes milliseconds on a CPU, and on a GPU the seconds in which kernels compile. Each
    call judges anew. What is taken out of use is logged as a warning and stays visible in `fallbacks`. The global
    random state is left alone.

    Args:
        device: Where the kernels are going to be used.
    """
    from kernels.checking import first_disagreement

    found = []
    for op in OPS:
        reference = _load(op, "reference")
        for name in _candidates(device)[:-1]:
            reason = _missing(name) or first_disagreement(op, partial(_load, op, name), reference, torch.device(device))
            if not reason:
                _off.pop((op, name), None)
                continue
            found.append(Disagreement(op, name, reason))
            if (op, name) not in _off:
                _log.warning("kernel %s: the %s implementation is switched off: %s", op, name, reason)
            _off[op, name] = reason
    _chosen.clear()
    return tuple(found)


def _candidates(device: torch.device | str) -> tuple[str, ...]:
    """Implementations for a device, the fastest first, the reference last."""
    return _FAST_FIRST.get(torch.device(device).type, _ELSEWHERE)


def _missing(name: str) -> str:
    return "Triton is not installed" if name == "triton" and find_spec("triton") is None else ""


def _load(op: str, name: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = getattr(importlib.import_module(_MODULES[name]), op)
    return kernel


def _kernel(op: str, device_type: str) -> Callable[..., Any]:
    """The function to call, looked up once."""
    kernel = _chosen.get((op, device_type))
    if kernel is None:
        name = backend(op, device_type)
        if reason := _missing(name):
            _log.warning("kernel %s: the %s implementation is switched off: %s", op, name, reason)
            _off[op, name] = reason
            name = backend(op, device_type)
        kernel = _chosen[op, device_type] = _load(op, name)
    return kernel
