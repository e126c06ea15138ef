"""The promises between the engine and the outside: records, positions, sources and sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

Partition = tuple[str, int]
"""A partition of a named stream: ``(stream, number)``."""

Positions = dict[Partition, int]
"""The next offset to read, by partition."""

Headers = tuple[tuple[str, bytes], ...]


class StreamError(Exception):
    """A stream cannot be used; the message names it and says what to do. Retrying does not help."""


class StreamUnavailableError(StreamError):
    """The other side does not answer at present; the caller retries with backoff."""


class RefusedStreamError(StreamError):
    """This stream does not exist or may not be used; the side that it is on does answer, so others can be asked for."""


class RefusedMessageError(StreamError):
    """A message that was given just now can never be written; none of those given with it was taken."""


class Record(NamedTuple):
    """What a stream carries."""

    stream: str
    partition: int
    offset: int
    """Position of this record inside its partition; offsets increase and may have gaps."""
    end: int
    """Position after this record: where reading goes on."""
    timestamp: float
    """Seconds since the epoch as the stream recorded it; NaN where the stream has none."""
    key: bytes | None
    value: bytes
    headers: Headers = ()

    @property
    def id(self) -> str:
        """The deterministic id ``stream-partition-offset``."""
        return f"{self.stream}-{self.partition}-{self.offset}"


class Message(NamedTuple):
    """What goes to a sink."""

    key: bytes | None
    value: bytes
    headers: Headers = ()


class Found(NamedTuple):
    """What a source knows of a partition that it was given."""

    earliest: int = 0
    """The first offset that is still there."""
    committed: int | None = None
    """Everything before this offset is answered; None where nobody has committed yet."""
    theirs: bool = False
    """Whether another member of the group committed that, so that it outranks what we remember."""
    floor: int | None = None
    """From where its records make up everything that waited for feedback when that was committed; None: not said."""


class Assignment(Protocol):
    """What a source asks and tells while partitions come and go. Called on the thread that polls."""

    def assigned(self, found: Mapping[Partition, Found]) -> Positions:
        """Return where to start; an absent partition starts where it was committed, else at its beginning.

        Where partitions are shared this ends every change of hands, also one that leaves us none (``found`` is empty).
        """
        ...

    def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> None:
        """Finish with the partitions. ``lost`` means that they belong to somebody else already: commit nothing."""
        ...


class Source(Protocol):
    """Reads records of one or more streams through one client.

    A source is used by one thread at a time. Offsets of a partition come in increasing order; nothing is
    promised about the order between partitions.
    """

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that this source reads."""
        ...

    @property
    def bounded(self) -> bool:
        """Whether the source ends by itself (a file read to its end)."""
        ...

    @property
    def shared(self) -> bool:
        """Whether partitions are shared with other processes, so that they come and go."""
        ...

    @property
    def trouble(self) -> str:
        """What keeps records from coming at present, in words; empty while nothing is known of any trouble."""
        ...

    def open(self, assignment: Assignment) -> None:
        """Connect and take partitions.

        Raises:
            StreamUnavailableError: The other side does not answer; `open` may be called again.
            StreamError: The stream does not exist or cannot be read.
        """
        ...

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return up to ``max_records`` records; wait ``timeout`` seconds for the first. Keeps the client alive."""
        ...

    def ended(self) -> frozenset[Partition]:
        """Partitions of bounded streams that have been read to their end; every record of them has been given."""
        ...

    def pause(self, streams: Sequence[str]) -> None:
        """Give no more records of these streams until `resume`; `poll` goes on and keeps the client alive."""
        ...

    def resume(self, streams: Sequence[str]) -> None:
        """Give records of these streams again."""
        ...

    def commit(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        """Remember that everything before these positions is answered. Advisory: a checkpoint outranks it.

        ``floors`` are kept beside them for whoever is given a partition next; see `Found.floor`.
        """
        ...

    def committed(self) -> Positions:
        """The positions last committed, as far as known, for the partitions now assigned."""
        ...

    def position(self, partition: Partition) -> int | None:
        """Where `poll` reads on, past whatever gives no record; None for a partition that is not ours."""
        ...

    def identities(self) -> dict[str, str]:
        """What tells each stream from another of the same name (a topic that was made anew), where that is known."""
        ...

    def beginnings(self) -> Positions:
        """The first offset still there of each partition now assigned; empty where nothing goes, or it is not known.

        Asks the other side, for two seconds at most.
        """
        ...

    def lag(self) -> dict[Partition, int]:
        """Records (bytes, for files) between the position of `poll` and the end of each partition, if known."""
        ...

    def close(self) -> None:
        """Leave. Safe to call twice and before `open`."""
        ...


class Sink(Protocol):
    """Writes messages. Used by one thread at a time."""

    @property
    def name(self) -> str:
        """The stream written to."""
        ...

    def open(self) -> None:
        """Connect. Raises as `Source.open` does."""
        ...

    def send(self, messages: Sequence[Message]) -> None:
        """Accept messages in order; they may rest in a buffer until `flush`. Blocks while a full buffer drains.

        Raises:
            StreamUnavailableError: Nothing could be handed over within the sink's own time limit; none was taken.
            RefusedMessageError: One of them cannot ever be written (too large); none was taken.
            StreamError: One that was sent earlier could not be written.
        """
        ...

    def flush(self, timeout: float) -> None:
        """Return once everything sent is durable on the other side.

        Raises:
            StreamUnavailableError: That did not happen within ``timeout`` seconds.
        """
        ...

    def close(self) -> None:
        """Flush what is left, as far as possible, and leave. Safe to call twice."""
        ...


class Transactions(Protocol):
    """Makes what the sinks of one client send visible together with positions, or not at all.

    Opened after those sinks, which say how large its batches may be. Used by the thread of the sinks. Between `begin`
    and `commit` whatever those sinks send is hidden from readers that ask for committed records only.
    """

    def open(self) -> Positions:
        """End what an earlier life left open, shut that life out, and return the positions that are committed.

        Raises:
            StreamUnavailableError: The other side does not answer; may be called again.
            StreamError: We may not do this here.
        """
        ...

    def begin(self) -> None:
        """Start a transaction. Raises as `commit` does."""
        ...

    def commit(
        self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None, timeout: float
    ) -> None:
        """Make everything sent since `begin` visible, and the positions committed, in one step.

        Raises:
            StreamUnavailableError: It is not known to have happened. Call `recover` next, nothing else.
            StreamError: Another process has taken our place, or it can never happen.
        """
        ...

    def recover(self) -> Positions:
        """After a failure of anything in a transaction: start over and return the positions that are committed.

        What was sent behind them is gone and is to be sent again. Raises as `open` does.
        """
        ...

    def close(self) -> None:
        """Leave; what is not committed never becomes visible. Safe to call twice and before `open`."""
        ...
