"""What kafka-python fetched, as records, and where its fetcher needs help."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kafka import TopicPartition, errors

from streams.base import Partition, Positions, Record


def free_slot(consumer: Any) -> None:
    """Let records that were left over when their partition was paused be found again.

    kafka-python 3.0 looks for them only while its slot for the records in turn holds None, but a set of records that
    is used up stays in there, false yet not None: with nothing else to read, the resumed partition stands still for
    ever.
    """
    fetcher: Any = getattr(consumer, "_fetcher", None)
    if not getattr(fetcher, "_next_partition_records", True):
        fetcher._next_partition_records = None  # noqa: SLF001


def offsets(
    consumer: Any, partitions: Sequence[TopicPartition], *, last: bool, timeout: float
) -> dict[TopicPartition, int]:
    """Ask for the first offset that each partition still has, or for where it ends, within ``timeout`` seconds.

    Raises:
        KafkaError: No broker tells it, or a partition has no leader: kafka-python asks for the others and does not find
            it in the answer.
    """
    ask = consumer.end_offsets if last else consumer.beginning_offsets
    try:
        found: dict[TopicPartition, int] = ask(partitions, timeout_ms=round(timeout * 1000))
    except KeyError as error:
        raise errors.LeaderNotAvailableError(f"{error.args[0]} has no leader") from error
    return found


def edges(consumer: Any, partitions: Iterable[Partition], *, last: bool, timeout: float) -> Positions:
    """Return what `offsets` does; empty if no broker tells it in time."""
    try:
        found = offsets(consumer, [TopicPartition(*p) for p in partitions], last=last, timeout=timeout)
    except errors.KafkaError:
        return {}
    return {(tp.topic, tp.partition): offset for tp, offset in found.items()}


def gone(tp: TopicPartition, offset: int, earliest: int) -> str:
    """Return what to say of a position that retention has removed."""
    return (
        f"offset {offset} of {tp.topic}-{tp.partition} is gone, the earliest is {earliest}: restore a checkpoint whose"
        f" positions are still kept, or begin at {earliest} with a fresh state directory and group and do without the"
        f" {earliest - offset} records between, or keep records longer (retention.ms, retention.bytes of the topic)"
    )


def records(fetched: Mapping[TopicPartition, Sequence[Any]]) -> list[Record]:
    """Return what `KafkaConsumer.poll` gave, in order within each partition."""
    return [
        Record(
            tp.topic,
            tp.partition,
            r.offset,
            r.offset + 1,
            r.timestamp / 1000 if r.timestamp >= 0 else math.nan,
            r.key,
            r.value if r.value is not None else b"",
            tuple((name, content or b"") for name, content in r.headers) if r.headers else (),
        )
        for tp, records in fetched.items()
        for r in records
    ]
