"""Sources, sinks and transactions on Kafka through the library that the settings choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from streams.kafka_settings import KafkaSettings

if TYPE_CHECKING:
    from streams.confluent_sink import ConfluentClient, ConfluentSink
    from streams.confluent_source import ConfluentSource
    from streams.confluent_transactions import ConfluentTransactions
    from streams.kafka import KafkaSource
    from streams.kafka_sink import KafkaClient, KafkaSink
    from streams.kafka_transactions import KafkaTransactions

    AnySource = KafkaSource | ConfluentSource
    AnyClient = KafkaClient | ConfluentClient
    AnySink = KafkaSink | ConfluentSink
    AnyTransactions = KafkaTransactions | ConfluentTransactions


def source_of(
    topics: Sequence[str],
    settings: KafkaSettings,
    *,
    group: str | None = None,
    assignment: Literal["static", "group"] = "static",
    member: str | None = None,
) -> AnySource:
    """Return a source of topics; see `streams.kafka.KafkaSource` for what it is given.

    Raises:
        StreamError: ``topics`` or ``group`` make no sense.
    """
    if settings.client == "confluent":
        from streams.confluent_source import ConfluentSource

        return ConfluentSource(topics, settings, group=group, assignment=assignment, member=member)
    from streams.kafka import KafkaSource

    return KafkaSource(topics, settings, group=group, assignment=assignment, member=member)


def client_of(settings: KafkaSettings, *, transactional_id: str | None = None) -> AnyClient:
    """Return a producer for sinks to share; nothing is connected before the first of them opens."""
    if settings.client == "confluent":
        from streams.confluent_sink import ConfluentClient

        return ConfluentClient(settings, transactional_id=transactional_id)
    from streams.kafka_sink import KafkaClient

    return KafkaClient(settings, transactional_id=transactional_id)


def sink_of(topic: str, client: AnyClient, *, max_pending: int = 10_000, send_timeout: float = 30.0) -> AnySink:
    """Return a sink that writes a topic through ``client``; see `streams.kafka.KafkaSink` for what it is given."""
    from streams.kafka_sink import KafkaClient, KafkaSink

    if isinstance(client, KafkaClient):
        return KafkaSink(topic, client.settings, client=client, max_pending=max_pending, send_timeout=send_timeout)
    from streams.confluent_sink import ConfluentSink

    return ConfluentSink(topic, client.settings, client=client, max_pending=max_pending, send_timeout=send_timeout)


def transactions_of(client: AnyClient, source: AnySource, *, group: str, owner: str) -> AnyTransactions:
    """Return what commits that which sinks of ``client`` send together with offsets of ``source`` in its group."""
    from streams.kafka_sink import KafkaClient

    if isinstance(client, KafkaClient):
        from streams.kafka_transactions import KafkaTransactions

        return KafkaTransactions(client, group, owner, source.group_metadata, source.streams)
    from streams.confluent_transactions import ConfluentTransactions

    return ConfluentTransactions(client, group, owner, source.group_metadata, source.streams)
