"""How to reach a Kafka cluster: one validated section, and what it becomes for kafka-python.

What it becomes for librdkafka is in `streams.confluent_config`.
"""

from __future__ import annotations

import difflib
import importlib.util
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from streams.base import StreamError

Extra = bool | int | float | str | tuple[int, ...]

_SECRET_BYTES = 65_536

_OURS = {
    "acks": "answers are always confirmed by every in-sync replica",
    "allow_auto_create_topics": "topics are made by whoever runs the cluster",
    "auto_offset_reset": "start positions come from the checkpoint, then the group, then the beginning",
    "bootstrap_servers": "set bootstrap_servers beside extra",
    "client_id": "set client_id beside extra",
    "compression_type": "set compression beside extra",
    "delivery_timeout_ms": "a sink holds on to a message until the cluster has it",
    "enable_auto_commit": "offsets are committed only when their answers are out",
    "enable_idempotence": "the producer is always idempotent",
    "group_id": "set group beside extra",
    "group_instance_id": "the name of a member is kept in its state directory",
    "isolation_level": "set isolation_level beside extra",
    "linger_ms": "set linger beside extra",
    "partition_assignment_strategy": "data and feedback meet only under the range assignor",
    "sasl_plain_password": "name a file in sasl_plain_password_file or a variable in sasl_plain_password_env",
    "ssl_password": "name a file in ssl_password_file or a variable in ssl_password_env",
    "transaction_timeout_ms": "it follows from timeout, which is set beside extra",
    "transactional_id": "it is made of the group and of the name that is kept in the state directory",
}
"""Settings of kafka-python that `extra` may not touch, and why."""

_OBJECTS = {
    *("default_offset_commit_callback", "kafka_client", "metric_reporters", "partitioner", "sasl_oauth_token_provider"),
    *("key_deserializer", "key_serializer", "value_deserializer", "value_serializer"),
    *("selector", "socket_options", "ssl_context"),
}
"""Settings of kafka-python whose values are Python objects: no policy file can hold them."""


