"""Compiles every Triton kernel to machine code, which needs no GPU; prints the PTX loads of each as JSON.

A program of its own, because Triton compiles nothing in a process that interprets.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import triton_ops

WARP = 32


def loads(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], capability: int) -> list[str]:
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, WARP), options={"enable_fp_fusion": True, "num_warps": 8}
    )
    assert compiled.asm["cubin"]
    return sorted(set(re.findall(r"ld\.global\S*", compiled.asm["ptx"])))


def lerp(capability: int, dtype: Any, wide: Any) -> list[str]:
    constants = {"TARGET": dtype, "SOURCE": dtype, "WIDE": wide, "NEAR_START": True, "ALIGNED": True, "BLOCK": 4096}
    arguments = {"table": "*i64", "blocks": "*i32", "weight": "fp32", "weight_rest": "fp32"}
    return loads(triton_ops.lerp_kernel, arguments, constants, capability)


def entropy(capability: int, dtype: str, wide: Any, width: str) -> list[list[str]]:
    constants = {"LOWEST": -1e30, "WIDE": wide, "ROWS": 16, "COLUMNS": 64}
    logits = {"logits": dtype, "row_stride": "i32", "class_stride": "i32", "rows": "i32", "classes": "i32"}
    forward = {"entropy": width, "confidence": width, "argmax": "*i64", "peaks": width, "log_sums": width}
    backward = {"upstream": width, "upstream_stride": "i32", "entropy": width, "peaks": width, "log_sums": width}
    return [
        loads(triton_ops.entropy_forward_kernel, logits | forward, constants, capability),
        loads(triton_ops.entropy_backward_kernel, logits | backward | {"gradient": dtype}, constants, capability),
    ]


def main() -> None:
    found = {}
    for capability in (80, 90):
        found[f"lerp float32 sm{capability}"] = lerp(capability, tl.float32, tl.float32)
        found[f"lerp bfloat16 sm{capability}"] = lerp(capability, tl.bfloat16, tl.float32)
        entropy(capability, "*bf16", tl.float32, "*fp32")
    entropy(80, "*fp32", tl.float32, "*fp32")
    entropy(90, "*fp64", tl.float64, "*fp64")
    json.dump(found, sys.stdout)


main()
