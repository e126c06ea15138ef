from __future__ import annotations

import pytest

from streams.base import Message, Positions, StreamUnavailableError
from streams.confluent_sink import ConfluentClient, ConfluentSink
from streams.confluent_source import ConfluentSource
from streams.confluent_transactions import ConfluentTransactions
from streams.kafka import KafkaSettings
from tests.broker.helpers import LIMIT, Keeper, Opened, SinkFactory, TopicFactory, fresh_group, poll_until, read, write


@pytest.fixture(params=["confluent"])
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_answers_and_offsets_are_seen_together_and_a_zombie_is_shut_out(
    topic: TopicFactory, settings: KafkaSettings, source: Opened, sink: SinkFactory
) -> None:
    data, answers, group = topic(2), topic(), fresh_group()
    write(sink(data), 10)
    keeper = Keeper()
    reader = ConfluentSource([data], settings, group=group, assignment="group", member="m")
    reader.open(keeper)
    made: list[ConfluentTransactions] = []

    def begin_life() -> tuple[ConfluentTransactions, ConfluentSink, Positions]:
        shared = ConfluentClient(settings, transactional_id=f"{group}-m")
        made.append(ConfluentTransactions(shared, group, "m", reader.group_metadata, [data]))
        committed = made[-1].open()
        out = ConfluentSink(answers, settings, client=shared)
        out.open()
        return made[-1], out, committed

    try:
        first, out, committed = begin_life()
        assert committed == {}
        poll_until([reader], lambda: len(keeper.owned) == 2)
        first.begin()
        out.send([Message(None, b"a")])
        first.commit({(data, 0): 3}, {(data, 0): 1}, LIMIT)
        first.begin()
        out.send([Message(None, b"never seen")])
        out.flush(LIMIT)
        second, later, committed = begin_life()
        assert committed == {(data, 0): 3}
        with pytest.raises(StreamUnavailableError, match="the transaction failed"):
            first.commit({(data, 0): 9}, None, LIMIT)
        second.begin()
        later.send([Message(None, b"b")])
        second.commit({(data, 0): 4}, None, LIMIT)
        seen = source(answers)
        assert [record.value for record in read(seen, 2)] == [b"a", b"b"]
        poll_until([seen], lambda: seen.lag() == {(answers, 0): 0})  # past the marks of transactions
        assert second.recover() == {}
    finally:
        for one in made:
            one.close()
        reader.close()
    again = Keeper()
    after = ConfluentSource([data], settings, group=group, assignment="group", member="m")
    after.open(again)
    try:
        poll_until([after], lambda: len(again.owned) == 2)
        assert after.committed() == {(data, 0): 4}
    finally:
        after.close()


def test_a_process_that_is_not_in_its_group_begins_no_transaction(topic: TopicFactory, settings: KafkaSettings) -> None:
    shared = ConfluentClient(settings, transactional_id=fresh_group())
    transactions = ConfluentTransactions(shared, "g", "m", lambda: None, [topic()])
    with pytest.raises(StreamUnavailableError, match="has not joined group g"):
        transactions.begin()
    transactions.close()
