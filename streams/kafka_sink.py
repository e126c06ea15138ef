"""Answers and dead letters into Kafka: idempotent, in order, never dropped by the client."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Any

from kafka import KafkaProducer, errors
from kafka.partitioner import StickyPartitioner

from streams.base import Message, StreamError, StreamUnavailableError
from streams.kafka_client import as_stream_error, connect, describe, explain, forbidden
from streams.murmur import murmur2
from streams.seams import CLOCK
from streams.shared_producer import SharedProducer
from streams.topic_sink import RECORD_OVERHEAD, TopicSink

_TOO_LARGE = (errors.MessageSizeTooLargeError, errors.RecordListTooLargeError)

_FINAL = (
    errors.AuthorizationError,
    errors.SaslAuthenticationFailedError,
    errors.UnsupportedVersionError,
    errors.UnsupportedForMessageFormatError,
    errors.InvalidTransactionTimeoutError,
)
"""What no new transaction gets over."""

_TRANSACTION_TIMEOUTS = 1.5
"""Time that a broker leaves a transaction open whose process is gone, in ``settings.timeout``. Whoever takes its
partitions over waits for that; and no call of ours waits longer."""


class KafkaClient(SharedProducer[Any]):
    """One `KafkaProducer` for all sinks of a process."""

    def _make(self) -> Any:
        config = self.settings.producer_config() | {"partitioner": StickyPartitioner()}
        if self.transactional_id is not None:
            # The first message after a commit is refused until the cluster has written down that commit, and asked for
            # again only after this time, a tenth of a second as a rule.
            config = {"retry_backoff_ms": 10} | config
            config |= {
                "transactional_id": self.transactional_id,
                "transaction_timeout_ms": round(_TRANSACTION_TIMEOUTS * 1000 * self.settings.timeout),
            }
        return connect(KafkaProducer, config)

    def _abandon(self, producer: Any) -> None:
        # `close` gives up at its own flush and leaves the sending thread at work; only the sender can drop batches.
        producer._sender.force_close()  # noqa: SLF001
        with contextlib.suppress(errors.KafkaTimeoutError):
            producer.close(timeout=1)

    def _end(self, producer: Any, timeout: float) -> None:
        if self.transactional_id is not None:
            self._abandon(producer)
            return
        try:
            producer.close(timeout=timeout)
        except errors.KafkaTimeoutError:
            self._abandon(producer)

    def failure(self, error: Exception, what: str) -> StreamError:
        """Return the error to raise for one of the producer; see `SharedProducer.failure`."""
        cause = next((part for part in error.args if isinstance(part, errors.KafkaError)), error)
        if self.transactional_id is None or isinstance(cause, _FINAL):
            return as_stream_error(cause, what)
        return StreamUnavailableError(f"{what}: the transaction failed ({explain(cause)})")


class KafkaSink(TopicSink[KafkaClient]):
    """Writes messages to one topic; implements `streams.base.Sink`.

    ``max_pending`` bounds what waits, since kafka-python bounds it by nothing. `send` takes all of its messages or
    none; with more of them than ``max_pending`` it waits until nothing else is pending.
    """

    _limit_setting = "max_request_size"

    def _set_up(self) -> None:
        self._pending: deque[tuple[Any, int]] = deque()
        self._rest: Sequence[Message] = []

    def _own_client(self) -> KafkaClient:
        return KafkaClient(self.settings)

    @property
    def pending(self) -> int:
        """Messages that the cluster has not confirmed yet, as of the last call."""
        return len(self._pending) + len(self._rest)

    def open(self) -> None:
        """Connect and look the topic up.

        Raises:
            StreamUnavailableError: No broker answers; `open` may be called again.
            StreamError: The topic does not exist, or we may not use it.
        """
        if self._producer is not None:
            return
        described = describe(self.settings, [self.topic], limits=True)[self.topic]
        producer = self._client.acquire()
        try:
            producer.partitions_for(self.topic)
        except errors.KafkaError as error:
            self._client.release(0)
            raise as_stream_error(error, f"topic {self.topic}") from error
        # Known beforehand, as a message that the broker refuses for its size ends an idempotent producer for good.
        largest = int(producer.config["max_request_size"])
        self._limit = min(largest, described.max_bytes or largest) - RECORD_OVERHEAD
        self._producer = producer

    def send(self, messages: Sequence[Message]) -> None:
        """Hand messages over in order; they are durable after `flush`.

        Raises:
            StreamUnavailableError: No room within ``send_timeout``; none of the messages was taken.
            StreamError: A message is too large, or the cluster refused an earlier one.
        """
        producer = self._opened()
        sizes = [_size(message) for message in messages]
        for message, size in zip(messages, sizes, strict=True):
            if size > self._limit:
                raise self._too_large(size, message)
        self._send_rest()
        self._make_room(len(messages))
        before = len(self._pending)
        topic, hand_over, keep = self.topic, producer.send, self._pending.append
        try:
            places = self._places(messages, producer)
            for (key, value, headers), size, place in zip(messages, sizes, places, strict=True):
                keep((hand_over(topic, value, key, list(headers) if headers else None, place), size))
        except errors.KafkaError as error:
            failure = self._client.failure(error, f"writing to {topic}")
            taken = len(self._pending) - before
            alone = self._client.transactional_id is None  # in a transaction everything is sent again
            if not taken or not alone or not isinstance(failure, StreamUnavailableError):
                raise failure from error
            self._rest = messages[taken:]

    def _send_rest(self) -> None:
        """Hand over what the client did not take of an earlier `send`; some of that is on its way, so all of it is."""
        if self._rest:
            rest, self._rest = self._rest, []
            try:
                self.send(rest)
            except StreamError:
                self._rest = rest
                raise
            if self._rest:
                raise self._waiting()

    def _places(self, messages: Sequence[Message], producer: Any) -> Sequence[int | None]:
        """The partition of each message: by its key as Kafka's own clients choose it; none leaves it to the client."""
        keys = [message[0] for message in messages if message[0] is not None]
        if not keys:
            return [None] * len(messages)
        count = len(producer.partitions_for(self.topic))
        found = iter(((murmur2(keys) & 0x7FFFFFFF) % count).tolist())
        return [None if message[0] is None else next(found) for message in messages]

    def flush(self, timeout: float) -> None:
        """Return once the cluster has confirmed everything sent; see `TopicSink.flush`."""
        self._opened()
        self._send_rest()
        self._settle(0, CLOCK.monotonic() + timeout)

    def _forget(self) -> None:
        self._pending.clear()
        self._rest = []

    def _opened(self) -> Any:
        if self._producer is None:
            raise self._not_open()
        if self._client.transactional_id is not None:
            self._follow(self._client.producer)
        return self._producer

    def _follow(self, producer: Any) -> None:
        """Use the client's producer of the moment; what one before it held is gone."""
        if producer is None:
            raise StreamUnavailableError(f"topic {self.topic}: no broker answers")
        if producer is not self._producer:
            self._pending.clear()
            self._producer = producer

    def _make_room(self, count: int) -> None:
        self._settle(max(0, self.max_pending - count), CLOCK.monotonic() + self.send_timeout)

    def _settle(self, allowed: int, deadline: float) -> None:
        """Drop confirmed messages from the front until at most ``allowed`` are pending; wait where that needs it."""
        pending = self._pending
        while pending:
            future, size = pending[0]
            if not future.is_done:
                if len(pending) <= allowed:
                    return
                self._wait(future, deadline)
            pending.popleft()
            if future.failed():
                raise self._refused(future.exception, size)

    def _wait(self, future: Any, deadline: float) -> None:
        try:
            future.get(timeout=max(0.0, deadline - CLOCK.monotonic()))
        except errors.KafkaError as error:
            if not future.is_done:
                raise self._waiting() from error

    def _waiting(self) -> StreamUnavailableError:
        return StreamUnavailableError(f"topic {self.topic}: {self.pending} messages wait for a broker to confirm them")

    def _refused(self, error: Exception, size: int) -> StreamError:
        return self._refusal(
            error, explain(error), size, too_large=isinstance(error, _TOO_LARGE), forbidden=forbidden(error)
        )


def _size(message: Message) -> int:
    key, value, headers = message
    size = len(value) + (len(key) if key else 0)
    if headers:
        size += sum(len(name) + len(content) + 10 for name, content in headers)
    return size
