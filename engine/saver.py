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
        self._synced: anyio.Event | None = None

    @property
    def due(self) -> bool:
        """Whether something has changed for long enough, and what the journal held when that was found is synced.

        The copy of the state syncs it as well, but serving waits for that one.
        """
        keeper = self._daemon.runner.keeper
        if keeper.sequence == keeper.saved_step or CLOCK.monotonic() < self.next or self.under_way is not None:
            return False
        if self._synced is None:
            self._synced = anyio.Event()
            self._daemon.beside(self._sync, keeper.journal.ahead(), self._synced)
        return self._synced.is_set()

    async def _sync(self, sync: Callable[[], None], synced: anyio.Event) -> None:
        await self._daemon.in_thread(sync)
        synced.set()

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
            await self.under_way.wait()
        self.next = CLOCK.monotonic() + self.every
        if keeper.sequence == keeper.saved_step:
            return
        self._synced = None
        snapshot = await daemon.on_model(daemon.runner.snapshot)
        self.under_way = done = anyio.Event()
        daemon.beside(self._write, snapshot, done)
        if wait:
            await done.wait()

    async def _write(self, snapshot: Snapshot, done: anyio.Event) -> None:
        daemon = self._daemon
        started = time.perf_counter()
        serving = daemon.state != "starting"
        try:
            if serving:
                await daemon.in_thread(daemon.writer.wait_flushed)
            saved = await daemon.in_thread(daemon.runner.keeper.write, snapshot)
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
