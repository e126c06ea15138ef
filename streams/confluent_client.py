"""What the confluent source and sink share: topics as they are, connections watched, errors as sentences."""

from __future__ import annotations

import math
import threading
import uuid
from base64 import urlsafe_b64decode
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource

from streams.base import RefusedStreamError, StreamError, StreamUnavailableError
from streams.confluent_config import Config, admin_config
from streams.kafka_client import Topic, check_certificates
from streams.kafka_settings import KafkaSettings
from streams.refusals import Refusals
from streams.seams import CLOCK

Made = TypeVar("Made")

FORBIDDEN = frozenset(
    {
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError._AUTHENTICATION,  # noqa: SLF001
    }
)
"""Codes of errors that only whoever runs the cluster can undo."""

PASSING = frozenset(
    {
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.LISTENER_NOT_FOUND,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_COORDINATOR,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001
        KafkaError._ASSIGNMENT_LOST,  # noqa: SLF001
        KafkaError._MAX_POLL_EXCEEDED,  # noqa: SLF001
        KafkaError._NO_OFFSET,  # noqa: SLF001
        KafkaError._RESOLVE,  # noqa: SLF001
        KafkaError._SSL,  # noqa: SLF001
        KafkaError._STATE,  # noqa: SLF001
        KafkaError._TIMED_OUT,  # noqa: SLF001
        KafkaError._TIMED_OUT_QUEUE,  # noqa: SLF001
        KafkaError._TRANSPORT,  # noqa: SLF001
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
        KafkaError._WAIT_COORD,  # noqa: SLF001
    }
)
"""Codes of errors that librdkafka gets over by itself, beside those that it calls retriable."""

_SILENT = frozenset({KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN})  # noqa: SLF001


def error_of(error: KafkaException | KafkaError) -> KafkaError:
    """Return what an exception of the client carries."""
    found = error.args[0] if isinstance(error, KafkaException) else error
    assert isinstance(found, KafkaError)
    return found


def explain(error: KafkaException | KafkaError) -> str:
    """Return one line for an error of librdkafka."""
    found = error_of(error)
    return f"{found.name()}: {' '.join(found.str().split())[:300]}"


def passes(error: KafkaError) -> bool:
    """Whether waiting may help."""
    return not error.fatal() and (error.retriable() or error.code() in PASSING)


def as_stream_error(error: KafkaException | KafkaError, what: str) -> StreamError:
    """Return the error to raise for one of librdkafka: unavailable where waiting may help, final where not."""
    found = error_of(error)
    if found.code() in FORBIDDEN:
        return StreamError(f"{what}: the cluster does not permit it ({explain(found)}); check the user and its ACLs")
    if passes(found):
        return StreamUnavailableError(f"{what}: no answer from the cluster at present ({explain(found)})")
    return StreamError(f"{what}: {explain(found)}")


class Watch:
    """What a client says of its connections, heard while it is polled.

    librdkafka tells that no broker is left, but not that one is there again: whoever hears from a broker says so.
    """

    def __init__(self) -> None:
        self.down = False
        """Whether no broker can be reached."""
        self.down_at = -math.inf
        """When that was last told, by the monotonic clock."""
        self.cause: KafkaError | None = None
        """Why a connection failed."""
        self._lock = threading.Lock()

    def hear(self, error: KafkaError) -> None:
        """Take an error of the client; from any thread."""
        with self._lock:
            if error.code() == KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001
                self.down = True
                self.down_at = CLOCK.monotonic()
            elif self.cause is None or self.cause.code() not in FORBIDDEN:
                self.cause = error

    def well(self) -> None:
        """Hear that a broker has answered."""
        if self.down or self.cause is not None:
            with self._lock:
                if self.down:
                    self.down_at = CLOCK.monotonic()
                self.down, self.cause = False, None

    def told(self) -> str:
        """Return why the last connection failed, in parentheses; empty where nothing is known."""
        cause = self.cause
        return f" ({explain(cause)})" if cause is not None else ""


def make(kind: Callable[[Config], Made], config: Config) -> Made:
    """Return a client of librdkafka; nothing is connected by that.

    Raises:
        StreamError: librdkafka refuses the settings.
    """
    try:
        return kind(config)
    except KafkaException as error:
        raise StreamError(f"librdkafka refuses its settings: {error_of(error).str().strip()}") from error
    except (TypeError, ValueError) as error:
        raise StreamError(f"librdkafka refuses its settings: {error}") from error


