"""Syncing a journal beside the thread that writes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

__all__ = ["SyncAhead"]


class SyncAhead:
    """Syncs what a file holds on another thread, and keeps the errors of the disk for the sync that must be."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lost: list[OSError] = []

    def of(self, path: Path) -> Callable[[], None]:
        """Return what may be called on another thread to sync a file, even where that is closed meanwhile."""
        return partial(self._sync, path)

    def _sync(self, path: Path) -> None:
        with self._lock:
            try:
                # The kernel tells an error once to each who opened a file, so this must not take it from the writer.
                descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                return  # deleted meanwhile, or too many files are open: the sync that must be will do
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                self._lost.append(error)
            finally:
                os.close(descriptor)

    def check(self) -> None:
        """Wait for the sync under way, if any. To be called behind a sync of one's own.

        Raises:
            OSError: The disk reported this to a sync ahead.
        """
        with self._lock:
            if self._lost:
                raise self._lost[0]
