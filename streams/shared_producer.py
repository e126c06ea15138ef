"""One producer for all sinks of a process, whichever client makes it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from streams.base import StreamError
from streams.kafka_settings import KafkaSettings

Made = TypeVar("Made")


class SharedProducer(ABC, Generic[Made]):
    """One producer for all sinks of a process: one connection per broker, batches shared.

    The producer is made by the first `acquire` and closed by the last `release`; both may come from any thread.
    With a ``transactional_id`` it is replaced by `renew` whenever a transaction has failed.
    """

    def __init__(self, settings: KafkaSettings, *, transactional_id: str | None = None) -> None:
        """Prepare; nothing is connected before `acquire`.

        Args:
            settings: How to reach the cluster.
            transactional_id: The name under which transactions are made; none makes none.
        """
        self.settings = settings
        self.transactional_id = transactional_id
        self._lock = threading.RLock()
        self._users = 0
        self._producer: Made | None = None

    def acquire(self) -> Made:
        """Return the producer.

        Raises:
            StreamUnavailableError: No broker answers, where the client connects at once.
            StreamError: The cluster or the client refuses us.
        """
        with self._lock:
            if self._producer is None:
                self._producer = self._make()
            self._users += 1
            return self._producer

    @property
    def producer(self) -> Made | None:
        """The producer of the moment; none before `acquire` and while `renew` has not got through."""
        return self._producer

    def renew(self) -> Made:
        """Give the producer up, with everything that it has not written yet, and return a new one.

        Raises:
            StreamUnavailableError: No broker answers; there is no producer until a later call gets through.
            StreamError: The cluster or the client refuses us.
        """
        with self._lock:
            producer, self._producer = self._producer, None
            if producer is not None:
                self._abandon(producer)
            self._producer = self._make()
            return self._producer

    def release(self, timeout: float) -> None:
        """Give the producer back; the last one out waits about ``timeout`` seconds for what is unconfirmed.

        Of a transaction what is committed is written, and the rest shall not be: that is given up at once.
        """
        with self._lock:
            self._users -= 1
            if self._users > 0:
                return
            producer, self._producer = self._producer, None
        if producer is not None:
            self._end(producer, timeout)

    @abstractmethod
    def failure(self, error: Any, what: str) -> StreamError:
        """Return the error to raise for one of the producer.

        One that a transaction died of is told as unavailable, since the transaction can be made again; whether
        somebody else has taken our place is found out there.
        """

    @abstractmethod
    def _make(self) -> Made: ...

    @abstractmethod
    def _abandon(self, producer: Made) -> None:
        """Have a producer write nothing more of what it holds."""

    @abstractmethod
    def _end(self, producer: Made, timeout: float) -> None:
        """Close a producer that nobody uses any more."""
