"""What a sink into a Kafka topic is, whichever client writes it, and what it says of messages that do not get there."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from streams.base import Message, RefusedMessageError, StreamError
from streams.kafka_settings import KafkaSettings
from streams.seams import CLOCK
from streams.shared_producer import SharedProducer

RECORD_OVERHEAD = 128
"""Bytes that a record and its batch may cost beside key, value and headers."""

Client = TypeVar("Client", bound=SharedProducer[Any])


class TopicSink(ABC, Generic[Client]):
    """Writes messages to one topic.

    Messages stay in the client until every in-sync replica has them, however long an outage lasts: a batch is
    never dropped, so none overtakes another of its partition and none is written twice.
    """

    _limit_setting: ClassVar[str]
    """The client's own setting that bounds a message."""
    _refused_advice: ClassVar[str] = ""
    """What may help beside the topic's setting where the cluster refuses a message for its size."""

    def __init__(
        self,
        topic: str,
        settings: KafkaSettings,
        *,
        client: Client | None = None,
        max_pending: int = 10_000,
        send_timeout: float = 30.0,
    ) -> None:
        """Prepare; nothing is connected before `open`.

        Args:
            topic: Where to write; it must exist.
            settings: How to reach the cluster.
            client: The producer to share with other sinks; none makes one of its own.
            max_pending: Unconfirmed messages at most.
            send_timeout: Seconds that `send` may wait for room.
        """
        self.topic = topic
        self.settings = settings
        self.max_pending = max_pending
        self.send_timeout = send_timeout
        self._client = client or self._own_client()
        self._producer: Any = None
        self._limit = 0
        self._set_up()

    @property
    def name(self) -> str:
        """The topic."""
        return self.topic

    @abstractmethod
    def _set_up(self) -> None:
        """Make what the client needs beside its producer."""

    @abstractmethod
    def _own_client(self) -> Client: ...

    @abstractmethod
    def _forget(self) -> None:
        """Let go of whatever waits here."""

    @abstractmethod
    def flush(self, timeout: float) -> None:
        """Return once the cluster has confirmed everything sent.

        Raises:
            StreamUnavailableError: Not within ``timeout`` seconds; the messages stay, flush again.
            StreamError: The cluster refused a message.
        """

    def close(self) -> None:
        """Flush for at most ``settings.timeout`` seconds and leave; what is unconfirmed then is given up.

        What belongs to a transaction that is not committed is given up at once.
        """
        if self._producer is None:
            return
        deadline = CLOCK.monotonic() + self.settings.timeout
        try:
            if self._client.transactional_id is None:
                with contextlib.suppress(StreamError):
                    self.flush(self.settings.timeout)
        finally:
            self._forget()
            self._producer = None
            self._client.release(max(0.0, deadline - CLOCK.monotonic()))

    def _not_open(self) -> StreamError:
        return StreamError(f"the sink of topic {self.topic} is not open")

    def _refusal(self, error: Any, told: str, size: int, *, too_large: bool, forbidden: bool) -> StreamError:
        """What to say of a message that was sent and is not written."""
        if too_large:
            return StreamError(
                f"topic {self.topic} refuses a message of {size} bytes: raise max.message.bytes of the topic"
                f" (message.max.bytes of the broker), or send less{self._refused_advice}"
            )
        if forbidden or self._client.transactional_id is not None:
            return self._client.failure(error, f"writing to {self.topic}")
        return StreamError(f"topic {self.topic} lost a message that was sent: {told}")

    def _too_large(self, size: int, message: Message) -> RefusedMessageError:
        key = "no key" if message.key is None else f"a key of {len(message.key)} bytes"
        return RefusedMessageError(
            f"a message of {size} bytes ({key}) is too large for topic {self.topic}, where {self._limit} are allowed:"
            f" raise max.message.bytes of the topic and {self._limit_setting} in extra, or send less"
        )
