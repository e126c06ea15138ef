"""The few tensor operations worth fusing: Triton on a GPU, PyTorch elsewhere, a plain reference beside each.

Call `lerp_` and `softmax_entropy`; they choose the implementation by device. `self_check` compares every
implementation with the reference and switches off, visibly, those that disagree.
"""

from kernels.dispatch import (
    OPS,
    Disagreement,
    backend,
    fallbacks,
    lerp_,
    self_check,
    softmax_entropy,
)
from kernels.reference import SoftmaxEntropy

__all__ = [
    "OPS",
    "Disagreement",
    "SoftmaxEntropy",
    "backend",
    "fallbacks",
    "lerp_",
    "self_check",
    "softmax_entropy",
]
