"""Syncing a journal beside the thread that writes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

__all__ = ["sync_ahead"]


def sync_ahead(descriptor: int | None, lost: list[OSError]) -> Callable[[], None]:
    """Return what may be called on another thread to sync what a file holds, even where that is closed meanwhile.

    Args:
        descriptor: Of the file; None syncs nothing.
        lost: Takes the error of the disk. The kernel reports it once, so whoever syncs next must look here.
    """
    if descriptor is not None:
        with suppress(OSError):  # too many files are open: the sync that must be will do
            return partial(_sync, os.dup(descriptor), lost)
    return lambda: None


def _sync(descriptor: int, lost: list[OSError]) -> None:
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        lost.append(error)
    finally:
        os.close(descriptor)
