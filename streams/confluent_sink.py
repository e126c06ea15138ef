"""Answers and dead letters into Kafka through librdkafka: idempotent, in order, never dropped by the client."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import Message as Delivered

from streams.base import Message, StreamError, StreamUnavailableError
from streams.columns import Messages
from streams.confluent_client import FORBIDDEN, Watch, as_stream_error, describe, error_of, explain, make
from streams.confluent_config import batch_size, producer_config
from streams.kafka_settings import KafkaSettings
from streams.seams import CLOCK
from streams.shared_producer import SharedProducer
from streams.topic_sink import RECORD_OVERHEAD, TopicSink

_FINAL = frozenset(
    {
        KafkaError.INVALID_TRANSACTION_TIMEOUT,
        KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
        KafkaError.UNSUPPORTED_VERSION,
    }
)


_NOTHING = Messages.of(())


class ConfluentClient(SharedProducer[Producer]):
    """One producer of librdkafka for all sinks of a process; it connects by itself."""

    def __init__(self, settings: KafkaSettings, *, transactional_id: str | None = None) -> None:
        """Prepare; see `SharedProducer`."""
        super().__init__(settings, transactional_id=transactional_id)
        self.watch = Watch()
        """What the producer says of its connections."""
        self._batch = batch_size(settings)
        self.limit = 0
        """Bytes that a message may have, as librdkafka counts them."""

    def acquire(self, largest: int | None = None) -> Producer:
        """Return the producer. No batch of it is larger than ``largest`` bytes.

        librdkafka does not split a batch that is larger than its topic allows. With a ``transactional_id`` that holds
        from the next `renew` on, which opening the transactions begins with.

        Raises:
            StreamError: librdkafka refuses its settings, or makes larger batches for the sinks that have it already.
        """
        with self._lock:
            if largest is not None and largest < self._batch:
                if self._producer is not None and self.transactional_id is None:
                    raise StreamError(
                        f"a topic takes {largest} bytes at once, but batches have up to {self._batch}: set batch.size"
                        " in extra to less, or raise max.message.bytes of the topic"
                    )
                self._batch = largest
            return super().acquire()

    def _make(self) -> Producer:
        config = producer_config(self.settings, transactional_id=self.transactional_id)
        config["batch.size"] = str(self._batch)
        self.limit = int(config["message.max.bytes"])
        return make(Producer, config | {"error_cb": self.watch.hear})

    def _abandon(self, producer: Producer) -> None:
        producer.purge()

    def _end(self, producer: Producer, timeout: float) -> None:
        with contextlib.suppress(KafkaException):  # of a producer that has ended for good
            if self.transactional_id is not None or producer.flush(timeout):
                producer.purge()
                producer.flush(0)

    def failure(self, error: KafkaException | KafkaError, what: str) -> StreamError:
        """Return the error to raise for one of the producer; see `SharedProducer.failure`."""
        found = error_of(error)
        if self.transactional_id is None or found.code() in FORBIDDEN | _FINAL:
            return as_stream_error(found, what)
        return StreamUnavailableError(f"{what}: the transaction failed ({explain(found)})")


class ConfluentSink(TopicSink[ConfluentClient]):
    """Writes messages to one topic through librdkafka; implements `streams.base.Sink` as `KafkaSink` does.

    ``max_pending`` bounds how many messages wait in the producer, whoever of its sinks sent them, and
    ``queue.buffering.max.kbytes`` how large they are; a rest of one `send` that does not fit waits in the sink, and is
    handed over before anything newer.

    librdkafka does not split a batch that is larger than its topic allows, so the batches of a client are as small as
    its first topic needs. Where we may not see ``max.message.bytes`` of a topic and it is below ``batch.size`` (131072
    unless `extra` says otherwise), a batch is refused though each of its messages would fit.
    """

    _limit_setting = "message.max.bytes"
    _refused_advice = ", or smaller batches (batch.size in extra)"
    _producer: Producer | None

    def _set_up(self) -> None:
        self._rest = _NOTHING
        self._refused: tuple[KafkaError, int] | None = None

    def _own_client(self) -> ConfluentClient:
        return ConfluentClient(self.settings)

    @property
    def pending(self) -> int:
        """Messages of this sink and of those beside it that the cluster has not confirmed yet."""
        return 0 if self._producer is None else len(self._producer) + len(self._rest)

    def open(self) -> None:
        """Connect and look the topic up.

        Raises:
            StreamUnavailableError: No broker answers; `open` may be called again.
            StreamError: The topic does not exist, or we may not use it.
        """
        if self._producer is not None:
            return
        largest = describe(self.settings, [self.topic], limits=True)[self.topic].max_bytes
        self._producer = self._client.acquire(largest)
        self._limit = min(self._client.limit, largest or self._client.limit) - RECORD_OVERHEAD

    def send(self, messages: Sequence[Message]) -> None:
        """Hand messages over in order; they are durable after `flush`.

        Raises:
            StreamUnavailableError: No room within ``send_timeout``; none of the messages was taken.
            StreamError: A message is too large, or the cluster refused an earlier one.
        """
        producer = self._opened()
        if _size_at_most(messages) > self._limit:
            for message in messages:
                self._check_size(message)
        self._make_room(producer, len(messages))
        self._rest = Messages.joined([self._rest, messages]) if self._rest else Messages.of(messages)
        self._hand_over(producer)
        self._serve(producer.poll, 0)
        self._raise_refused()

    def flush(self, timeout: float) -> None:
        """Return once the cluster has confirmed everything sent; see `TopicSink.flush`."""
        producer = self._opened()
        deadline = CLOCK.monotonic() + timeout
        while True:
            self._hand_over(producer)
            left = self._serve(producer.flush, max(0.0, deadline - CLOCK.monotonic()))
            self._raise_refused()
            if not left and not self._rest:
                self._client.watch.well()
                return
            if CLOCK.monotonic() >= deadline:
                raise self._waiting()

    def _forget(self) -> None:
        self._rest = _NOTHING
        self._refused = None

    def _opened(self) -> Producer:
        if self._producer is None:
            raise self._not_open()
        producer = self._client.producer
        if producer is None:
            raise StreamUnavailableError(f"topic {self.topic}: the producer was given up")
        if producer is not self._producer:  # renewed: what was sent through the one before is to be sent again
            self._forget()
            self._producer = producer
        return producer

    def _hand_over(self, producer: Producer) -> None:
        """Give librdkafka what it has room for; the rest stays, in order."""
        topic, produce, refused, done = self.topic, producer.produce, self._note_refused, 0
        try:
            try:
                for key, value, headers in zip(*self._rest.columns, strict=True):
                    if len(headers) == 1:  # by place and as a dictionary it takes a third less than otherwise
                        ((name, content),) = headers
                        produce(topic, value, key, -1, refused, None, 0, {name: content})
                    else:
                        produce(topic, value, key, -1, refused, headers=list(headers))
                    done += 1
            finally:
                self._rest = self._rest[done:]
        except BufferError:
            self._serve(producer.poll, 0)
        except KafkaException as error:
            failure = self._client.failure(error, f"writing to {self.topic}")
            if self._client.transactional_id is not None or not isinstance(failure, StreamUnavailableError):
                self._rest = _NOTHING
                raise failure from error
            self._serve(producer.poll, 0.01)

    def _serve(self, call: Callable[[float], int], timeout: float) -> int:
        """Let librdkafka report; it raises what ends a producer for good."""
        try:
            return call(timeout)
        except (KafkaException, SystemError) as error:  # the latter where a report comes behind such an end
            cause = error if isinstance(error, KafkaException) else error.__cause__
            if not isinstance(cause, KafkaException):
                raise
            raise self._client.failure(cause, f"writing to {self.topic}") from error

    def _make_room(self, producer: Producer, count: int) -> None:
        allowed = max(0, self.max_pending - count)
        deadline = CLOCK.monotonic() + self.send_timeout
        while len(producer) + len(self._rest) > allowed:
            self._raise_refused()
            if CLOCK.monotonic() >= deadline:
                raise self._waiting()
            self._serve(producer.poll, 0.002)
            self._hand_over(producer)

    def _waiting(self) -> StreamUnavailableError:
        told = self._client.watch.told()
        return StreamUnavailableError(
            f"topic {self.topic}: {self.pending} messages wait for a broker to confirm them{told}"
        )

    def _note_refused(self, error: KafkaError | None, message: Delivered) -> None:
        """Keep the first refusal, and of several in its batch the largest message."""
        size = _size(message.key(), message.value() or b"", message.headers() or ())
        if error is not None and (self._refused is None or size > self._refused[1]):
            self._refused = error, size

    def _raise_refused(self) -> None:
        if self._refused is None:
            return
        (error, size), self._refused = self._refused, None
        too_large = error.code() == KafkaError.MSG_SIZE_TOO_LARGE
        raise self._refusal(error, explain(error), size, too_large=too_large, forbidden=error.code() in FORBIDDEN)

    def _check_size(self, message: Message) -> None:
        size = _size(*message)
        if size > self._limit:
            raise self._too_large(size, message)


def _size_at_most(messages: Sequence[Message]) -> int:
    """What no message is larger than: the largest of every part of them together."""
    if not messages:
        return 0
    keys, values, headers = Messages.of(messages).columns
    size = max(map(len, values)) + max(map(len, filter(None, keys)), default=0)
    texts = chain.from_iterable(chain.from_iterable(headers))  # names and contents
    return size + (2 * max(map(len, texts), default=0) + 10) * max(map(len, headers))


def _size(key: bytes | None, value: bytes, headers: Any) -> int:
    size = len(value) + (len(key) if key else 0)
    if headers:
        size += sum(len(name) + len(content or b"") + 10 for name, content in headers)
    return size
