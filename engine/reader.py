"""The reader: one thread that owns a source, decodes what it gives and hands it over.

The engine's task tells the reader how much it has used up; when too much waits, the reader pauses that stream and goes
on polling, so memory is bounded and the client stays alive. Everything a source may be asked (commit, lag) is asked
on this thread.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.from_thread
import structlog

from engine.cutter import Bad, Item
from engine.holdings import Holdings, Standing, seen_before
from engine.retention import Retention
from streams.base import Found, Partition, Positions, Record, Source, StreamUnavailableError
from streams.codec import InputSpec, decode_events, decode_feedback
from streams.columns import Records
from streams.journal import Kind, Run
from streams.seams import CLOCK, failpoint

POLL_RECORDS = 512
MOST_RECORDS = 2048
"""What a poll asks for at most, while those before it were full: larger steps through a backlog take less time."""
POLL_SECONDS = 0.1
GATHER_SHARE, GATHER_SECONDS = 0.8, 0.004
"""Share of a batch's delay, and the longest time, for which few records come together before they are handed over."""
MIXED_SECONDS = 0.005
"""Longest wait for records of one stream while another is paused and may have room again at any time."""
LOOK_SECONDS = 0.25
"""Time between two commits, and between two looks at the lag."""

log = structlog.get_logger("adaptd")


@dataclass(slots=True)
class Chunk:
    """Decoded items on their way to the engine, and partitions that are new or have ended."""

    items: Sequence[Sequence[Item]] = ()
    """In parts of one stream each."""
    since: float = 0.0
    """When the first of them may have come, by the monotonic clock."""
    placed: bool = False
    """Whether partitions were given out anew; what is not in ``assigned`` then, and was ours, is ours no more."""
    assigned: Sequence[Partition] = ()
    committed: Positions = field(default_factory=dict)
    """Positions of the new partitions before which everything is answered."""
    taken: Sequence[Run] = ()
    """Those of them that do not go on from what we remember: where reading begins, and up to where others worked."""
    seen: Positions = field(default_factory=dict)
    """Positions of the new partitions before which everything was seen before and makes up what waits."""
    read: Sequence[Partition] = ()
    """Partitions of which everything seen before has been handed over."""
    ended: frozenset[Partition] = frozenset()


