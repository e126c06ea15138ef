"""The operations as Triton kernels, for CUDA tensors.

Importing this module imports Triton. With ``TRITON_INTERPRET=1`` in the environment before that, the kernels run in
Triton's interpreter and take CPU tensors. Arguments are those that `kernels.dispatch` has checked already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import pytorch
from kernels.reference import SoftmaxEntropy, accumulator

BLOCK = 4096
"""Elements of a tensor that one program of `lerp_` takes: 16 a thread, enough to hide the look-up of its tensor."""

TILE = 1024
"""Logits that one program of `softmax_entropy` holds at a time: some rows of few classes, or a part of one long row."""

ALIGNMENT = 16
"""Bytes; the widest single load of a GPU thread. `lerp_kernel` repeats the number, as a kernel reads no globals."""

_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit  # type: ignore[untyped-decorator]
def moved(start, end, share, NEAR_START: tl.constexpr):  # type: ignore[no-untyped-def]
    """``start + share * (end - start)``, counted from the nearer end."""
    return start + share * (end - start) if NEAR_START else end - (1 - share) * (end - start)


@triton.jit  # type: ignore[untyped-decorator]
def lerp_kernel(  # type: ignore[no-untyped-def]
    table,
    blocks,
    weight,
    weight_rest,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    WIDE: tl.constexpr,
    NEAR_START: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move one block of one tensor; ``table`` holds target address, source address, size and first block a tensor."""
    program = tl.program_id(0)
    row = table + tl.load(blocks + program).to(tl.int64) * 4
    target_address = tl.load(row)
    source_address = tl.load(row + 1)
    size = tl.load(row + 2)
    target = target_address.to(tl.pointer_type(TARGET))
    source = source_address.to(tl.pointer_type(SOURCE))
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        source = tl.multiple_of(source, 16)
    first = (program - tl.load(row + 3)) * BLOCK
    # Triton takes a float argument as float32; what that rounds off comes in the second one.
    share = tl.full((1,), weight, WIDE) + tl.full((1,), weight_rest, WIDE)
    at = first + tl.arange(0, BLOCK)
    if first + BLOCK <= size:
        # Without a mask the loads and stores are as wide as the alignment allows.
        start, end = tl.load(target + at).to(WIDE), tl.load(source + at).to(WIDE)
        tl.store(target + at, moved(start, end, share, NEAR_START).to(TARGET))
    else:
        inside = at < size
        start = tl.load(target + at, mask=inside, other=0).to(WIDE)
        end = tl.load(source + at, mask=inside, other=0).to(WIDE)
        tl.store(target + at, moved(start, end, share, NEAR_START).to(TARGET), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def entropy_forward_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    class_stride,
    rows,
    classes,
    entropy,
    confidence,
    argmax,
    peaks,
    log_sums,
    LOWEST: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Read ``ROWS`` rows once: running maximum, ``sum e^d`` and ``sum d e^d`` with d counted from the maximum."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    peak = tl.full((ROWS,), float("-inf"), WIDE)
    total = tl.zeros((ROWS,), WIDE)
    moment = tl.zeros((ROWS,), WIDE)
    best = tl.zeros((ROWS,), tl.int64)
    for first in range(0, classes, COLUMNS):
        column = first + tl.arange(0, COLUMNS).to(tl.int64)
        mask = inside[:, None] & (column < classes)[None, :]
        place = row[:, None] * row_stride + column[None, :] * class_stride
        z = tl.load(logits + place, mask=mask, other=float("-inf")).to(WIDE)
        top, where = tl.max(z, 1, return_indices=True)
        best = tl.where(top > peak, first + where, best)
        raised = tl.maximum(peak, top)
        # Where all logits so far are -inf there is no maximum to count from yet.
        origin = tl.where(raised == float("-inf"), 0.0, raised)
        fall = tl.maximum(peak - origin, LOWEST)
        shrink = tl.exp(fall)
        d = z - origin[:, None]
        e = tl.exp(d)
        # LOWEST stands for -inf, whose product with e^-inf = 0 would be NaN.
        moment = shrink * moment + shrink * total * fall + tl.sum(e * tl.maximum(d, LOWEST), 1)
        total = shrink * total + tl.sum(e, 1)
        peak = raised
    # Nothing but -inf: no distribution.
    total = tl.where(total == 0, float("nan"), total)
    log_sum = tl.log(total)
    h = log_sum - moment / total
    tl.store(entropy + row, h, mask=inside)
    tl.store(confidence + row, 1.0 / total, mask=inside)
    tl.store(argmax + row, best, mask=inside)
    tl.store(peaks + row, peak, mask=inside)
    tl.store(log_sums + row, log_sum, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def entropy_backward_kernel(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    class_stride,
    rows,
    classes,
    upstream,
    upstream_stride,
    entropy,
    peaks,
    log_sums,
    gradient,
    LOWEST: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``dH/dz_k = -p_k (ln p_k + H)`` for one tile; ``gradient`` is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    mask = inside[:, None] & (column < classes)[None, :]
    place = row[:, None] * row_stride + column[None, :] * class_stride
    z = tl.load(logits + place, mask=mask, other=float("-inf")).to(WIDE)
    peak = tl.load(peaks + row, mask=inside, other=0)
    log_sum = tl.load(log_sums + row, mask=inside, other=0)
    h = tl.load(entropy + row, mask=inside, other=0)
    scale = tl.load(upstream + row * upstream_stride, mask=inside, other=0)
    # The maximum goes first: beside a huge one, its sum with log_sum would round log_sum away.
    logarithm = (z - peak[:, None]) - log_sum[:, None]
    result = -scale[:, None] * tl.exp(logarithm) * (tl.maximum(logarithm, LOWEST) + h[:, None])
    tl.store(gradient + row[:, None] * classes + column[None, :], result, mask=mask)


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Move each target towards its source; see `kernels.dispatch.lerp_`.

    All pairs of the same dtypes go in one launch. A pair that does not suit the kernel goes to PyTorch.
    """
    alike: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    other: list[tuple[Tensor, Tensor]] = []
    for pair in zip(targets, sources, strict=True):
        if not _suits(*pair):
            other.append(pair)
        elif pair[0].numel():
            alike.setdefault((pair[0].dtype, pair[1].dtype), []).append(pair)
    for pairs in alike.values():
        _launch_lerp(pairs, weight)
    if other:
        pytorch.lerp_([target for target, _ in other], [source for _, source in other], weight)


def _suits(target: Tensor, source: Tensor) -> bool:
    """Whether element i in memory of one belongs to element i in memory of the other, without gaps."""
    if {target.dtype, source.dtype} == {torch.float64, torch.bfloat16}:
        return False  # a conversion that Triton's interpreter gets wrong
    if target.is_contiguous():
        return source.is_contiguous()
    last = torch.channels_last
    return target.dim() == 4 and all(tensor.is_contiguous(memory_format=last) for tensor in (target, source))


def _launch_lerp(pairs: list[tuple[Tensor, Tensor]], weight: float) -> None:
    """One launch over pairs of one target and one source dtype on one device."""
    first, source = pairs[0]
    with torch.cuda.device_of(first):
        stream = torch.cuda.current_stream().cuda_stream if first.is_cuda else 0
        addresses = tuple((target.data_ptr(), source.data_ptr(), target.numel()) for target, source in pairs)
        table, blocks, aligned = _lerp_table(addresses, first.device, stream)
        coarse = torch.tensor(weight, dtype=torch.float32).item()
        lerp_kernel[(len(blocks),)](
            table,
            blocks,
            coarse,
            weight - coarse,
            TARGET=_TRITON_DTYPES[first.dtype],
            SOURCE=_TRITON_DTYPES[source.dtype],
            WIDE=_TRITON_DTYPES[accumulator(first.dtype, source.dtype)],
            NEAR_START=abs(weight) < 0.5,
            ALIGNED=aligned,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=True,
        )
    torch.autograd.graph.increment_version([target for target, _ in pairs])


@lru_cache(maxsize=32)
def _lerp_table(
    addresses: tuple[tuple[int, int, int], ...], device: torch.device, stream: int
) -> tuple[Tensor, Tensor, bool]:
    """The look-up tables of `lerp_kernel`: they stay the same as long as the tensors stay where they are.

    ``stream`` is part of the key because the allocator may hand out a table's memory again once it is dropped, which
    is safe only behind the launches of its own stream.
    """
    rows = torch.tensor(addresses, dtype=torch.int64)
    counts = (rows[:, 2] + BLOCK - 1) // BLOCK
    table = torch.cat((rows, (counts.cumsum(0) - counts)[:, None]), 1)
    blocks = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(counts)
    aligned = not bool((rows[:, :2] % ALIGNMENT).any())
    return table.to(device), blocks.to(device), aligned


def softmax_entropy(logits: Tensor) -> SoftmaxEntropy:
    """Entropy, confidence and argmax of the softmax; see `kernels.dispatch.softmax_entropy`."""
    return SoftmaxEntropy(*_SoftmaxEntropy.apply(logits))


def _tile(logits: Tensor) -> dict[str, Any]:
    """Compile-time arguments of the entropy kernels for logits ``(B, K)``."""
    columns = min(triton.next_power_of_2(logits.shape[1]), TILE)
    rows = min(triton.next_power_of_2(max(len(logits), 1)), TILE // columns, 64)
    wide = _TRITON_DTYPES[accumulator(logits.dtype)]
    return {
        "LOWEST": pytorch.LOWEST_LOGARITHM,
        "WIDE": wide,
        "ROWS": rows,
        "COLUMNS": columns,
        "enable_fp_fusion": True,
    }


class _SoftmaxEntropy(torch.autograd.Function):
    """Saves the logits, which are there anyway, and three numbers a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, classes = logits.shape
        wide = accumulator(logits.dtype)
        entropy, confidence, peaks, log_sums = torch.empty(4, rows, dtype=wide, device=logits.device).unbind()
        argmax = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if rows:
            tile = _tile(logits)
            with torch.cuda.device_of(logits):
                entropy_forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                    logits, *logits.stride(), rows, classes, entropy, confidence, argmax, peaks, log_sums, **tile
                )
        ctx.save_for_backward(logits, entropy, peaks, log_sums)
        ctx.mark_non_differentiable(confidence, argmax)
        return entropy, confidence, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> Tensor:
        """``dH/dz_k = -p_k (ln p_k + H)``."""
        logits, entropy, peaks, log_sums = ctx.saved_tensors
        rows, classes = logits.shape
        gradient = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
        if rows:
            tile = _tile(logits)
            grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(classes, tile["COLUMNS"]))
            with torch.cuda.device_of(logits):
                entropy_backward_kernel[grid](
                    logits,
                    *logits.stride(),
                    rows,
                    classes,
                    upstream,
                    *upstream.stride(),
                    entropy,
                    peaks,
                    log_sums,
                    gradient,
                    **tile,
                )
        return gradient
