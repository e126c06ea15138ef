"""The C library's allocator, told to keep the memory that tensors free.

By default glibc gives memory above the last live block back to the system at once. A forward pass allocates and frees
some megabytes a layer, so every layer would get fresh pages that the system must zero: a ResNet-20 on one core runs
1.5 times as fast when freed memory is kept (``benchmarks/model_overhead.py``). Memory never exceeds its peak by that.
"""

from __future__ import annotations

import ctypes
import os
import sys

KEPT_BYTES = 1 << 30
"""Free memory at the end of a heap that is given back only above this."""

_LARGEST_POOLED = 1 << 25  # the most that glibc accepts; larger blocks always come from the system and go back to it
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_SET_BY_OPERATOR = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next tensors.

    Does nothing where the C library is not glibc, or where the environment says how it is to allocate.

    Returns:
        Whether that was done.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SET_BY_OPERATOR):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_MMAP_THRESHOLD, _LARGEST_POOLED))