def _several(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def host_of(server: str) -> str:
    """Return the host of ``host``, ``host:port`` or ``[v6]:port``."""
    if server.startswith("["):
        return server[1:].partition("]")[0]
    return server if server.count(":") > 1 else server.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether traffic to ``host`` stays on this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class KafkaSettings(BaseModel):
    """The cluster, who we are to it, and how it is reached. Holds no secret, only where the secret lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bootstrap_servers: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1)],
        BeforeValidator(_several, json_schema_input_type=str | tuple[str, ...]),
    ]
    """Brokers to ask first, ``host:port`` each; a list, or one string with commas."""
    client: Literal["kafka-python", "confluent"] = "kafka-python"
    """Library that talks to the cluster; ``confluent`` (librdkafka, for heavy streams) needs ``adaptd[confluent]``."""
    group: Annotated[str, Field(min_length=1, max_length=249)] | None = None
    """Consumer group; none means every partition is taken and no offset is committed."""
    client_id: Annotated[str, Field(min_length=1)] = "adaptd"
    """What the broker's logs and quotas call this process."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    allow_insecure: bool = False
    """Whether records may cross a network unencrypted."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_plain_username: str | None = None
    sasl_plain_password_file: Path | None = None
    sasl_plain_password_env: str | None = None
    ssl_cafile: Path | None = None
    """Authorities to trust, PEM; none means those of the system."""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_crlfile: Path | None = None
    ssl_password_file: Path | None = None
    """The password of ``ssl_keyfile``."""
    ssl_password_env: str | None = None
    ssl_check_hostname: bool = True
    isolation_level: Literal["read_uncommitted", "read_committed"] = "read_committed"
    """Whether records of aborted transactions are read."""
    compression: Literal["gzip", "snappy", "lz4", "zstd"] | None = None
    """How answers are compressed."""
    linger: Annotated[float, Field(ge=0, le=10)] = 0.001
    """Seconds that a message may wait for company before it is sent."""
    timeout: Annotated[float, Field(gt=0, le=600)] = 10.0
    """Seconds to wait for the cluster when opening, committing and closing."""
    extra: dict[str, Extra] = Field(default_factory=dict)
    """Further settings of the client's consumer and producer, under its own names."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _has_ports(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for server in servers:
            port = server.rpartition(":")[2]
            if not host_of(server) or not port.isdecimal() or not 0 < int(port) < 65_536:
                raise ValueError(f"{server!r} is not host:port")
        return servers

    @field_validator("client")
    @classmethod
    def _has_client(cls, client: str) -> str:
        if client == "confluent" and importlib.util.find_spec("confluent_kafka") is None:
            raise ValueError("the package confluent-kafka is not installed: install adaptd[confluent]")
        return client

    @field_validator("extra")
    @classmethod
    def _knows_extra(cls, extra: dict[str, Extra], info: ValidationInfo) -> dict[str, Extra]:
        if info.data.get("client", "confluent") == "confluent":  # without one, the client is what is wrong
            if extra and "client" in info.data:
                from streams.confluent_config import check_extra

                check_extra(extra)
            return extra
        for key in extra:
            if key in _OURS:
                raise ValueError(f"{key} may not be set here: {_OURS[key]}")
            if key in cls.model_fields:
                raise ValueError(f"set {key} beside extra")
        if extra:
            _check_known(extra)
        if "@" in str(extra.get("proxy_url", "")):
            raise ValueError("proxy_url may not hold a password: it would end up in logs")
        return extra

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        self._check_encryption()
        self._check_sasl()
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs ssl_certfile")
        if self.ssl_password_file and self.ssl_password_env:
            raise ValueError("give ssl_password_file or ssl_password_env, not both")
        return self

    def _check_encryption(self) -> None:
        if self.security_protocol.endswith("SSL"):
            return
        given = sorted(name for name in self.model_fields_set if name.startswith("ssl_"))
        if given:
            raise ValueError(f"{given[0]} has no effect with security_protocol {self.security_protocol}")
        far = [server for server in self.bootstrap_servers if not is_loopback(host_of(server))]
        if far and not self.allow_insecure:
            raise ValueError(
                f"{self.security_protocol} would carry records to {far[0]} readable for anyone on the way:"
                " use SSL or SASL_SSL, or say allow_insecure: true"
            )

    def _check_sasl(self) -> None:
        given = sorted(name for name in self.model_fields_set if name.startswith("sasl_"))
        if not self.security_protocol.startswith("SASL"):
            if given:
                raise ValueError(f"{given[0]} has no effect with security_protocol {self.security_protocol}")
            return
        if self.sasl_mechanism is None or self.sasl_plain_username is None:
            raise ValueError(f"{self.security_protocol} needs sasl_mechanism and sasl_plain_username")
        if (self.sasl_plain_password_file is None) == (self.sasl_plain_password_env is None):
            raise ValueError("give the password by sasl_plain_password_file or by sasl_plain_password_env")

    @property
    def servers(self) -> str:
        """The bootstrap servers as one string for messages."""
        return ", ".join(self.bootstrap_servers)

    @property
    def patience(self) -> float:
        """Seconds that finishing with partitions may take before the group would give us up.

        Half of ``max_poll_interval_ms``: the other half is for the commit, for joining again, and for slow clocks.
        """
        name = "max.poll.interval.ms" if self.client == "confluent" else "max_poll_interval_ms"
        return float(str(self.extra.get(name, 300_000))) / 2000

    def consumer_config(self, *, group: str | None, member: str | None = None) -> dict[str, Any]:
        """Return the settings of a `kafka.KafkaConsumer`; reads the secrets.

        Args:
            group: Where offsets are committed, if anywhere.
            member: Name of this reader among the group's members, the same after a restart.

        Raises:
            StreamError: A secret cannot be read.
        """
        from kafka import KafkaConsumer
        from kafka.coordinator.assignors.range import RangePartitionAssignor

        # An answer of a broker stays small beside a model. A resumed partition waits for the end of the fetch under
        # way, one to a broker, so an idle fetch must not hang there for the client's usual half second.
        defaults = {"fetch_max_bytes": 16_777_216, "fetch_max_wait_ms": 100}
        return (
            defaults
            | self._common(KafkaConsumer.DEFAULT_CONFIG)
            | {
                "group_id": group,
                "group_instance_id": member,
                "enable_auto_commit": False,
                "auto_offset_reset": "none",
                "isolation_level": self.isolation_level,
                "partition_assignment_strategy": (RangePartitionAssignor,),
            }
        )

    def producer_config(self) -> dict[str, Any]:
        """Return the settings of a `kafka.KafkaProducer`; reads the secrets.

        Raises:
            StreamError: A secret cannot be read.
        """
        from kafka import KafkaProducer

        defaults = {"batch_size": 131_072, "max_block_ms": round(self.timeout * 1000)}
        return (
            defaults
            | self._common(KafkaProducer.DEFAULT_CONFIG)
            | {
                "acks": "all",
                "enable_idempotence": True,
                "compression_type": self.compression,
                "linger_ms": round(self.linger * 1000),
                # The client must not give up on a batch by itself: the sink bounds what waits and tells its caller,
                # and a batch that is never dropped is never out of order.
                "delivery_timeout_ms": 2**31 - 1,
            }
        )

    def admin_config(self) -> dict[str, Any]:
        """Return the settings of a `kafka.KafkaAdminClient`; reads the secrets.

        Raises:
            StreamError: A secret cannot be read.
        """
        from kafka import KafkaAdminClient

        known = KafkaAdminClient.DEFAULT_CONFIG
        config = {key: value for key, value in self._common(known).items() if key in known}
        return {"request_timeout_ms": round(self.timeout * 1000)} | config

    def _common(self, known: Mapping[str, Any]) -> dict[str, Any]:
        config: dict[str, Any] = {
            "bootstrap_servers": list(self.bootstrap_servers),
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
            "bootstrap_timeout_ms": round(self.timeout * 1000),
            # With the default cap of 30 s a client can come back ten seconds after its broker did.
            "reconnect_backoff_max_ms": 1000,
            "allow_auto_create_topics": False,
            "metrics_enabled": False,
        }
        config |= self._sasl() | self._ssl() | {key: value for key, value in self.extra.items() if key in known}
        return config

    def _sasl(self) -> dict[str, Any]:
        if not self.security_protocol.startswith("SASL"):
            return {}
        return {
            "sasl_mechanism": self.sasl_mechanism,
            "sasl_plain_username": self.sasl_plain_username,
            "sasl_plain_password": self.sasl_password(),
        }

    def _ssl(self) -> dict[str, Any]:
        if not self.security_protocol.endswith("SSL"):
            return {}
        config: dict[str, Any] = dict(self.ssl_files())
        config["ssl_check_hostname"] = self.ssl_check_hostname
        if self.ssl_password_file or self.ssl_password_env:
            config["ssl_password"] = self.ssl_password()
        return config

    def sasl_password(self) -> str:
        """Read the password of the user.

        Raises:
            StreamError: It cannot be read.
        """
        return _secret("sasl_plain_password", self.sasl_plain_password_file, self.sasl_plain_password_env)

    def ssl_password(self) -> str:
        """Read the password of ``ssl_keyfile``.

        Raises:
            StreamError: It cannot be read.
        """
        return _secret("ssl_password", self.ssl_password_file, self.ssl_password_env)

    def ssl_files(self) -> dict[str, str]:
        """Return the paths of certificates and keys that are given, by the name of their setting.

        Raises:
            StreamError: One of them does not exist.
        """
        paths = {name: getattr(self, name) for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_crlfile")}
        given = {name: str(path) for name, path in paths.items() if path is not None}
        for name, path in given.items():
            if not Path(path).is_file():
                raise StreamError(f"{name}: there is no file {path}")
        return given


def _check_known(extra: Mapping[str, Extra]) -> None:
    from kafka import KafkaConsumer, KafkaProducer
    from kafka.version import __version__

    known = (set(KafkaConsumer.DEFAULT_CONFIG) | set(KafkaProducer.DEFAULT_CONFIG)) - _OBJECTS
    for key in extra:
        if key not in known:
            near = difflib.get_close_matches(key, known - set(_OURS), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key} is no setting that kafka-python {__version__} takes from a file{hint}")


def _secret(name: str, file: Path | None, variable: str | None) -> str:
    if file is None:
        value = os.environ.get(variable or "")
        if value is None:
            raise StreamError(f"{name}_env: the environment has no variable {variable}")
        return value
    try:
        with file.open("rb") as opened:
            content = opened.read(_SECRET_BYTES + 1)
        if len(content) > _SECRET_BYTES:
            raise StreamError(f"{name}_file: {file} is too large for a password")
        return content.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{name}_file: cannot read {file}: {error}") from None
