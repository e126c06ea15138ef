"""When a running daemon saves its state: the copy between two batches, the writing beside serving."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
import structlog

from engine.keeper import Snapshot
from streams.seams import CLOCK

if TYPE_CHECKING:
    from engine.daemon import Daemon

STALE_SECONDS = 1.0
"""Age at which a sync of the journal is repeated, where a background job keeps a checkpoint back."""

log = structlog.get_logger("adaptd")


class Saver:
    """Makes the checkpoints of a daemon, one at a time.

    Args:
        daemon: Whose.
        every: Seconds between two checkpoints; may be changed at any time.

    Attributes:
        saved_at: When the last durable checkpoint was made, by the monotonic clock; None before the first one of this
            process.
        next: When the next one is due, by the same clock.
        under_way: The checkpoint that is being written, if any; set once that has ended.
    """

    def __init__(self, daemon: Daemon, every: float) -> None:
        self._daemon = daemon
        self.every = every
        self.saved_at: float | None = None
        self.next = 0.0
        self.under_way: anyio.Event | None = None
        self._sync: anyio.Event | None = None
        self._stale = 0.0
        self._ready = False

    def prepare(self) -> bool:
        """Where a checkpoint is due, have the journal synced beside serving, and again each second until it is saved.

        The copy of the state syncs it as well, but serving waits for that one.

        Returns:
            Whether it is due and the first such sync has ended, so that it may be saved.
        """
        keeper, now = self._daemon.runner.keeper, CLOCK.monotonic()
        if self.under_way is not None or self._daemon.cutter.replaying:
            return False
        if keeper.sequence == keeper.saved_step or now < self.next:
            return False
        if self._sync is None or (self._sync.is_set() and now >= self._stale):
            self._sync, self._stale = anyio.Event(), now + STALE_SECONDS
            self._daemon.beside(self._sync_ahead, keeper.journal.ahead(), self._sync)
        return self._ready

    async def _sync_ahead(self, sync: Callable[[], None], done: anyio.Event) -> None:
        await self._daemon.in_thread(sync)
        done.set()
        if done is self._sync:  # no checkpoint was saved meanwhile
            self._ready = True

    async def save(self, *, wait: bool = False) -> None:
        """Copy the state now and write it beside serving, once everything it covers has been answered.

        Not in the middle of a replay: what is left of the journal belongs to the checkpoint that it began with.

        Args:
            wait: Whether to return only when it is written, or has failed.
        """
        daemon, keeper = self._daemon, self._daemon.runner.keeper
        if daemon.cutter.replaying:
            return
        if self.under_way is not None:
            if not wait:
                return
            with keeper.hurry.while_waiting():
                await self.under_way.wait()
        self.next = CLOCK.monotonic() + self.every
        if keeper.sequence == keeper.saved_step:
            return
        self._sync, self._ready = None, False
        snapshot = await daemon.on_model(daemon.runner.snapshot)
        self.under_way = done = anyio.Event()
        daemon.beside(self._write, snapshot, done)
        if wait:
            with keeper.hurry.while_waiting():
                await done.wait()

    async def _write(self, snapshot: Snapshot, done: anyio.Event) -> None:
        daemon = self._daemon
        started = time.perf_counter()
        serving = daemon.state != "starting"
        try:
            if serving:
                await daemon.in_thread(daemon.writer.wait_flushed)
            saved = await daemon.in_thread(daemon.affinity.apart, daemon.runner.keeper.write, snapshot)
        except Exception as error:
            daemon.metrics.checkpoint_failed()
            log.error("checkpoint_failed", step=snapshot.step, error=str(error))
            if not serving or daemon.leaving:
                raise
        else:
            self.saved_at = CLOCK.monotonic()
            seconds = time.perf_counter() - started
            daemon.metrics.checkpoint(saved.bytes, seconds)
            log.info("checkpoint", step=saved.step, bytes=saved.bytes, seconds=round(seconds, 3))
        finally:
            self.under_way = None
            done.set()
