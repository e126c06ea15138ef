"""Where partitions start that librdkafka is given, and what to say of a position that is not there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaException, Message, TopicPartition

from streams.base import Found, Partition, Positions, StreamError, StreamUnavailableError
from streams.confluent_client import error_of
from streams.kafka_fetch import gone
from streams.kafka_note import found_beside
from streams.seams import CLOCK


def look_up(
    consumer: Consumer, partitions: Sequence[TopicPartition], *, group: bool, member: str, timeout: float
) -> dict[Partition, Found]:
    """Ask the cluster what it has of partitions, and its group if there is one, within ``timeout`` seconds.

    Raises:
        KafkaException: It does not answer, or may not be asked.
    """
    if not partitions:
        return {}
    deadline = CLOCK.monotonic() + timeout
    asked = [TopicPartition(tp.topic, tp.partition, OFFSET_BEGINNING) for tp in partitions]
    found = {partition: Found(earliest) for partition, earliest in _offsets(consumer, asked, timeout).items()}
    if not group:
        return found
    left = max(0.1, deadline - CLOCK.monotonic())
    plain = [TopicPartition(tp.topic, tp.partition) for tp in partitions]
    for tp in _checked(consumer.committed(plain, timeout=left)):
        if tp.offset >= 0:
            earliest = found[tp.topic, tp.partition].earliest
            found[tp.topic, tp.partition] = found_beside(tp.metadata, earliest, tp.offset, member)
    return found


def edges(consumer: Consumer, partitions: Iterable[Partition], *, last: bool, timeout: float) -> Positions:
    """Return the first offset that each partition still has, or where it ends; empty if no broker tells it in time."""
    asked = [TopicPartition(*partition, OFFSET_END if last else OFFSET_BEGINNING) for partition in partitions]
    try:
        return _offsets(consumer, asked, timeout)
    except KafkaException:
        return {}


def _offsets(consumer: Consumer, asked: list[TopicPartition], timeout: float) -> Positions:
    """What librdkafka calls times may be an end of the partition as well."""
    return {(tp.topic, tp.partition): tp.offset for tp in _checked(consumer.offsets_for_times(asked, timeout))}


def _checked(partitions: Sequence[TopicPartition]) -> Sequence[TopicPartition]:
    for tp in partitions:
        if tp.error is not None:
            raise KafkaException(tp.error)
    return partitions


def out_of_range(consumer: Consumer, message: Message, timeout: float) -> StreamError:
    """Return what to say of a position that a partition does not have."""
    topic, number, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None
    assert number is not None
    assert offset is not None
    tp = TopicPartition(topic, number)
    try:
        earliest, end = consumer.get_watermark_offsets(tp, timeout=timeout)
    except KafkaException as error:
        return StreamUnavailableError(f"offset {offset} of {topic}-{number} is out of range ({error_of(error).str()})")
    if offset < earliest:
        return StreamError(gone(tp, offset, earliest))
    # A topic that was made anew may have grown past the position already; librdkafka goes by the leader's epochs.
    problem = f"lies past its end {end}" if offset > end else f"does not go on from what was read, up to its end {end}"
    return StreamError(
        f"offset {offset} of {topic}-{number} {problem}: the topic was made anew or this is"
        " another cluster. Use the cluster that the position is of, or begin with a fresh state directory and group"
    )
