"""Answers and offsets in one step, through either client: transactions of a group's member, each call under a deadline.

Calls of a producer may wait for the cluster without end, whatever they are told. Each runs in a thread of its own here;
past its deadline the producer is given up, and what the thread still waits for is of no account.

Making a producer with the same transactional id ends whatever the one before left open: a transaction whose commit had
begun is completed, any other is aborted, and the cluster takes nothing more from the old producer. So there is one
answer to every failure and to every start: a new producer, then the committed offsets as they are now.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

from streams.base import Partition, Positions, StreamError, StreamUnavailableError
from streams.group_commits import Noted
from streams.kafka_note import Note
from streams.seams import failpoint
from streams.shared_producer import SharedProducer


class GroupTransactions(ABC):
    """Commits what the sinks of one client sent together with offsets; implements `streams.base.Transactions`."""

    _failures: type[Exception] = Exception
    """What the producer raises for a transaction that failed."""
    _grace = 0.0
    """Seconds past a deadline in which the client may itself say that the time is over."""

    def __init__(
        self,
        client: SharedProducer[Any],
        group: str,
        owner: str,
        metadata: Callable[[], Any],
        topics: Collection[str] = (),
    ) -> None:
        """Prepare; nothing is connected before `open`.

        Args:
            client: The producer of all sinks, made with a transactional id.
            group: Whose offsets are committed.
            owner: Our name in the group, the same in every life.
            metadata: Gives the group's metadata of our consumer, with its ``member_id``; None while it has none. With
                them the cluster refuses offsets of a member that its group has missed.
            topics: Whose committed offsets `open` returns.
        """
        self._client = client
        self._group = group
        self._owner = owner
        self._metadata = metadata
        self._topics = topics
        self._open = False
        self._member: Any = None
        self._attempted: tuple[Partition, ...] = ()

    def open(self) -> Positions:
        """End what an earlier life left open, shut it out, and return the committed offsets of the topics.

        Raises:
            StreamUnavailableError: No broker answers, or another member's offsets are about to change; call it again.
            StreamError: The cluster refuses us.
        """
        if not self._open:
            self._client.acquire()
            self._open = True
        self._initialise(self._client.renew())
        return self._committed(None)

    def begin(self) -> None:
        """Start a transaction, as the member of the group that we are now. Raises as `commit` does."""
        # Before anything is sent: should partitions go to others meanwhile, these metadata are too old to commit.
        self._member = self._metadata()
        if not self._joined:
            raise StreamUnavailableError(f"this process has not joined group {self._group}")
        try:
            self._producer.begin_transaction()  # asks nobody
        except self._failures as error:
            raise self._client.failure(error, "beginning a transaction") from error
        failpoint("transaction.begun")

    def commit(
        self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None, timeout: float
    ) -> None:
        """Commit what was sent since `begin`, and the offsets; each of two calls may take ``timeout`` seconds.

        Raises:
            StreamUnavailableError: It is not known to have happened; `recover` is next.
            StreamError: The cluster does not permit it.
        """
        floors = floors or {}
        noted = {p: (end, Note(self._owner, floors.get(p)).pack()) for p, end in positions.items()}
        producer = self._producer
        if noted:
            self._within(timeout, producer.send_offsets_to_transaction, *self._offsets(noted))
        failpoint("transaction.offsets")
        self._attempted = tuple(positions)
        self._within(timeout, producer.commit_transaction)
        failpoint("transaction.committed")
        self._attempted = ()

    def recover(self) -> Positions:
        """Start over with a new producer; return the committed offsets of what the last `commit` was about.

        Raises:
            StreamUnavailableError: No broker answers; call it again.
            StreamError: Another process has taken our place, or the cluster refuses us.
        """
        self._refuse_if_replaced()
        self._initialise(self._client.renew())
        positions = self._committed(self._attempted) if self._attempted else {}
        self._attempted = ()
        return positions

    def close(self) -> None:
        """Give the producer back. What is not committed is left to be aborted. Safe to call twice."""
        if self._open:
            self._open = False
            self._client.release(0)

    @property
    def _producer(self) -> Any:
        producer = self._client.producer
        if producer is None:
            raise StreamUnavailableError("the producer was given up")
        return producer

    def _initialise(self, producer: Any) -> None:
        self._within(self._client.settings.timeout, producer.init_transactions)

    @property
    def _joined(self) -> bool:
        """Whether the group knows us, as far as `begin` was told, and we know what we hold in it."""
        return self._member is not None and bool(self._member.member_id)

    @abstractmethod
    def _offsets(self, noted: Noted) -> tuple[Any, Any]:
        """Offsets, and who commits them, as the producer takes them."""

    @abstractmethod
    def _refuse_if_replaced(self) -> None:
        """Ask the group who goes by our name. A producer of ours would shut out that of whoever does.

        Raises:
            StreamError: Another process does. Were we to start over, it would do the same, and so on.
            StreamUnavailableError: Another process does, or we do ourselves and have not heard of it yet.
        """

    def _replaced(self) -> StreamError:
        return StreamError(
            f"another process writes as {self._client.transactional_id}: its state directory is a copy of this one,"
            " so this process stops. Remove the file 'member' from the copy and start it again"
        )

    @abstractmethod
    def _committed(self, partitions: Collection[Partition] | None) -> Positions:
        """The committed offsets of partitions, or of all topics; never one that a transaction may yet change."""

    def _within(self, timeout: float, call: Callable[..., object], *arguments: Any) -> None:
        """Make a call of the producer that may never return."""
        raised: list[Exception] = []

        def run() -> None:
            try:
                call(*arguments)
            except Exception as error:  # noqa: BLE001  # it is raised below
                raised.append(error)

        thread = threading.Thread(target=run, name="kafka-transaction", daemon=True)
        thread.start()
        thread.join(timeout + self._grace)
        what = f"transaction of {self._client.transactional_id}"
        if thread.is_alive():
            raise StreamUnavailableError(f"{what}: no answer from the cluster within {timeout:g} s")
        for error in raised:
            if not isinstance(error, self._failures):
                raise error
            raise self._client.failure(error, what) from error
