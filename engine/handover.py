"""Partitions that come from other processes and go to them, while a daemon runs on streams that it shares.

Learned state belongs to the process and stays; positions belong to whoever reads a partition now. So a partition that
goes leaves checkpoints and committed offsets at what was answered here, and where the journal is about partitions that
others read now, it is repeated no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from engine.writer import Outgoing
from streams.base import Partition, Positions, StreamUnavailableError

if TYPE_CHECKING:
    from engine.daemon import Daemon

HANDOVER_SECONDS = 30.0
"""Time that a last commit of partitions that go may take."""

log = structlog.get_logger("adaptd")


class Handover:
    """Keeps positions, journal and checkpoints of a daemon right over changes of its partitions.

    Args:
        daemon: Whose.

    Attributes:
        moved: Whether partitions have come since `take_stock`.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.moved = False

    async def take_stock(self) -> None:
        """After partitions came: let go of positions, and of a replay, that are about those of others.

        To be called between two batches.
        """
        self.moved = False
        readers, cutter, positions = self._daemon.readers, self._daemon.cutter, self._daemon.runner.positions
        shared = {stream for reader in readers if reader.shared for stream in reader.streams}
        own = {partition for reader in readers for partition in reader.partitions}
        awaited = cutter.awaited()
        theirs = {p for p in (*positions, *awaited) if p[0] in shared and p not in own}
        for partition in theirs:
            positions.pop(partition, None)
        if theirs & awaited:
            names = ", ".join(f"{stream}-{number}" for stream, number in sorted(theirs & awaited))
            await self.abandon_replay(f"others read {names} now")

    async def abandon_replay(self, why: str) -> None:
        """Go on from here, where the rest of the journal cannot be repeated. To be called between two batches."""
        daemon, keeper = self._daemon, self._daemon.runner.keeper
        log.warning("replay_abandoned", batches=daemon.cutter.replaying, reason=why)
        daemon.cutter.abandon()
        await daemon.on_model(keeper.journal.discard_after, keeper.sequence)
        await daemon.settle()

    async def revoked(self, partitions: Sequence[Partition], lost: bool) -> Positions:
        """Finish with partitions that go: what is cut of them is applied and answered, and in no checkpoint any more.

        Args:
            partitions: Which.
            lost: Whether others have them already, so that nothing may be committed.

        Returns:
            Where each of them is to be read on; nothing where they are ``lost``.

        Raises:
            StreamUnavailableError: The writer ended before everything was out.
        """
        daemon = self._daemon
        if lost:
            daemon.writer.lose(partitions)
        async with daemon.turn:
            daemon.cutter.revoked(partitions)
            if not lost and not await self._flushed():
                lost = True
                daemon.writer.lose(partitions)
            gone = {p: daemon.runner.positions.pop(p) for p in partitions if p in daemon.runner.positions}
            daemon.writer.put(Outgoing(gone=partitions, lost=lost))
            daemon.metrics.revoked(partitions)
            if daemon.cutter.awaited() & set(partitions):
                await self.abandon_replay("its partitions were given to others")
            else:
                await daemon.settle()
        log.info("partitions_lost" if lost else "partitions_revoked", partitions=len(partitions))
        return {} if lost or daemon.writer.transactional else gone

    async def _flushed(self) -> bool:
        """Have everything answered so far written; False where transactions cannot be committed any more.

        The group may have given the partitions away meanwhile. Then nothing of that is visible to anybody, and whoever
        reads them now answers it.

        Raises:
            StreamUnavailableError: The writer ended before everything was out.
        """
        if not self._daemon.writer.transactional:
            await self._daemon.flush()
            return True
        try:
            await self._daemon.flush(HANDOVER_SECONDS)
        except StreamUnavailableError as error:
            log.warning("partitions_not_committed", error=str(error))
            return False
        return True
