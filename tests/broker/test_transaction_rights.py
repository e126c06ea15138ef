"""The rights that `delivery: exactly_once` needs on a real Kafka; see docs/delivery.md."""

from __future__ import annotations

from pathlib import Path

from kafka import KafkaAdminClient

from streams.kafka import KafkaSettings
from tests.broker.daemons import Daemon, Topics, answers, committed, everything, send, small_events
from tests.broker.helpers import SinkFactory, TopicFactory
from tests.broker.rights import Rights, refused


def test_a_user_who_may_not_use_the_transactional_id_is_told_and_nothing_is_committed(
    topic: TopicFactory,
    sink: SinkFactory,
    admin: KafkaAdminClient,
    settings: KafkaSettings,
    as_guest: list[str],
    tmp_path: Path,
    client: str,
) -> None:
    topics = Topics.make(topic)
    rights = Rights(admin, topics)
    rights.grant(*rights.acls)
    send(sink(topics.data), small_events(0, 20))
    daemon = Daemon(tmp_path / "daemon", topics, settings.bootstrap_servers[0], client)
    try:
        life = daemon.start("delivery=exactly_once", *as_guest)
        refused(life, 78, f"{topics.group}-", "check the user and its ACLs")
        assert committed(admin, topics.group) == {}
        assert not everything(settings, topics.predictions)
        rights.grant_transactions()
        life = daemon.start("delivery=exactly_once", *as_guest)
        life.until(lambda status: status["events"] == 20)
        assert life.terminate() == 0, life.words
        found, again = answers(settings, topics)
        assert (len(found), again) == (20, 0)
    finally:
        daemon.end()
