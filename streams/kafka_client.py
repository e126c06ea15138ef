"""What the Kafka source and sink share: connecting without leaks, topics as they are, errors as sentences."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kafka import KafkaAdminClient, errors
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from streams.base import RefusedStreamError, StreamError, StreamUnavailableError
from streams.kafka_settings import KafkaSettings
from streams.refusals import Refusals

_UNKNOWN_TOPIC = errors.UnknownTopicOrPartitionError.errno
_FORBIDDEN_TOPIC = errors.TopicAuthorizationFailedError.errno


class _Connections(KafkaConnectionManager):  # type: ignore[misc]  # kafka-python has no types
    """Remembers why the last connection failed.

    kafka-python logs a wrong password or an untrusted certificate, tries again until its time is over, and then only
    says that it could not bootstrap.
    """

    cause: Exception | None = None

    @property
    def is_connected(self) -> bool:
        """Whether any broker is connected at present."""
        return any(connection.connected for connection in list(self._conns.values()))

    def get_connection(self, node_id: object, *args: Any, **options: Any) -> Any:
        """Return the connection to a node; watch those that are new."""
        known = node_id in self._conns
        connection = super().get_connection(node_id, *args, **options)
        if not known:
            connection.init_future.add_errback(self._remember)
        return connection

    def _remember(self, error: Exception) -> None:
        # After a refused password the next attempts may find the connection merely closed.
        if not isinstance(self.cause, errors.SaslAuthenticationFailedError):
            self.cause = error


def explain(error: Exception) -> str:
    """Return one line for an error of kafka-python; its class where it has no text of its own."""
    text = " ".join(str(part) for part in error.args) or (error.__doc__ or "")
    name = type(error).__name__
    line = " ".join(text.split())[:300]
    return f"{name}: {line}" if line and line != name else name


def forbidden(error: Exception) -> bool:
    """Whether the cluster knows us and does not let us, or does not know us."""
    if isinstance(error, errors.AuthorizationError | errors.SaslAuthenticationFailedError):
        return True
    # Refused the number that an idempotent producer needs, kafka-python wraps the error in a text.
    return "AuthorizationFailedError" in str(error)


def as_stream_error(error: Exception, what: str) -> StreamError:
    """Return the error to raise for one of kafka-python: unavailable where waiting may help, final where not."""
    if forbidden(error):
        return StreamError(f"{what}: the cluster does not permit it ({explain(error)}); check the user and its ACLs")
    if isinstance(error, errors.RetriableError):
        return StreamUnavailableError(f"{what}: no answer from the cluster at present ({explain(error)})")
    return StreamError(f"{what}: {explain(error)}")


def connect(factory: Callable[..., Any], config: Mapping[str, Any]) -> Any:
    """Return ``factory(**config)``, a client of kafka-python that has reached the cluster.

    A client that does not get through its constructor has no handle left to close it by, while its I/O thread
    lives on; so the network part is made here and closed here.

    Raises:
        StreamUnavailableError: No broker answered within the time that ``config`` gives.
        StreamError: The cluster refused us, or kafka-python refused a setting.
    """
    check_certificates(config)
    made: list[KafkaNetClient] = []
    connections: list[_Connections] = []

    def network(**settings: Any) -> KafkaNetClient:
        net = NetworkSelector(**settings)
        connections.append(_Connections(net, **settings))
        made.append(KafkaNetClient(net=net, manager=connections[-1], **settings))
        return made[-1]

    try:
        return factory(**config, kafka_client=network)
    except Exception as error:
        for client in made:
            client.close()
        cause = connections[-1].cause if connections else None
        refusal = _refusal(error, cause, config)
        if refusal is None:
            raise
        raise refusal from error


def check_certificates(config: Mapping[str, Any]) -> None:
    """Read certificates and key once: clients take a wrong one for a broker that does not answer.

    Raises:
        StreamError: They cannot be used, or not together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority, certificate = config.get("ssl_cafile"), config.get("ssl_certfile")
    if authority is not None:
        try:
            context.load_verify_locations(authority)
        except OSError:
            raise StreamError(f"ssl_cafile: {authority} holds no certificates in PEM form") from None
    if certificate is not None:
        key = config.get("ssl_keyfile", certificate)
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(certificate, key, config.get("ssl_password", ""))
        except OSError:
            raise StreamError(
                f"ssl_certfile: {certificate} and the key in {key} cannot be used together: they are no pair, not in"
                " PEM form, or ssl_password_file or ssl_password_env gives another password than the key's"
            ) from None


