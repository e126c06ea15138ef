"""The outbox: sends answers and dead letters in transactions, and keeps them until they are committed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog

from engine.metrics import Metrics
from streams.base import (
    Message,
    Partition,
    Positions,
    Record,
    RefusedMessageError,
    Sink,
    StreamUnavailableError,
    Transactions,
)

MAX_MESSAGES = 4096
MAX_BYTES = 16_000_000
"""What may be kept; a commit is due where it is more."""
COMMIT_SECONDS = 10.0
"""Time after which a transaction that does not come to its end is given up and made again."""

TRANSACTION = "transaction"
"""What a retry is about that concerns every sink."""

log = structlog.get_logger("adaptd")

Retry = Callable[[str, Callable[[], None]], None]
"""Does an action again, with backoff, for as long as it is unavailable; the first argument says what it is about."""


class _Kept(NamedTuple):
    sink: Sink
    message: Message
    record: Record


class Outbox:
    """Sends in transactions. Used by the writer's thread, but for `lose`.

    Whatever fails, the transaction is made again from what is kept: minus what turns out to be committed, and minus
    what came from partitions that are lost.

    Args:
        transactions: What makes messages and positions visible together.
        sinks: All that are written to.
        retry: How to try again.
    """

    def __init__(self, transactions: Transactions, sinks: Sequence[Sink], retry: Retry) -> None:
        self._transactions = transactions
        self._sinks = sinks
        self._retry = retry
        self._kept: list[_Kept] = []
        self._bytes = 0
        self._sent = 0
        self._begun = False
        self._broken = False
        self._positions: Positions = {}
        self._floors: dict[Partition, int] = {}
        self._lost: Counter[Partition] = Counter()
        self._lock = threading.Lock()

    @property
    def full(self) -> bool:
        """Whether so much is kept that a commit is due."""
        return len(self._kept) >= MAX_MESSAGES or self._bytes >= MAX_BYTES

    def lose(self, partitions: Sequence[Partition]) -> None:
        """Send nothing more of these partitions until `found`; from any thread, before the group is joined again.

        A transaction that was begun before is one of a member that the group has missed, and is refused; one that is
        begun later leaves them out. So nothing is committed of a partition that is somebody else's.
        """
        with self._lock:
            self._lost.update(partitions)

    def found(self, partitions: Sequence[Partition]) -> None:
        """Everything before the loss has come by: what comes of these partitions from now on is ours again."""
        if self._holds_lost():  # dropped while it still counts as lost
            self._retry(TRANSACTION, self._push)
        with self._lock:
            self._lost.subtract(partitions)
            self._lost = +self._lost

    def lost(self, partition: Partition) -> bool:
        """Whether what comes of a partition is to be left out."""
        return partition in self._lost

    def send(self, sink: Sink, messages: Sequence[Message], records: Sequence[Record]) -> None:
        """Send messages, each made of a record, in the transaction under way; one is begun if there is none.

        Raises:
            RefusedMessageError: A message cannot be written; none of them is kept.
            StreamError: Another process has taken our place, or the cluster refuses what was sent.
        """
        fresh = [_Kept(sink, message, record) for message, record in zip(messages, records, strict=True)]
        if self._lost:
            fresh = [kept for kept in fresh if not self.lost((kept.record.stream, kept.record.partition))]
        self._kept += fresh
        self._bytes += _size(fresh)
        try:
            self._retry(sink.name, self._push)
        except RefusedMessageError:  # a sink takes all of its messages or none
            refused = {id(kept) for kept in fresh}
            self._kept = [kept for kept in self._kept if id(kept) not in refused]
            self._bytes = _size(self._kept)
            raise

    def reach(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None) -> None:
        """Have positions committed with the next `commit`."""
        self._positions.update({p: at for p, at in positions.items() if not self.lost(p)})
        if floors:
            self._floors.update(floors)

    def forget(self, partitions: Sequence[Partition]) -> None:
        """Leave partitions to whoever reads them now; nothing of them may be kept, or it is lost."""
        for partition in partitions:
            self._positions.pop(partition, None)
            self._floors.pop(partition, None)

    def commit(self) -> None:
        """Make everything that was sent visible, together with the positions."""
        self._retry(TRANSACTION, self._commit)

    def _commit(self) -> None:
        self._push()
        if self._positions:  # nothing is committed without offsets: the group could not refuse that
            self._unless_unavailable(self._finish)

    def _finish(self) -> None:
        if not self._begun:
            self._begin()
        if not self._positions:
            return
        for sink in self._sinks:
            sink.flush(COMMIT_SECONDS)
        floors = {p: at for p, at in self._floors.items() if p in self._positions}
        self._transactions.commit(self._positions, floors or None, COMMIT_SECONDS)
        self._kept.clear()
        self._positions.clear()
        self._floors.clear()
        self._bytes = self._sent = 0
        self._begun = False

    def _push(self) -> None:
        """Bring the other side to where we are: everything kept is sent in a transaction."""
        self._unless_unavailable(self._send_kept)

    def _unless_unavailable(self, action: Callable[[], None]) -> None:
        try:
            action()
        except StreamUnavailableError as error:
            if not self._broken:
                log.warning("transaction_failed", error=str(error), messages=len(self._kept))
            self._broken = True
            raise

    def _send_kept(self) -> None:
        if self._broken or self._holds_lost():
            self._recover()
        if self._kept and not self._begun:
            self._begin()
        while self._sent < len(self._kept):
            sink = self._kept[self._sent].sink
            end = self._sent
            while end < len(self._kept) and self._kept[end].sink is sink:
                end += 1
            sink.send([kept.message for kept in self._kept[self._sent : end]])
            self._sent = end

    def _begin(self) -> None:
        self._transactions.begin()
        self._begun = True
        self._drop({})  # what was lost while the group was joined again
        if not self._kept and not self._positions:
            self._broken = True  # what comes next may be of partitions that this member of the group never had

    def _holds_lost(self) -> bool:
        if not self._lost:
            return False
        mine = {(kept.record.stream, kept.record.partition) for kept in self._kept}
        return any(partition in self._lost for partition in (*mine, *self._positions))

    def _recover(self) -> None:
        covered = self._transactions.recover()
        self._begun = self._broken = False
        self._sent = 0
        kept = len(self._kept)
        self._drop(covered)
        log.info("transaction_again", messages=len(self._kept), dropped=kept - len(self._kept))

    def _drop(self, covered: Mapping[Partition, int]) -> None:
        """Keep no more what is committed, nor what is lost."""

        def gone(partition: Partition, end: int) -> bool:
            return end <= covered.get(partition, 0) or self.lost(partition)

        self._kept = [
            kept for kept in self._kept if not gone((kept.record.stream, kept.record.partition), kept.record.end)
        ]
        self._positions = {p: at for p, at in self._positions.items() if not gone(p, at)}
        self._bytes = _size(self._kept)


class CountedTransactions:
    """Counts how transactions end; implements `streams.base.Transactions` by handing everything on.

    Args:
        transactions: What makes them.
        metrics: Where to count.
    """

    def __init__(self, transactions: Transactions, metrics: Metrics) -> None:
        self._transactions = transactions
        self._metrics = metrics
        self._begun = False

    def open(self) -> Positions:
        """See `streams.base.Transactions.open`."""
        return self._transactions.open()

    def begin(self) -> None:
        """See `streams.base.Transactions.begin`."""
        self._transactions.begin()
        self._begun = True

    def commit(
        self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None, timeout: float
    ) -> None:
        """See `streams.base.Transactions.commit`."""
        started = time.perf_counter()
        self._transactions.commit(positions, floors, timeout)
        self._begun = False
        self._metrics.transaction_committed(time.perf_counter() - started)

    def recover(self) -> Positions:
        """See `streams.base.Transactions.recover`."""
        if self._begun:  # once, however often this is called until it gets through
            self._begun = False
            self._metrics.transaction_given_up()
        return self._transactions.recover()

    def close(self) -> None:
        """See `streams.base.Transactions.close`."""
        self._transactions.close()


def _size(kept: Sequence[_Kept]) -> int:
    return sum(len(one.message.value) for one in kept)
