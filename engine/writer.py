"""The writer: one thread that owns the sinks, encodes answers and dead letters, and flushes them.

What is in its queue is bounded; a slow sink makes the engine wait and, in turn, the readers pause. Positions are passed
on only after everything before them has been flushed, so committed offsets never run ahead of answers. With
transactions (`engine.outbox`) they are committed together with the answers instead.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from engine.coretypes import Answers
from engine.cutter import Bad
from engine.metrics import Metrics
from engine.outbox import TRANSACTION, Outbox
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
from streams.codec import Events, Form, dead_letter, encode_predictions
from streams.refusals import Refusals
from streams.seams import CLOCK, failpoint

QUEUE_BATCHES = 32
IDLE_SECONDS = 0.05
"""Time without anything to write after which what was written is flushed."""
FLUSH_SECONDS = 2.0
"""Time between two flushes where there is always something to write; answers wait while one lasts."""
TRANSACTION_SECONDS = 0.1
"""Time between two commits of transactions."""
FLUSH_TIMEOUT_SECONDS = 2.0
"""Time after which a flush is begun anew, and told to be waited for."""
BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

log = structlog.get_logger("adaptd")


@dataclass(slots=True)
class Outgoing:
    """What one cut gives: answers, dead letters and the positions behind it; or a barrier that flushes.

    Positions of partitions in ``gone`` are forgotten: whoever reads them now says where they are.
    """

    answers: Answers | None = None
    bad: Sequence[Bad] = ()
    positions: Positions = field(default_factory=dict)
    barrier: threading.Event | None = None
    gone: Sequence[Partition] = ()
    lost: bool = False
    """Whether ``gone`` were somebody else's before this was put; `Writer.lose` has been told."""
    floors: Mapping[Partition, int] | None = None
    """See `streams.base.Found.floor`."""


class _AbortedError(Exception):
    """What was to be written is given up."""


