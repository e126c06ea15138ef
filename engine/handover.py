"""Partitions that come from other processes and go to them, while a daemon runs on streams that it shares.

Learned state belongs to the process and stays; positions, and what waits for feedback, belong to whoever reads a
partition now. While partitions change hands nothing is forgotten: one that is given back with nobody having worked on
it meanwhile goes on as if it had never been away. What comes from others is begun anew, as an entry of the journal, and
what went to others is forgotten by one. Where the journal is about partitions that others read now, it is repeated no
further.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import anyio
import structlog

from engine.cutter import MOVES, Cut
from engine.holdings import Standing
from engine.reader import Chunk
from engine.writer import Outgoing
from streams.base import Partition, Positions
from streams.journal import Kind, Run
from streams.seams import CLOCK

if TYPE_CHECKING:
    from engine.daemon import Daemon

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
        self._taken: set[Partition] = set()
        self._back: set[Partition] = set()
        self._rebuilding = False

    def placed(self, chunk: Chunk) -> None:
        """Take in which partitions are ours now, and have the cutter say so before anything of them is cut."""
        daemon = self._daemon
        self.moved = True
        known = {*list(daemon.runner.positions), *daemon.cutter.named()}
        left = [Run(*p, 0, 0, 0) for p in sorted(self._theirs(known))]
        if left:
            daemon.cutter.move(Kind.LEFT, left)
        if chunk.taken:
            daemon.cutter.move(Kind.TAKEN, chunk.taken)
        taken = {(run.stream, run.partition) for run in chunk.taken}
        self._taken |= taken
        self._back = (self._back | set(chunk.assigned)) - taken
        daemon.cutter.assigned(chunk.assigned, chunk.seen)
        if chunk.seen:
            self._rebuilding = True
            records = sum(run.end - run.first for run in chunk.taken)
            log.info("rebuilding_joins", partitions=len(chunk.seen), records=records)

    def _theirs(self, partitions: Iterable[Partition]) -> set[Partition]:
        """Those of the partitions that are shared and not ours."""
        readers = self._daemon.readers
        shared = {stream for reader in readers if reader.shared for stream in reader.streams}
        own = {partition for reader in readers for partition in reader.partitions}
        return {p for p in partitions if p[0] in shared and p not in own}

    @property
    def rebuilding(self) -> tuple[int, int]:
        """Partitions whose waiting joins are being made anew, and records that this still takes."""
        until = dict(self._daemon.cutter.rebuilding)
        positions = self._daemon.runner.positions
        return len(until), sum(max(0, end - positions.get(partition, end)) for partition, end in until.items())

    async def take_stock(self) -> None:
        """After partitions came: let go of a replay that is about those of others. To be called between two batches.

        Of those that came back and go on, what was out and could not be committed is committed now.
        """
        self.moved = False
        back, self._back = self._back, set()
        if back and not self._daemon.writer.transactional:
            await self._daemon.on_model(self._daemon.writer.put, self._daemon.runner.covered(back))
        awaited = self._daemon.cutter.awaited()
        theirs = (self._theirs(awaited) | self._taken) & awaited
        self._taken.clear()
        if theirs:
            names = ", ".join(f"{stream}-{number}" for stream, number in sorted(theirs))
            await self.abandon_replay(f"others read {names} now, or have since")

    def look(self) -> None:
        """Say so once everything is rebuilt."""
        if self._rebuilding and not self._daemon.cutter.rebuilding:
            self._rebuilding = False
            log.info("joins_rebuilt", waiting=self._daemon.core.joins.pending)

    async def abandon_replay(self, why: str, deadline: float = math.inf) -> None:
        """Go on from here, where the rest of the journal cannot be repeated. To be called between two batches."""
        daemon, keeper = self._daemon, self._daemon.runner.keeper
        log.warning("replay_abandoned", batches=daemon.cutter.replaying, reason=why)
        daemon.cutter.abandon()
        await daemon.on_model(keeper.journal.discard_after, keeper.sequence)
        await daemon.settle(deadline)

    async def revoked(self, partitions: Sequence[Partition], lost: bool, within: float = math.inf) -> Standing | None:
        """Finish with partitions that go: what is cut of them is applied, answered and in a checkpoint.

        Args:
            partitions: Which.
            lost: Whether others have them already, so that nothing may be committed.
            within: Seconds there are for it.

        Returns:
            Where each of them is to be read on, should it come straight back; None where that is at what was committed
            last, since answers behind it will be visible to nobody. Others begin there in any case.

        Raises:
            StreamUnavailableError: The writer ended before everything was out.
        """
        daemon, deadline = self._daemon, CLOCK.monotonic() + within
        if lost:
            daemon.writer.lose(partitions)
        self._back.difference_update(partitions)
        daemon.cutter.revoked(partitions)
        standing, closed = None, False
        with anyio.move_on_after(within):
            await daemon.turn.acquire()
            try:
                standing = await self._finish(partitions, lost, deadline)
                closed = standing is not None and not lost
            finally:
                daemon.turn.release()
        if not closed:
            if not lost:
                daemon.writer.lose(partitions)
            daemon.beside(self._close, partitions)
        daemon.metrics.revoked(partitions)
        if standing is None:
            log.error("partitions_given_up", partitions=len(partitions), seconds=round(within, 1))
        else:
            log.info("partitions_lost" if lost else "partitions_revoked", partitions=len(partitions))
        if not closed and daemon.writer.transactional:
            return None  # those answers are visible to nobody; where a partition comes back they are due
        return standing if standing is not None else self._unfinished(partitions)

    def _unfinished(self, partitions: Sequence[Partition]) -> Standing:
        """Where partitions will have been brought to once the batches under way are applied, whose answers go out."""
        daemon, own = self._daemon, set(partitions)
        positions, taken = dict(daemon.runner.positions), dict(daemon.runner.taken)
        _follow((*daemon.under_way, *daemon.cutter.moves), positions, taken)
        return Standing(
            {p: at for p, at in positions.items() if p in own},
            {p: at for p, at in taken.items() if p in own},
            due=False,
        )

    async def _finish(self, partitions: Sequence[Partition], lost: bool, deadline: float) -> Standing | None:
        daemon, runner = self._daemon, self._daemon.runner
        moves = daemon.cutter.take_moves()
        with anyio.CancelScope(shield=True):  # what has begun to change is changed to the end
            if moves:
                await daemon.on_model(runner.apply, moves)
            if not lost and not await daemon.flush(deadline - CLOCK.monotonic()):
                return None
            positions = {p: runner.positions[p] for p in partitions if p in runner.positions}
            taken = {p: runner.taken[p] for p in partitions if p in runner.taken}
            waiting = daemon.core.joins.pending > 0 or daemon.core.joins.early > 0
            due = not daemon.writer.transactional
            standing = Standing(positions, taken, runner.floors.of(positions, waiting=waiting), due)
            if not lost:  # the queue is empty
                await daemon.on_model(daemon.writer.put, Outgoing(gone=partitions))
            if daemon.cutter.awaited() & set(partitions):
                await self.abandon_replay("its partitions were given to others", deadline)
            elif not await daemon.settle(deadline):
                log.warning("checkpoint_postponed", reason="there was no time for it before partitions had to go")
        return standing

    async def _close(self, partitions: Sequence[Partition]) -> None:
        """Have the writer know where the last answer of partitions was that were lost or given up.

        It comes behind every batch with records of them, and before what comes of them should they be given back: that
        is cut in a later turn, and turns are taken in the order in which they were asked for.
        """
        async with self._daemon.turn:
            await self._daemon.on_model(self._daemon.writer.put, Outgoing(gone=partitions, lost=True))


def _follow(cuts: Iterable[Cut], positions: Positions, taken: Positions) -> None:
    """Bring positions to where they are behind cuts, of which some may be applied already."""
    for cut in cuts:
        for run in cut.runs:
            partition = run.stream, run.partition
            if cut.kind in MOVES:
                positions.pop(partition, None)
                taken.pop(partition, None)
            if cut.kind is Kind.TAKEN:
                positions[partition], taken[partition] = run.first, run.end
            elif cut.kind is not Kind.LEFT:
                positions[partition] = run.end


async def happens(event: anyio.Event, deadline: float) -> bool:
    """Wait for an event until the monotonic clock shows ``deadline``; whether it came."""
    with anyio.move_on_after(deadline - CLOCK.monotonic()):
        await event.wait()
    return event.is_set()
