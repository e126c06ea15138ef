"""What the join store does when a partition goes to another process or comes from one.

What waits of a partition follows it: it is dropped where the partition goes, and made again where it comes, from the
records that its former owner had taken in before ("seen before"). Those are told in two calls, events first: whatever
meets among them met at the former owner, who counted it and learned from it, so here it is settled in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from streams.join_format import Early, FeedbackLike, Joined, Waiting
from streams.join_pack import WaitingRows
from streams.join_rows import Rows
from streams.join_settled import How, Settled

if TYPE_CHECKING:
    from streams.join_spill import Row, Spill


class Moves:
    """The part of `streams.join.JoinStore` that knows of moving partitions."""

    counts: dict[str, int]
    _window: float
    _limit: float
    _waiting: Rows
    _early: dict[str, Early]
    _settled: Settled
    _spill: Spill | None

    def drop(self, data: Collection[int], feedback: Collection[int]) -> int:
        """Forget what waits of some partitions, as somebody else will make it again, and count it ``moved``.

        Args:
            data: Numbers of the partitions whose events are dropped.
            feedback: Numbers of the partitions whose early feedback is dropped.

        Returns:
            How many events and feedback that was.
        """
        gone = self._waiting.take_of(data)
        early = [name for name, fields in self._early.items() if fields[3] in feedback]
        for name in early:
            self._pop_early(name)
        count = len(gone) + len(early)
        if self._spill is not None and self._spill.count:
            count += sum(1 for number in sorted(data) for _ in self._spill.take_partition(number))
        self.counts["moved"] += count
        return count

    def seen(self, items: Sequence[Waiting], watermark: float) -> list[Joined]:
        """Let events wait that somebody else has answered.

        Args:
            items: The events, in order. One that is too old, or known already, changes nothing.
            watermark: How far event time has come, seconds; a smaller one than before changes nothing.

        Returns:
            The events whose feedback came here, and to nobody before, in order.
        """
        self._advance(watermark)
        joined: list[Joined] = []
        kept: dict[str, Waiting] = {}
        on_disk = self._on_disk([item.id for item in items])
        how = self._settled.how
        for item in items:
            name = item[0]
            if name in kept or name in self._waiting or name in on_disk:
                continue
            if name in how:
                if how[name] is How.INLINE:
                    how[name] = How.JOINED
            elif name in self._early and self._early[name][4]:
                self._pop_early(name)
                self._settled.add(name, How.JOINED)
            elif name in self._early and self._meet(item, joined):
                continue
            elif item[2] < self._limit:
                self._settled.add(name, How.GONE)
            else:
                kept[name] = item
        self._waiting.extend(WaitingRows.of(list(kept.values())))
        self._keep_bounds()
        return joined

    def seen_feedback(self, items: Sequence[FeedbackLike], watermark: float) -> None:
        """Settle events with feedback that somebody else has had already; nothing is counted.

        Args:
            items: The feedback, in order. What meets no event waits for it.
            watermark: How far event time has come, seconds; a smaller one than before changes nothing.
        """
        self._advance(watermark)
        rows: dict[str, Row] = {}
        if self._spill is not None and self._spill.count:
            rows = self._spill.find([item.id for item in items if item.id not in self._waiting])
        removed: list[tuple[int, int]] = []
        for item in items:
            name = item.id
            fields = rows[name].fields if name in rows else self._waiting.get(name)
            if fields is None:
                self._unmatched_before(item)
            elif item.time - fields[1] <= self._window:
                if name in rows:
                    row = rows.pop(name)
                    removed.append((row.seq, row.cost))
                else:
                    self._waiting.remove(name, fields)
                self._settled.add(name, How.JOINED)
        if removed and self._spill is not None:
            self._spill.remove(removed)
        self._keep_bounds()

    def _unmatched_before(self, item: FeedbackLike) -> None:
        if item.id in self._settled.how or item.id in self._early:
            return
        if item.inputs is not None:
            self._settled.add(item.id, How.INLINE)
        elif item.time >= self._limit:
            self._keep_early(item, seen=True)

    def _on_disk(self, ids: Sequence[str]) -> set[str]:
        """Which of these events wait on disk."""
        if self._spill is None or not self._spill.count:
            return set()
        return self._spill.holds(ids)

    # -- what the rest of the store gives -----------------------------------------------------------------------

    def _advance(self, watermark: float) -> None:
        raise NotImplementedError

    def _keep_bounds(self) -> None:
        raise NotImplementedError

    def _meet(self, item: Waiting, joined: list[Joined]) -> bool:
        raise NotImplementedError

    def _pop_early(self, name: str) -> Early:
        raise NotImplementedError

    def _keep_early(self, item: FeedbackLike, *, seen: bool) -> None:
        raise NotImplementedError
