"""The garbage collector, kept away from what lives as long as the daemon does."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG_OBJECTS = 10_000
"""Objects that must be new before the collector looks at them: a few batches, which are mostly gone by then."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Have the collector pass over everything that exists now, and come less often, for as long as this lasts.

    Modules and models are hundreds of thousands of objects that no collection frees; looking at them stops every
    thread for a tenth of a second. What an event allocates is freed by reference counts; cycles are still found.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
