"""Streams in memory, for tests and for programs that embed the engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

from streams.base import Assignment, Found, Headers, Message, Partition, Positions, Record, StreamError
from streams.seams import CLOCK


class MemorySource:
    """Gives the records that are appended to it, from any thread.

    Offsets count records. Records are kept until `trim`, so that reading can begin again at an older position.
    Closing and opening again goes on as a restarted client would.

    Args:
        streams: Number of partitions of each stream by name.
        bounded: The streams end once everything there is has been read; otherwise only after `finish`.
    """

    def __init__(self, streams: Mapping[str, int], *, bounded: bool = True) -> None:
        self._partitions: dict[Partition, list[Record]] = {
            (stream, number): [] for stream, count in streams.items() for number in range(count)
        }
        self._firsts = dict.fromkeys(self._partitions, 0)
        self._streams = tuple(streams)
        self._bounded = bounded
        self._changed = threading.Condition()
        self._positions: Positions = {}
        self._committed: Positions = {}
        self._paused: set[str] = set()
        self._turn = 0

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that this source reads."""
        return self._streams

    @property
    def bounded(self) -> bool:
        """Whether the source ends by itself."""
        return self._bounded

    @property
    def shared(self) -> bool:
        """Never: nobody else reads it."""
        return False

    @property
    def trouble(self) -> str:
        """None is possible."""
        return ""

    def append(
        self,
        stream: str,
        value: bytes,
        *,
        partition: int = 0,
        key: bytes | None = None,
        timestamp: float = math.nan,
        headers: Headers = (),
    ) -> Record:
        """Add a record and return it. May be called from any thread.

        Raises:
            KeyError: There is no such partition.
        """
        with self._changed:
            records = self._partitions[stream, partition]
            offset = self._firsts[stream, partition] + len(records)
            record = Record(stream, partition, offset, offset + 1, timestamp, key, value, headers)
            records.append(record)
            self._changed.notify_all()
        return record

    def finish(self) -> None:
        """Say that no more records will come. May be called from any thread."""
        with self._changed:
            self._bounded = True
            self._changed.notify_all()

    def trim(self, positions: Mapping[Partition, int]) -> None:
        """Forget the records before these positions. May be called from any thread."""
        with self._changed:
            for partition, position in positions.items():
                count = min(position - self._firsts[partition], len(self._partitions[partition]))
                if count > 0:
                    del self._partitions[partition][:count]
                    self._firsts[partition] += count

    def open(self, assignment: Assignment) -> None:
        """Take all partitions.

        Raises:
            StreamError: Reading should begin at records that were trimmed, or at none that ever was.
        """
        starts = assignment.assigned({p: Found(self._firsts[p], self._committed.get(p)) for p in self._partitions})
        with self._changed:
            for partition, records in self._partitions.items():
                first = self._firsts[partition]
                start = starts.get(partition, self._committed.get(partition, first))
                if not first <= start <= first + len(records):
                    last = first + len(records)
                    raise StreamError(f"{partition[0]}-{partition[1]} holds offsets {first} to {last}, not {start}")
                self._positions[partition] = start

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return up to ``max_records`` records, fairly from all partitions; wait ``timeout`` seconds for the first.

        Returns at once when every partition has ended.
        """
        deadline = CLOCK.monotonic() + timeout
        with self._changed:
            while True:
                records = self._take(max_records)
                left = deadline - CLOCK.monotonic()
                if records or left <= 0 or len(self.ended()) == len(self._partitions):
                    return records
                self._changed.wait(left)

    def ended(self) -> frozenset[Partition]:
        """Partitions of bounded streams that have been read to their end."""
        return frozenset([partition for partition, count in self.lag().items() if self._bounded and not count])

    def pause(self, streams: Sequence[str]) -> None:
        """Give no more records of these streams until `resume`."""
        self._paused.update(streams)

    def resume(self, streams: Sequence[str]) -> None:
        """Give records of these streams again."""
        self._paused.difference_update(streams)

    def commit(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        """Remember that everything before these positions is answered."""
        self._committed.update(positions)

    def committed(self) -> Positions:
        """The positions last committed."""
        return dict(self._committed)

    def position(self, partition: Partition) -> int | None:
        """Where `poll` reads on."""
        return self._positions.get(partition)

    def identities(self) -> dict[str, str]:
        """None: nobody can make a stream anew in here."""
        return {}

    def beginnings(self) -> Positions:
        """The first offset still there of each partition."""
        return {partition: self._firsts[partition] for partition in self._positions}

    def lag(self) -> dict[Partition, int]:
        """Records between the position of `poll` and the end of each partition."""
        return {p: self._firsts[p] + len(records) - self._at(p) for p, records in self._partitions.items()}

    def close(self) -> None:
        """Leave; records and committed positions stay. Safe to call twice and before `open`."""
        self._positions = {}

    def _at(self, partition: Partition) -> int:
        return self._positions.get(partition, self._firsts[partition])

    def _take(self, max_records: int) -> list[Record]:
        names = [p for p in self._positions if p[0] not in self._paused]
        if not names:
            return []
        self._turn = (self._turn + 1) % len(names)
        names = names[self._turn :] + names[: self._turn]
        taken: list[Record] = []
        for limit in (-(-max_records // len(names)), max_records):
            for name in names:
                start = max(0, self._positions[name] - self._firsts[name])
                part = self._partitions[name][start : start + min(limit, max_records - len(taken))]
                if part:
                    self._positions[name] = part[-1].end
                    taken += part
        return taken


class MemorySink:
    """Keeps what is sent to it.

    Args:
        name: The stream written to.

    Attributes:
        messages: Everything sent, in order.
        flushed: How many of them were sent before the last `flush`.
    """

    def __init__(self, name: str = "memory") -> None:
        self.messages: list[Message] = []
        self.flushed = 0
        self._name = name
        self._open = False

    @property
    def name(self) -> str:
        """The stream written to."""
        return self._name

    def open(self) -> None:
        """Begin; messages of earlier times stay."""
        self._open = True

    def send(self, messages: Sequence[Message]) -> None:
        """Keep messages.

        Raises:
            StreamError: The sink is not open.
        """
        if not self._open:
            raise StreamError(f"{self._name} is not open")
        self.messages += messages

    def flush(self, timeout: float) -> None:
        """Count everything sent as durable."""
        self.flushed = len(self.messages)

    def close(self) -> None:
        """Flush and leave. Safe to call twice."""
        if self._open:
            self.flush(0)
        self._open = False
