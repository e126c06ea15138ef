"""What we remember of partitions, and whether our own work on one goes on when it is given to us."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import structlog

from streams.base import Found, Partition, Positions, StreamError

log = structlog.get_logger("adaptd")


@dataclass(frozen=True, slots=True)
class Standing:
    """Where partitions that go have been brought to."""

    positions: Positions = field(default_factory=dict)
    taken: Positions = field(default_factory=dict)
    """Positions up to which others had worked when the partitions came."""
    floors: Positions = field(default_factory=dict)
    due: bool = True
    """Whether that is to be committed: not where it is already, with the answers, nor where they may not be out."""

    @property
    def done(self) -> Positions:
        """The positions that are to be committed: we got beyond where others had been."""
        return {p: at for p, at in self.positions.items() if at > self.taken.get(p, -1)} if self.due else {}


class Begin(NamedTuple):
    """How a partition that came is read."""

    start: int
    seen: int
    """What lies between ``start`` and here was seen before, by others or by us."""
    anew: bool
    """Whether nothing that we remember of the partition counts any more."""


class Holdings:
    """Positions that we remember: of the state directory, and of partitions that have just gone. Used by one thread.

    Args:
        start: Positions to start from.
        taken: Of the partitions in ``start`` that came from others, the position up to which these had worked.
        exact: Whether nothing behind a committed position can be out, since answers are committed together with it.
    """

    def __init__(self, start: Positions, taken: Positions, *, exact: bool = False) -> None:
        self._exact = exact
        self.start = dict(start)
        self._taken = dict(taken)
        self._parked: Positions = {}
        self._once: Positions = {}
        """What an earlier life had reached of partitions that this one was not given at first."""
        self._known: Positions = {}
        """What was committed when a partition came last: by an earlier life of ours it may be more than we have."""

    def check(self, found: Mapping[Partition, Found]) -> None:
        """Refuse partitions that are given to us while the group does not know any more what is answered of them.

        Raises:
            StreamError: Answers are committed together with positions, we have worked on one of these partitions, and
                no position of it is committed.
        """
        reached = {p: self._reached(p, at.earliest) for p, at in sorted(found.items()) if at.committed is None}
        lost = {p: at for p, at in reached.items() if at > found[p].earliest}
        if self._exact and lost:
            told = ", ".join(f"{stream}-{number}" for stream, number in lost)
            commands = ", ".join(f"{stream}:{number} to {at}" for (stream, number), at in lost.items())
            raise StreamError(
                f"the group has no offset of {told} any more, though the state directory has worked on it: offsets were"
                " deleted, or expired, or the group is another one. With delivery: exactly_once they alone say what is"
                f" answered. Either set them back ({commands} is what the state covers, and all there is after a clean"
                " stop; after a crash use the offset behind the last answer, as its header adaptd-id tells it), or"
                " start anew with --fresh, which answers everything again from the first record that is left"
            )

    def _reached(self, partition: Partition, otherwise: int) -> int:
        """The furthest position that we remember of a partition."""
        remembered = self.start, self._parked, self._once
        return max(positions.get(partition, otherwise) for positions in remembered)

    def begin_all(self, found: Mapping[Partition, Found]) -> dict[Partition, Begin]:
        """Decide it for all partitions that came, as `begin` does.

        Partitions of one number hold events and their labels. Where others have worked on one of them, they have joined
        what waited of all, so none of that number goes on.
        """
        begins = {partition: self.begin(partition, at) for partition, at in found.items()}
        theirs = {partition[1] for partition, begin in begins.items() if begin.anew and found[partition].theirs}
        for partition, begin in begins.items():
            if not begin.anew and partition[1] in theirs:
                begins[partition] = self._anew(partition, found[partition], begin.start)
        return begins

    def begin(self, partition: Partition, found: Found) -> Begin:
        """Decide where to read a partition, by what we remember and by what the source found.

        Our own work goes on unless somebody else has committed since. Else everything before the committed position is
        theirs, and reading begins at the floor that they noted beside it.
        """
        if self._exact:
            self._distrust(partition, found)
        stands = self._stands(partition, found)
        self._known[partition] = found.committed or 0
        if stands:
            start = self.start[partition]
            return Begin(start, max(start, self._taken.get(partition, start)), anew=False)
        return self._anew(partition, found, self._once.pop(partition, 0))

    def _anew(self, partition: Partition, found: Found, reached: int) -> Begin:
        """Begin a partition at its floor; what we had ``reached`` of it counts as seen unless others went on."""
        self.start.pop(partition, None)
        start, end = _floor(partition, found)
        if not found.theirs:
            end = max(end, reached)  # a life that was killed may have applied more than it had committed
        self._taken[partition] = end
        return Begin(start, end, anew=True)

    def _distrust(self, partition: Partition, found: Found) -> None:
        """Forget a position that we had reached in a transaction that was lost: nobody has seen those answers."""
        out = found.earliest if found.committed is None else found.committed
        if self._reached(partition, out) > out:
            for remembered in (self.start, self._parked, self._taken, self._once):
                remembered.pop(partition, None)

    def _stands(self, partition: Partition, found: Found) -> bool:
        taken, parked = self._taken.get(partition), self._parked.pop(partition, None)
        if parked is not None:
            self.start[partition] = parked
            # Nobody but others can have committed more than we had applied and than we had found.
            if (found.committed or 0) > max(parked, taken or 0, self._known.get(partition, 0)):
                return False
        return partition in self.start and (not found.theirs or (taken is not None and found.committed == taken))

    def settle(self, ours: Collection[Partition]) -> None:
        """Have no partition go on that is not ours now: what waits of it is dropped.

        That is also so for one that an earlier life has worked on and this one was not given.
        """
        for partition in self._parked:
            self._taken.pop(partition, None)
        self._parked.clear()
        for partition in self.start.keys() - set(ours):
            self._once[partition] = self.start.pop(partition)
            self._taken.pop(partition, None)

    def leave(self, partition: Partition, standing: Standing | None) -> None:
        """Let a partition go; without a standing nothing of it is remembered."""
        self.start.pop(partition, None)
        self._taken.pop(partition, None)
        if standing is not None and partition in standing.positions:
            self._parked[partition] = standing.positions[partition]
            if partition in standing.taken:
                self._taken[partition] = standing.taken[partition]


def seen_before(begins: Mapping[Partition, Begin]) -> Positions:
    """Of the partitions to rebuild, the position before which everything was seen before.

    Partitions of one number hold events and their labels. So where one of them is rebuilt all are, be there nothing to
    read: what is new of any of them waits until the rest is complete.
    """
    numbers = {partition[1] for partition, begin in begins.items() if begin.start < begin.seen}
    return {partition: begin.seen for partition, begin in begins.items() if partition[1] in numbers}


def _floor(partition: Partition, found: Found) -> tuple[int, int]:
    """From where a partition is read that others have worked on, or nobody has, and up to where they have."""
    if found.committed is None:
        return found.earliest, found.earliest
    if found.floor is None or found.committed < found.earliest:
        return found.committed, found.committed
    if found.floor < found.earliest:
        log.warning(
            "joins_not_rebuilt",
            partition=f"{partition[0]}-{partition[1]}",
            offsets=[found.floor, found.earliest],
            reason="the stream does not hold these records any more; what waited of them finds no feedback",
        )
    return min(max(found.floor, found.earliest), found.committed), found.committed