class Writer:
    """Writes answers and dead letters.

    Args:
        predictions: Where answers go.
        dead_letters: Where records that cannot be decoded go; without it they are counted and dropped.
        form: The form of answers.
        flushed: Called on the writer's thread with positions that are safe to commit, and their floors; not with
            transactions.
        metrics: Where to count.
        transactions: What commits positions together with what is written; without it each is written by itself.

    Attributes:
        answered: Positions whose answers are out already: records before them are not answered again.
        waiting_for: What the writer waits for, empty while nothing is in its way.
        sent: Answers written by this process.
    """

    def __init__(
        self,
        predictions: Sink | None,
        dead_letters: Sink | None,
        *,
        form: Form,
        flushed: Callable[[Positions, Positions], object],
        metrics: Metrics,
        transactions: Transactions | None = None,
    ) -> None:
        self._predictions = predictions
        self._dead_letters = dead_letters
        self._form: Form = form
        self._flushed = flushed
        self._metrics = metrics
        self._queue: queue.Queue[Outgoing | None] = queue.Queue(QUEUE_BATCHES)
        self._positions: Positions = {}
        self._floors: Positions = {}
        self._dirty = False
        self._abort = threading.Event()
        self._sinks = [sink for sink in (predictions, dead_letters) if sink is not None]
        self._transactions = transactions
        self._outbox = None if transactions is None else Outbox(transactions, self._sinks, self._retry)
        self._interval = FLUSH_SECONDS if transactions is None else TRANSACTION_SECONDS
        self.answered: Mapping[Partition, int] = {}
        self._answered: Mapping[Partition, int] = self.answered
        self._ahead: Positions = {}
        """Of `_answered`, what the records written have not come past yet."""
        self.waiting_for = ""
        self._waits_on = ""
        self._opened = False
        self.sent = 0

    @property
    def depth(self) -> int:
        """Batches in the queue."""
        return self._queue.qsize()

    def open(self) -> None:
        """Open the sinks; may be called again where one was unavailable. Raises as `Sink.open` does.

        With transactions, what an earlier life left open is ended, and `answered` is what is committed then.
        """
        refusals = Refusals()
        for sink in self._sinks:
            with refusals.gather():
                sink.open()
        refusals.tell()
        if self._transactions is not None:
            self.answered = self._transactions.open()
        self._opened = True

    @property
    def available(self) -> dict[str, bool]:
        """Of each stream that is written, whether it has been opened and nothing is known to keep messages from it."""
        stuck = {sink.name for sink in self._sinks} if self._waits_on == TRANSACTION else {self._waits_on}
        return {sink.name: self._opened and sink.name not in stuck for sink in self._sinks}

    @property
    def transactional(self) -> bool:
        """Whether positions are committed by transactions, and by nobody else."""
        return self._outbox is not None

    def lose(self, partitions: Sequence[Partition]) -> None:
        """Write nothing more of partitions that are somebody else's already; to be called before `Outgoing.gone`.

        Without transactions nothing is done: what is under way is written, and may be written by others as well.
        """
        if self._outbox is not None:
            self._outbox.lose(partitions)

    def put(self, item: Outgoing | None) -> None:
        """Queue what a cut gives, from any thread; blocks while the queue is full, and drops it after `abort`."""
        while not self._abort.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.5)
                return

    def wait_flushed(self) -> None:
        """Block until everything put before is flushed, with transactions also committed.

        Raises:
            StreamUnavailableError: If the writer ended before that.
        """
        event = threading.Event()
        self.put(Outgoing(barrier=event))
        while not event.wait(0.2):
            if self._abort.is_set() and not event.is_set():
                raise StreamUnavailableError("the sinks were closed before everything was written")

    def stop(self) -> None:
        """Have `run` return once everything put before is flushed."""
        self.put(None)

    def abort(self) -> None:
        """Have `run` return soon, whatever is left; what is not flushed by then is not passed on as answered."""
        self._abort.set()

    def run(self) -> None:
        """Write until stopped or aborted.

        Raises:
            StreamError: A sink cannot be written at all.
        """
        with contextlib.suppress(_AbortedError):
            self._run()

    def _run(self) -> None:
        try:
            last_flush = CLOCK.monotonic()
            while not self._abort.is_set():
                try:
                    item, idle = self._queue.get(timeout=IDLE_SECONDS), False
                except queue.Empty:
                    item, idle = Outgoing(), self._outbox is None
                if item is not None:
                    self._write(item)
                now = CLOCK.monotonic()
                due = idle or self._full or now - last_flush >= self._interval
                if due or item is None or item.barrier is not None:
                    self._flush()
                    last_flush = now
                if item is None:
                    return
                if item.barrier is not None and not self._dirty:
                    item.barrier.set()
        finally:
            self._abort.set()
            self.close()

    def close(self) -> None:
        """Close the sinks; `run` ends with that."""
        for sink in self._sinks:
            sink.close()
        if self._transactions is not None:
            self._transactions.close()

    @property
    def _full(self) -> bool:
        return self._outbox is not None and self._outbox.full

    def _write(self, item: Outgoing) -> None:
        started = time.perf_counter()
        if item.answers is not None and self._predictions is not None:
            messages, records = self._encode(item.answers, self._answered_of(item))
            failpoint("writer.encoded")
            if messages:
                self._send(self._predictions, messages, records)
                failpoint("writer.sent")
                self.sent += len(messages)
                self._metrics.records_out(self._predictions.name, len(messages))
        for bad in item.bad:
            self._bury(bad)
        if item.positions:
            self._reach(item)
            self._dirty = True
            self._metrics.stage("send", time.perf_counter() - started)
        if item.gone:
            self._forget(item)

    def _reach(self, item: Outgoing) -> None:
        if self._outbox is None:
            self._positions.update(item.positions)
            self._floors.update(item.floors or {})
        else:
            answered = self.answered
            ahead = {p: at for p, at in item.positions.items() if at > answered.get(p, 0)}
            self._outbox.reach(ahead, item.floors)

    def _forget(self, item: Outgoing) -> None:
        for partition in item.gone:
            self._positions.pop(partition, None)
            self._floors.pop(partition, None)
        if self._outbox is not None:
            self._outbox.forget(item.gone)
            if item.lost:
                self._outbox.found(item.gone)

    def _answered_of(self, item: Outgoing) -> Positions:
        """Positions up to which partitions of an item were answered before, where it may hold records before them.

        Offsets go up until partitions are given out anew, and with that `answered` is exchanged, by another thread. So
        whatever an item has come past is not looked at again.
        """
        answered = self.answered
        if answered is not self._answered:
            self._answered, self._ahead = answered, dict(answered)
        done = {p: self._ahead[p] for p in item.positions if p in self._ahead}
        for partition, at in done.items():
            if item.positions[partition] >= at:
                del self._ahead[partition]
        return done

    def _encode(self, answers: Answers, done: Positions) -> tuple[Sequence[Message], Sequence[Record]]:
        """Messages for the rows that are not before the positions in ``done``, and their records."""
        events, labels, probabilities = answers.events, answers.labels, answers.probabilities
        if done:
            places = enumerate(zip(*events.records.columns[:3], strict=True))
            rows = [i for i, (stream, number, offset) in places if offset >= done.get((stream, number), 0)]
            if len(rows) < len(events):
                events = Events.of([events[i] for i in rows])
                chosen = np.array(rows, dtype=np.int64)
                labels, probabilities = labels[chosen], probabilities[chosen]
        messages = encode_predictions(
            events.ids,
            labels,
            probabilities,
            events.times,
            records=events.records,
            release=answers.release,
            step=answers.step,
            form=self._form,
        )
        return messages, events.records

    def _bury(self, bad: Bad) -> None:
        record = bad.record
        if record.offset < self.answered.get((record.stream, record.partition), 0):
            return
        self._metrics.dead_letter(str(bad.error.reason))
        if self._dead_letters is not None:
            self._send_letter(
                self._dead_letters, dead_letter(record, str(bad.error.reason), bad.error.message, "decode"), record
            )
            self._metrics.records_out(self._dead_letters.name, 1)

    def _send_letter(self, sink: Sink, letter: Message, record: Record) -> None:
        """Send a dead letter; one that its stream cannot hold goes without its value, and says so in a header.

        The record did fit into its own stream, and the headers of a dead letter may be what is too much.
        """
        try:
            self._send(sink, [letter], [record])
        except RefusedMessageError as error:
            log.error("dead_letter_without_value", record=record.id, bytes=len(letter.value), error=str(error))
            omitted = ("__adaptd.errors.omitted", b"%d" % len(letter.value))
            self._send(sink, [Message(letter.key, b"", (*letter.headers, omitted))], [record])

    def _send(self, sink: Sink, messages: Sequence[Message], records: Sequence[Record]) -> None:
        if self._outbox is None:
            self._retry(sink.name, lambda: sink.send(messages))
        else:
            self._outbox.send(sink, messages, records)

    def _flush(self) -> None:
        if not self._dirty:
            return
        if self._outbox is not None:
            self._outbox.commit()
            self._dirty = False
            return
        for sink in self._sinks:
            self._retry(sink.name, lambda sink=sink: sink.flush(FLUSH_TIMEOUT_SECONDS))  # type: ignore[misc]
        self._dirty = False
        failpoint("writer.flushed")
        answered = self.answered  # what is repeated from the journal must not take committed offsets back
        ahead = {p: at for p, at in self._positions.items() if at > answered.get(p, 0)}
        self._flushed(ahead, {p: at for p, at in self._floors.items() if p in ahead})
        failpoint("writer.passed")

    def _retry(self, name: str, action: Callable[[], None]) -> None:
        """Do it, with backoff for as long as the other side does not answer.

        Raises:
            _AbortedError: `abort` was called before it was done.
        """
        attempt = 0
        while True:
            if self._abort.is_set():
                raise _AbortedError
            try:
                action()
            except StreamUnavailableError as error:
                self.waiting_for, self._waits_on = f"{name}: {error}", name
                self._abort.wait(BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)])
                attempt += 1
            else:
                self.waiting_for = self._waits_on = ""
                return
