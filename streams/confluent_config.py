"""What the settings of a cluster become for librdkafka, and which of its settings `extra` may hold."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, Producer, libversion

if TYPE_CHECKING:
    from streams.kafka_settings import Extra, KafkaSettings

Config = dict[str, Any]

_BESIDE = {
    "bootstrap.servers": "bootstrap_servers",
    "client.id": "client_id",
    "compression.codec": "compression",
    "compression.type": "compression",
    "group.id": "group",
    "isolation.level": "isolation_level",
    "linger.ms": "linger",
    "metadata.broker.list": "bootstrap_servers",
    "queue.buffering.max.ms": "linger",
    "security.protocol": "security_protocol",
    "ssl.ca.location": "ssl_cafile",
    "ssl.certificate.location": "ssl_certfile",
    "ssl.crl.location": "ssl_crlfile",
    "ssl.endpoint.identification.algorithm": "ssl_check_hostname",
    "ssl.key.location": "ssl_keyfile",
}
"""Settings of librdkafka that have a name of ours."""

_FOREVER = "a sink holds on to a message until the cluster has it"
_STARTS = "start positions come from the checkpoint, then the group, then the beginning"
_ANSWERED = "offsets are committed only when their answers are out"
_TOGETHER = "data and feedback meet only under the range assignor"
_CONFIRMED = "answers are always confirmed by every in-sync replica"

_OURS = {
    "acks": _CONFIRMED,
    "allow.auto.create.topics": "topics are made by whoever runs the cluster",
    "auto.commit.enable": _ANSWERED,
    "auto.commit.interval.ms": _ANSWERED,
    "auto.offset.reset": _STARTS,
    "delivery.report.only.error": "the sink counts what waits by itself",
    "delivery.timeout.ms": _FOREVER,
    "enable.auto.commit": _ANSWERED,
    "enable.auto.offset.store": _ANSWERED,
    "enable.idempotence": "the producer is always idempotent",
    "enable.partition.eof": "the source asks for the ends of partitions by itself",
    "enable.ssl.certificate.verification": "the certificate of a broker is always verified",
    "group.instance.id": "the name of a member is kept in its state directory",
    "group.protocol": _TOGETHER,
    "group.remote.assignor": _TOGETHER,
    "logger": "what librdkafka says goes to the log",
    "message.timeout.ms": _FOREVER,
    "partition.assignment.strategy": _TOGETHER,
    "partitioner": "keys go to the partitions that Kafka's own clients choose",
    "plugin.library.paths": "no code is loaded from a policy",
    "request.required.acks": _CONFIRMED,
    "retries": _FOREVER,
    "message.send.max.retries": _FOREVER,
    "ssl.key.password": "name a file in ssl_password_file or a variable in ssl_password_env",
    "transaction.timeout.ms": "it follows from timeout, which is set beside extra",
    "transactional.id": "it is made of the group and of the name that is kept in the state directory",
}
"""Settings of librdkafka that `extra` may not touch, and why."""

_SECRET = ("sasl.", "ssl.key.", "ssl.keystore.", "ssl.certificate.pem", "ssl.ca.pem", "https.ca.pem")
_END = "adaptd.end"
"""A setting that librdkafka does not know: put last, it keeps a client from being made of those before it."""


class _Useful(logging.Filter):
    """Drops what librdkafka says of settings that only the other kind of client has: both get all of `extra`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a record."""
        return "property and will be ignored by this" not in record.getMessage()


log = logging.getLogger("librdkafka")
log.addFilter(_Useful())


def check_extra(extra: Mapping[str, Extra]) -> None:
    """Check further settings of librdkafka.

    Raises:
        ValueError: One is ours to set, is unknown, or has a value that librdkafka refuses.
    """
    for key in extra:
        if key in _BESIDE:
            raise ValueError(f"set {_BESIDE[key]} beside extra, not {key} in it")
        if key in _OURS:
            raise ValueError(f"{key} may not be set here: {_OURS[key]}")
        if key.startswith(_SECRET):
            raise ValueError(f"{key} may not be set here: who we are and our secrets are set beside extra")
        if key.endswith("_cb"):
            raise ValueError(f"{key} is no setting that librdkafka takes from a file")
        told = refused({key: extra[key]})
        if "No such configuration property" in told:
            raise ValueError(f"{key} is no setting that librdkafka {libversion()[0]} takes from a file{_hint(key)}")
        if told:
            raise ValueError(f"{key}: librdkafka refuses it: {told}")


def refused(given: Mapping[str, Extra]) -> str:
    """Return what librdkafka says against settings; empty where it takes them. Connects to nothing."""
    try:
        Producer(_plain(given) | {_END: ""})
    except KafkaException as error:
        told = str(error.args[0].str()).strip()
        return "" if _END in told else told
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("librdkafka took a setting that does not exist")


def _hint(key: str) -> str:
    near = key.replace("_", ".")
    if near != key and not refused({near: "0"}).startswith("No such"):
        return f"; did you mean {near}?"
    return "; its names are in CONFIGURATION.md of librdkafka"


def _plain(given: Mapping[str, Extra]) -> Config:
    """Values as librdkafka reads them."""
    return {key: _text(value) for key, value in given.items()}


def _text(value: Extra) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def consumer_config(settings: KafkaSettings, *, group: str | None, member: str | None) -> Config:
    """Return the settings of a `confluent_kafka.Consumer`; reads the secrets.

    Raises:
        StreamError: A secret cannot be read.
    """
    defaults = {
        # The client fetches ahead; this bounds the memory of it, and lets a full queue go on soon.
        "queued.max.messages.kbytes": "16384",
        "queued.min.messages": "20000",
        "fetch.queue.backoff.ms": "10",
        # One fetch at a time asks a broker, for whatever topics have room; while the data's queue is full that may be
        # the feedback alone, which has nothing new. Nobody asks for data until it ends: by default half a second,
        # several times what a full queue lasts.
        "fetch.wait.max.ms": "50",
        "check.crcs": "true",
    }
    ours = {
        # Without a group nothing is committed and nobody joins, but librdkafka wants a name.
        "group.id": group or settings.client_id,
        "auto.offset.reset": "error",
        "enable.auto.commit": "false",
        "enable.auto.offset.store": "false",
        # Tells where reading goes on behind what gives no record.
        "enable.partition.eof": "true",
        "isolation.level": settings.isolation_level,
        "partition.assignment.strategy": "range",
    }
    if member is not None:
        ours["group.instance.id"] = member
    return _common(settings, defaults) | ours


_BATCH_SIZE = 131_072

_TRANSACTION_TIMEOUTS = 1.5
"""Time that a broker leaves a transaction open whose process is gone, in ``settings.timeout``."""


def session_seconds(settings: KafkaSettings) -> float:
    """Seconds after which a group misses a member that does not report."""
    return float(str(settings.extra.get("session.timeout.ms", 45_000))) / 1000


def batch_size(settings: KafkaSettings) -> int:
    """Bytes that a batch may have."""
    return int(str(settings.extra.get("batch.size", _BATCH_SIZE)))


def producer_config(settings: KafkaSettings, *, transactional_id: str | None = None) -> Config:
    """Return the settings of a `confluent_kafka.Producer`; reads the secrets.

    Raises:
        StreamError: A secret cannot be read.
    """
    defaults = {
        "batch.size": str(_BATCH_SIZE),
        "message.max.bytes": "1048576",
        "queue.buffering.max.messages": "100000",
        "queue.buffering.max.kbytes": "65536",
    }
    if transactional_id is not None:
        # What follows a commit is refused until the cluster has written that down, and sent again after this time.
        defaults |= {"retry.backoff.ms": "10"}
    ours = _common(settings, defaults) | {
        "acks": "all",
        "compression.type": settings.compression or "none",
        "delivery.report.only.error": True,
        "enable.idempotence": "true",
        "linger.ms": str(settings.linger * 1000),
        # The client must not give up on a batch by itself: the sink bounds what waits and tells its caller, and a
        # batch that is never dropped is never out of order.
        "message.timeout.ms": "0",
        # The partition that Kafka's own clients choose: murmur2 of the key.
        "partitioner": "murmur2_random",
    }
    if transactional_id is not None:
        milliseconds = str(round(_TRANSACTION_TIMEOUTS * 1000 * settings.timeout))
        ours |= {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": milliseconds,
            "message.timeout.ms": milliseconds,  # behind it the transaction is gone in any case
        }
    return ours


def admin_config(settings: KafkaSettings) -> Config:
    """Return the settings of a `confluent_kafka.admin.AdminClient`; reads the secrets.

    Raises:
        StreamError: A secret cannot be read.
    """
    return _common(settings, {})


def _common(settings: KafkaSettings, defaults: Mapping[str, str]) -> Config:
    general: Config = {
        # With the default cap of 10 s a client can come back seconds after its broker did.
        "reconnect.backoff.max.ms": "1000",
        **defaults,
        **_plain(settings.extra),
        "allow.auto.create.topics": "false",
        "bootstrap.servers": ",".join(settings.bootstrap_servers),
        "client.id": settings.client_id,
        "security.protocol": settings.security_protocol,
        "logger": log,
    }
    return general | _sasl(settings) | _ssl(settings)


def _sasl(settings: KafkaSettings) -> Config:
    if not settings.security_protocol.startswith("SASL"):
        return {}
    return {
        "sasl.mechanism": settings.sasl_mechanism,
        "sasl.username": settings.sasl_plain_username,
        "sasl.password": settings.sasl_password(),
    }


def _ssl(settings: KafkaSettings) -> Config:
    if not settings.security_protocol.endswith("SSL"):
        return {}
    names = {ours: theirs for theirs, ours in _BESIDE.items() if ours.startswith("ssl_")}
    config: Config = {names[name]: path for name, path in settings.ssl_files().items()}
    config["ssl.endpoint.identification.algorithm"] = "https" if settings.ssl_check_hostname else "none"
    if settings.ssl_password_file or settings.ssl_password_env:
        config["ssl.key.password"] = settings.ssl_password()
    return config