class Reader:
    """Runs a source.

    Args:
        source: What to read; used by the reader's thread alone.
        kinds: Whether each of its streams carries data or feedback.
        spec: The form of the inputs in records.
        start: Positions to start from; partitions absent from it start where the source thinks best.
        hand_over: Takes a chunk, called on the event loop.
        revoked: Called on the event loop when partitions go, with the seconds there are for it; returns once they are
            finished with, None where that could not be.
        high: See `resize`.
        taken: Of the partitions in ``start`` that came from others, the position up to which these had worked.
        exact: Whether answers are committed together with positions; see `Holdings`.
        patience: Seconds that finishing with partitions may take.
        max_size: See `resize`.
        max_delay: See `resize`.
    """

    def __init__(
        self,
        source: Source,
        kinds: Mapping[str, Kind],
        spec: InputSpec,
        start: Positions,
        *,
        hand_over: Callable[[Chunk], object],
        revoked: Callable[[Sequence[Partition], bool, float], Coroutine[Any, Any, Standing | None]],
        high: int,
        taken: Positions | None = None,
        exact: bool = False,
        patience: float = math.inf,
        max_size: int = 0,
        max_delay: float = 0.0,
    ) -> None:
        self._source = source
        self._kinds = kinds
        self._spec = spec
        self._holdings = Holdings(start, taken or {}, exact=exact)
        self._patience = patience
        self._rebuilding: Positions = {}
        self._hand_over, self._revoked = hand_over, revoked
        self.resize(high, max_size, max_delay)
        self._given = dict.fromkeys(source.streams, 0)
        self._paused: set[str] = set()
        self._announced: frozenset[Partition] = frozenset()
        self._commits: deque[tuple[Positions, Positions]] = deque(maxlen=1)
        self._committing, self._left = threading.Lock(), set[Partition]()
        self._stop, self._room = threading.Event(), threading.Event()
        self._opened, self._running, self._most, self._few = False, False, POLL_RECORDS, False
        self.starved: frozenset[str] = frozenset()
        """Streams that are read on however much of them waits, because work stands still without."""
        self.trouble = ""
        """What keeps records from coming, in words; empty while nothing does."""
        self.partitions: list[Partition] = []
        self.committed: Positions = {}
        self.lag: dict[Partition, int] = {}
        self.retention = Retention(source)
        self.last_poll, self.seen, self.bytes = 0.0, 0, 0

    # -- the source's questions, on the reader's thread ---------------------------------------------------------

    def assigned(self, found: Mapping[Partition, Found]) -> Positions:
        """See `streams.base.Assignment.assigned`. Raises `StreamError` as `Holdings.check` does."""
        self._holdings.check(found)
        self.partitions = sorted({*self.partitions, *found})
        self._left -= found.keys()
        committed = {p: at.committed for p, at in found.items() if at.committed is not None}
        begins = self._holdings.begin_all(found)
        if self.shared:
            self._holdings.settle(self.partitions)
        seen = seen_before(begins)
        self._rebuilding.update(seen)
        if self._running:
            taken = [Run(*p, begin.start, begin.seen, 0) for p, begin in begins.items() if begin.anew and self.shared]
            chunk = Chunk(placed=True, assigned=tuple(found), committed=committed, taken=taken, seen=seen)
            anyio.from_thread.run_sync(self._hand_over, chunk)
        return {p: begin.start for p, begin in begins.items() if p in seen or not begin.anew}

    def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> None:
        """See `streams.base.Assignment.revoked`."""
        gone = set(partitions)
        self.partitions = [p for p in self.partitions if p not in gone]
        self._left |= gone
        standing = anyio.from_thread.run(self._revoked, list(partitions), lost, self._patience)
        with self._committing:
            if self._commits:
                positions, floors = self._commits.pop()
                self._commits.append(({p: at for p, at in positions.items() if p not in gone}, floors))
        for partition in partitions:
            self._holdings.leave(partition, standing)
            self._rebuilding.pop(partition, None)
            self.lag.pop(partition, None)
            self.retention.forget(partition)
        if standing is not None and standing.done and not lost:
            self._source.commit(standing.done, standing.floors)

    # -- the engine's requests, from any thread -----------------------------------------------------------------

    def resize(self, high: int, max_size: int, max_delay: float) -> None:
        """Read on for batches of other limits.

        Args:
            high: Records of one stream that may wait before it is paused.
            max_size: Records of a full batch. Fewer are gathered for a moment, as each handing over costs the same.
                0 for a source that fetches in polls alone, so that any pause between them is one of fetching.
            max_delay: Seconds that a record waits for its batch to fill, from `Chunk.since` on.
        """
        self.high, self._full = high, 0 if self._source.bounded else max_size
        self._gathering = min(GATHER_SHARE * max_delay, GATHER_SECONDS)

    def commit(self, positions: Positions, floors: Positions | None = None) -> None:
        """Have positions and their floors committed soon; a newer request replaces an older one."""
        with self._committing:
            self._commits.append((positions, floors or {}))

    def used(self) -> None:
        """Hear that records were used up, so that a paused stream may go on."""
        self._room.set()

    def stop(self) -> None:
        """Stop reading; `run` returns after a last commit."""
        self._stop.set()
        self._room.set()

    @property
    def bounded(self) -> bool:
        """Whether the source ends by itself."""
        return self._source.bounded

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that the source reads."""
        return self._source.streams

    @property
    def available(self) -> bool:
        """Whether the source has been opened and nothing is known to keep records from coming."""
        return self._opened and not self.trouble

    def identities(self) -> dict[str, str]:
        """See `streams.base.Source.identities`."""
        return self._source.identities()

    @property
    def shared(self) -> bool:
        """Whether partitions come from other processes and go to them."""
        return self._source.shared

    # -- the thread ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect and take partitions. Raises as `Source.open` does."""
        self._source.open(self)
        self._opened = True
        self.committed = self._source.committed()

    def close(self) -> None:
        """Leave the source; `run` ends with that."""
        self._source.close()

    def run(self, taken: Mapping[str, int]) -> None:
        """Poll until stopped or until a bounded source has ended; ``taken`` counts what the engine used up."""
        self._running = True
        try:
            next_look = 0.0
            while not self._stop.is_set():
                self._room.clear()
                self._regulate(taken)
                records, since = self._gather()
                self._few = 0 < len(records) < min(self._full, self._most)
                self._most = self._next_most(len(records))
                self.last_poll = now = CLOCK.monotonic()
                if records:
                    failpoint("reader.polled")
                    self._give(records, since)
                if self._rebuilding:
                    self._announce_read()
                self._announce_end()
                if self._announced and len(self._announced) == len(self.partitions):
                    self._stop.wait(POLL_SECONDS)  # with nothing left, no poll waits
                if now >= next_look:
                    next_look = now + LOOK_SECONDS
                    self._look_for_trouble()
                    self._commit()
                    self.lag = self._source.lag()
                    self.retention.look(now, self.lag)
            self._commit()
        finally:
            self.close()

    def _gather(self) -> tuple[Sequence[Record], float]:
        """What the source gives next, after a moment where it gave few before, and when that may have begun to come."""
        if self._few and not self._paused and not self._rebuilding:
            left = self.last_poll + self._gathering - CLOCK.monotonic()
            if left > 0:
                self._stop.wait(min(left, self._gathering))
            if records := self._source.poll(self._most, 0.0):
                return records, self.last_poll
        return self._poll(), CLOCK.monotonic()

    def _look_for_trouble(self) -> None:
        """Note what is in the way of the source, and tell of it when it begins and ends."""
        trouble, before = self._source.trouble, self.trouble
        self.trouble = trouble
        if trouble and not before:
            log.warning("stream_unavailable", error=trouble)
        elif before and not trouble:
            log.info("stream_available", streams=list(self.streams))

    def _next_most(self, came: int) -> int:
        """What the next poll asks for: twice as much after a full one, but no more than a quarter of what may wait."""
        most = max(POLL_RECORDS, min(MOST_RECORDS, self.high // 4))
        return min(2 * self._most, most) if came >= self._most else POLL_RECORDS

    def _poll(self) -> Sequence[Record]:
        """Ask the source. Where everything is paused, wait for room instead; a source would sleep through it.

        Where a part is, wait as well once nothing came: a source that holds what comes of the paused part would
        otherwise fill up with that at once, and throw away what lies behind it.
        """
        if not self._paused:
            return self._source.poll(self._most, POLL_SECONDS)
        if {stream for stream, _ in set(self.partitions) - self._announced} - self._paused:
            records, wait = self._source.poll(POLL_RECORDS, MIXED_SECONDS), MIXED_SECONDS
        else:
            records, wait = self._source.poll(POLL_RECORDS, 0.0), POLL_SECONDS  # gives nothing, and keeps it alive
        if not records:
            self._room.wait(wait)
        return records

    def _regulate(self, taken: Mapping[str, int]) -> None:
        """Pause the streams of which too much waits and resume those of which little does."""
        for stream in self._source.streams:
            waiting = self._given[stream] - taken[stream]
            starved = stream in self.starved
            if stream not in self._paused and waiting >= self.high and not starved:
                self._source.pause([stream])
                self._paused.add(stream)
            elif stream in self._paused and (waiting <= self.high // 2 or starved):
                self._source.resume([stream])
                self._paused.discard(stream)

    def waiting(self, taken: Mapping[str, int]) -> int:
        """Records handed over that the engine has not used up."""
        return sum(self._given[stream] - taken[stream] for stream in self._given)

    @property
    def paused(self) -> tuple[str, ...]:
        """Streams that are paused because too much of them waits."""
        return tuple(sorted(self._paused))

    def _give(self, records: Sequence[Record], since: float) -> None:
        items: list[Sequence[Item]] = []
        for stream, part in _by_stream(records):
            decode = decode_events if self._kinds[stream] is Kind.DATA else decode_feedback
            good, bad = decode(part, self._spec)
            items.append(_in_order(part, good, [Bad(record, error) for record, error in bad]) if bad else good)
            self._given[stream] += len(part)
            self.bytes += sum(map(len, part.values if isinstance(part, Records) else [record.value for record in part]))
        self.seen += len(records)
        failpoint("reader.decoded")
        anyio.from_thread.run_sync(self._hand_over, Chunk(items, since))
        failpoint("reader.handed")

    def _announce_read(self) -> None:
        """Tell of partitions of which everything seen before has been given, be it followed by no record."""
        read = [p for p, until in self._rebuilding.items() if (self._source.position(p) or 0) >= until]
        for partition in read:
            del self._rebuilding[partition]
        if read:
            anyio.from_thread.run_sync(self._hand_over, Chunk(read=read))

    def _announce_end(self) -> None:
        ended = self._source.ended()
        if ended != self._announced:
            self._announced = ended
            anyio.from_thread.run_sync(self._hand_over, Chunk(ended=ended))

    def _commit(self) -> None:
        if self._commits and self.partitions:  # a request may come before the partitions that it is about
            failpoint("reader.commit")
            positions, floors = self._commits.pop()
            own = set(self.partitions)  # what was given up may still be on its way
            try:
                self._source.commit({p: at for p, at in positions.items() if p in own}, floors)
            except StreamUnavailableError:
                self._put_back(positions, floors)
                return
            self._put_back({p: at for p, at in positions.items() if p not in own | self._left}, floors)
            failpoint("reader.committed")

    def _put_back(self, positions: Positions, floors: Positions) -> None:
        """Have positions committed later, unless a newer request has come meanwhile, which covers them."""
        with self._committing:
            if positions and not self._commits:
                self._commits.append((positions, floors))


def _by_stream(records: Sequence[Record]) -> Sequence[tuple[str, Sequence[Record]]]:
    """Records in runs of one stream each, order kept."""
    if isinstance(records, Records):
        return records.by_stream()
    if records[0].stream == records[-1].stream and all(r.stream == records[0].stream for r in records):
        return [(records[0].stream, records)]
    parts: list[tuple[str, list[Record]]] = []
    for record in records:
        if not parts or parts[-1][0] != record.stream:
            parts.append((record.stream, []))
        parts[-1][1].append(record)
    return parts


def _in_order(records: Sequence[Record], good: Sequence[Item], bad: Sequence[Item]) -> list[Item]:
    """Good and bad items in the order of their records."""
    found = {item.record[1:3]: item for item in (*good, *bad)}
    return [found[record[1:3]] for record in records]
