import threading

import pytest

from streams.base import Message, Sink, Source, StreamError
from streams.files import FileSink, FileSource
from streams.memory import MemorySink, MemorySource
from tests.streams.test_files import Start


def filled(count: int = 4, partitions: int = 1, *, bounded: bool = True) -> MemorySource:
    source = MemorySource({"data": partitions}, bounded=bounded)
    for number in range(count):
        source.append("data", b"%d" % number, partition=number % partitions)
    return source


def test_records_come_in_order_from_every_partition() -> None:
    source = filled(10, 2)
    source.open(Start())
    records = [*source.poll(4, 0), *source.poll(9, 0)]
    for partition in (0, 1):
        mine = [record for record in records if record.partition == partition]
        assert [int(record.value) for record in mine] == list(range(partition, 10, 2))
        assert [(record.offset, record.end) for record in mine] == [(at, at + 1) for at in range(5)]
    assert source.ended() == {("data", 0), ("data", 1)}


def test_reading_begins_where_it_is_told_or_where_it_was_committed() -> None:
    source = filled()
    source.open(Start())
    source.poll(9, 0)
    source.commit({("data", 0): 2})
    source.close()
    source.open(Start())
    assert source.committed() == {("data", 0): 2}
    assert source.lag() == {("data", 0): 2}
    assert [record.offset for record in source.poll(9, 0)] == [2, 3]
    source.open(Start({("data", 0): 1}))
    assert [record.offset for record in source.poll(1, 0)] == [1]


def test_a_position_that_is_not_there_is_refused() -> None:
    source = filled()
    source.trim({("data", 0): 2})
    for position in (1, 5):
        with pytest.raises(StreamError, match="holds offsets 2 to 4"):
            source.open(Start({("data", 0): position}))


def test_trimmed_records_are_forgotten_and_offsets_stay() -> None:
    source = filled()
    source.trim({("data", 0): 3})
    source.trim({("data", 0): 1})
    assert source.append("data", b"new").offset == 4
    source.open(Start())
    assert [(record.offset, record.value) for record in source.poll(9, 0)] == [(3, b"3"), (4, b"new")]


def test_a_paused_stream_gives_nothing() -> None:
    source = filled()
    source.open(Start())
    source.pause(["data"])
    assert list(source.poll(9, 0)) == []
    assert source.ended() == frozenset()
    source.resume(["data"])
    assert len(source.poll(9, 0)) == 4


def test_a_waiting_poll_gets_what_another_thread_appends_and_ends_when_it_finishes() -> None:
    source = filled(0, bounded=False)
    source.open(Start())
    assert source.ended() == frozenset()
    producer = threading.Thread(target=lambda: source.append("data", b"late", key=b"k", timestamp=2.0))
    producer.start()
    [record] = source.poll(9, 60)
    producer.join()
    assert (record.value, record.key, record.timestamp) == (b"late", b"k", 2.0)
    ender = threading.Thread(target=source.finish)
    ender.start()
    assert list(source.poll(9, 60)) == []
    ender.join()
    assert source.bounded
    assert source.ended() == {("data", 0)}


def test_a_sink_keeps_messages_and_knows_what_was_flushed() -> None:
    sink = MemorySink("predictions")
    with pytest.raises(StreamError, match="predictions is not open"):
        sink.send([Message(None, b"1")])
    sink.open()
    sink.send([Message(None, b"1")])
    assert sink.flushed == 0
    sink.flush(1)
    assert sink.flushed == 1
    sink.send([Message(None, b"2")])
    sink.close()
    sink.close()
    assert (sink.name, sink.flushed, [message.value for message in sink.messages]) == ("predictions", 2, [b"1", b"2"])


def test_files_and_memory_keep_the_promises_of_sources_and_sinks() -> None:
    sources: tuple[type[Source], ...] = (MemorySource, FileSource)
    sinks: tuple[type[Sink], ...] = (MemorySink, FileSink)
    for made, promise in [(source, Source) for source in sources] + [(sink, Sink) for sink in sinks]:
        names = {name for name in vars(promise) if not name.startswith("_")}
        assert names <= set(dir(made))


def test_a_poll_returns_at_once_only_when_every_partition_has_ended() -> None:
    source = filled(1, 2)
    source.pause(["data"])
    source.open(Start())
    assert source.ended() == {("data", 1)}
    producer = threading.Thread(target=lambda: source.append("data", b"wakes the poll"))
    source.resume(["data"])
    assert len(source.poll(9, 60)) == 1
    producer.start()
    producer.join()
    assert len(source.poll(9, 60)) == 1
    assert list(source.poll(9, 60)) == []