def _refusal(error: Exception, cause: Exception | None, config: Mapping[str, Any]) -> StreamError | None:
    servers = ", ".join(config["bootstrap_servers"])
    if isinstance(cause, errors.SaslAuthenticationFailedError):
        return as_stream_error(cause, f"connecting to {servers}")
    if isinstance(error, errors.KafkaTimeoutError):
        told = f" ({explain(cause)})" if cause else ""
        if told and config["security_protocol"].startswith("SASL"):
            # The broker says no and closes; kafka-python may see the closed connection first and drop the words.
            told += "; a broker that closes the connection may be refusing the user or its password"
        return StreamUnavailableError(f"no broker at {servers} answers{told}")
    if isinstance(error, errors.KafkaError):
        return as_stream_error(error, f"connecting to {servers}")
    if isinstance(error, ValueError | TypeError | RuntimeError | AssertionError | OSError):
        return StreamError(f"kafka-python refuses its settings: {error}")
    return None


def unreachable(client: Any, settings: KafkaSettings) -> str:
    """Return that no broker can be reached, and why, for a client of `connect`; empty while one is connected."""
    manager = getattr(getattr(client, "_client", None), "_manager", None)
    if not isinstance(manager, _Connections) or manager.is_connected:
        return ""
    told = f" ({explain(manager.cause)})" if manager.cause else ""
    return f"no broker at {settings.servers} answers{told}"


class Topic(NamedTuple):
    """What the cluster says of a topic."""

    partitions: int
    identity: str
    """What tells it from another of the same name; empty where the cluster is too old to say."""
    max_bytes: int | None = None
    """What a message may have, where that was asked for and we may know it."""


def describe(settings: KafkaSettings, topics: Sequence[str], *, limits: bool = False) -> dict[str, Topic]:
    """Ask the cluster about topics, and for the largest message of each where ``limits`` are wanted.

    Raises:
        StreamUnavailableError: No broker answered.
        StreamError: Topics do not exist or may not be read; it names all of them.
    """
    config = settings.admin_config()
    admin = connect(KafkaAdminClient, config)
    try:
        described = admin.describe_topics(list(topics))
        largest = _largest(admin, topics) if limits else {}
    except errors.KafkaError as error:
        raise as_stream_error(error, f"asking {settings.servers} for topics") from error
    finally:
        admin.close()
    found: dict[str, Topic] = {}
    refusals = Refusals()
    for topic in described:
        name, code = topic["name"], topic["error_code"]
        with refusals.gather():
            if code:
                raise _not_described(code, name, settings)
            found[name] = Topic(len(topic["partitions"]), str(topic.get("topic_id") or ""), largest.get(name))
    refusals.tell()
    return found


def _not_described(code: int, name: str, settings: KafkaSettings) -> StreamError:
    if code == _UNKNOWN_TOPIC:
        return RefusedStreamError(f"topic {name} does not exist on {settings.servers}: make it, or correct its name")
    if code == _FORBIDDEN_TOPIC:
        return RefusedStreamError(f"topic {name}: the cluster does not let {_user(settings)} see it; check its ACLs")
    return as_stream_error(errors.for_code(code)(), f"topic {name}")


def check_topics(client: Any, identities: Mapping[str, str]) -> None:
    """Look at what a client of `connect` last heard of topics.

    A client that hears it before its next fetch is answered has no leader to fetch from, or the leader of another
    topic of that name; it then says nothing and never gives a record again.

    Args:
        client: A consumer.
        identities: The ids of its topics when it was opened, where they are known.

    Raises:
        StreamError: One may not be read any more, or was made anew.
    """
    cluster = client._client.cluster  # noqa: SLF001  # kafka-python shows it nowhere else
    if cluster.unauthorized_topics:
        refused = errors.TopicAuthorizationFailedError(cluster.unauthorized_topics)
        raise as_stream_error(refused, f"reading {', '.join(sorted(cluster.unauthorized_topics))}")
    for topic, identity in identities.items():
        now = cluster.topic_id(topic)
        if now is not None and str(now) != identity:
            raise StreamError(
                f"topic {topic} was made anew while it was read: it was {identity} and is {now} now, so positions mean"
                " nothing in it. Begin with a fresh state directory and group, or bring the old topic back"
            )


def shut_out(client: Any) -> bool:
    """Whether heartbeats have heard that another process goes by the name of this member of a group.

    A consumer that hears it so, and not from a commit, ends its heartbeats and waits for records for ever.
    """
    coordinator = client._coordinator  # noqa: SLF001
    with coordinator._lock:  # noqa: SLF001  # heartbeats rest while a member joins, too
        settled = coordinator.stable() and not coordinator.rejoining and not coordinator.rejoin_needed
        return settled and not coordinator._heartbeat_enabled  # noqa: SLF001


def _largest(admin: Any, topics: Sequence[str]) -> dict[str, int]:
    """``max.message.bytes`` of topics; nothing of those whose settings we may not see or that nobody tells."""
    asked = [ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": None}) for topic in topics]
    try:
        told = admin.describe_configs(asked, config_filter="all").get("topic", {})
    except errors.KafkaError:
        return {}
    return {
        topic: int(found["max.message.bytes"]["value"]) for topic, found in told.items() if "max.message.bytes" in found
    }


def _user(settings: KafkaSettings) -> str:
    return settings.sasl_plain_username or "this client"
