"""How long a thread keeps the interpreter while another one asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 0.02


@contextmanager
def long_turns() -> Iterator[None]:
    """Have threads interrupted later than by default, five milliseconds, for as long as this lasts.

    The threads of a daemon work for a few milliseconds at a time and give the interpreter away by themselves, when they
    wait and whenever they compute. Whoever is interrupted between finds that the others go on in turn, and comes again
    last.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(max(before, SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