def describe(settings: KafkaSettings, topics: Sequence[str], *, limits: bool = False) -> dict[str, Topic]:
    """Ask the cluster about topics, and for the largest message of each where ``limits`` are wanted.

    Raises:
        StreamUnavailableError: No broker answered.
        StreamError: Topics do not exist or may not be read; it names all of them.
    """
    _check_files(settings)
    watch = Watch()
    admin = make(AdminClient, admin_config(settings) | {"error_cb": watch.hear})
    found: dict[str, Topic] = {}
    refusals = Refusals()
    for topic in topics:
        with refusals.gather():
            found[topic] = _described(admin, topic, watch, settings, limits=limits)
    refusals.tell()
    return found


def _described(admin: AdminClient, topic: str, watch: Watch, settings: KafkaSettings, *, limits: bool) -> Topic:
    told = _metadata(admin, topic, watch, settings)
    known = told.topics[topic]
    if known.error is not None:
        raise _refusal(known.error, settings, topic)
    # Only a controller tells the id.
    identity = _identity(admin, topic, settings.timeout) if told.controller_id in told.brokers else ""
    return Topic(len(known.partitions), identity, _largest(admin, topic, settings.timeout) if limits else None)


def _metadata(admin: AdminClient, topic: str, watch: Watch, settings: KafkaSettings) -> Any:
    """Ask for a topic in short steps: librdkafka goes on trying with a password that was refused."""
    deadline = CLOCK.monotonic() + settings.timeout
    while True:
        try:
            return admin.list_topics(topic, timeout=min(0.5, settings.timeout))
        except KafkaException as error:
            admin.poll(0)
            cause = watch.cause
            if cause is not None and cause.code() in FORBIDDEN:
                raise as_stream_error(cause, f"connecting to {settings.servers}") from error
            if CLOCK.monotonic() < deadline:
                continue
            if error_of(error).code() in _SILENT:
                raise no_broker(settings, watch) from error
            raise as_stream_error(error, f"topic {topic}") from error


def _check_files(settings: KafkaSettings) -> None:
    config = dict(settings.ssl_files())
    if settings.ssl_password_file or settings.ssl_password_env:
        config["ssl_password"] = settings.ssl_password()
    if config:
        check_certificates(config)


def _largest(admin: AdminClient, topic: str, timeout: float) -> int | None:
    """``max.message.bytes`` of a topic; None where we may not see it or nobody tells."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    try:
        told = admin.describe_configs([resource], request_timeout=timeout)[resource].result(timeout + 1)
        return int(told["max.message.bytes"].value)
    except (KafkaException, KeyError, TypeError, ValueError):
        return None


def _refusal(error: KafkaError, settings: KafkaSettings, topic: str) -> StreamError:
    if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        return RefusedStreamError(f"topic {topic} does not exist on {settings.servers}: make it, or correct its name")
    if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        user = settings.sasl_plain_username or "this client"
        return RefusedStreamError(f"topic {topic}: the cluster does not let {user} see it; check its ACLs")
    return as_stream_error(error, f"topic {topic}")


def no_broker(settings: KafkaSettings, watch: Watch) -> StreamUnavailableError:
    """Return that no broker answers, and why where that is known."""
    return StreamUnavailableError(f"no broker at {settings.servers} answers{watch.told()}")


def _identity(admin: AdminClient, topic: str, timeout: float) -> str:
    asked = admin.describe_topics(TopicCollection([topic]), request_timeout=timeout)[topic]
    try:
        described: Any = asked.result(timeout=timeout + 1)
    except KafkaException as error:
        raise as_stream_error(error, f"topic {topic}") from error
    return as_uuid(str(described.topic_id or ""))


def identities(settings: KafkaSettings, topics: Sequence[str], timeout: float) -> dict[str, str]:
    """Ask the cluster for the ids of topics, each request within ``timeout`` seconds; empty where it tells none.

    On a connection of its own: on that of a consumer, requests wait behind a fetch that waits for records.

    Raises:
        KafkaException: It does not answer, or has no such topic at present.
    """
    admin = make(AdminClient, admin_config(settings))
    told = admin.list_topics(topics[0], timeout=timeout)
    if told.controller_id not in told.brokers:
        return {}
    asked = admin.describe_topics(TopicCollection(list(topics)), request_timeout=timeout)
    described: dict[str, Any] = {topic: future.result(timeout=timeout + 1) for topic, future in asked.items()}
    found = {topic: as_uuid(str(told.topic_id or "")) for topic, told in described.items()}
    return {topic: identity for topic, identity in found.items() if identity}


def as_uuid(text: str) -> str:
    """Return the id of a topic as kafka-python writes it, so that either client knows what the other remembered."""
    raw = urlsafe_b64decode(text.replace("+", "-").replace("/", "_") + "=" * (-len(text) % 4))
    return str(uuid.UUID(bytes=raw)) if any(raw) else ""
