"""What somebody would run without adaptd: read, decode, multiply by a 64 x 10 matrix, encode, write, commit.

    python -P kafka_loops.py NAME BOOTSTRAP DATA_TOPIC ANSWER_TOPIC FORM

NAME is one of `LOOPS`. Every loop writes answers of adaptd's own forms (id, label, probabilities, time) with the id as
key, and runs until it is killed. Nothing is joined, journaled, checkpointed or measured, nothing is checked, and nobody
waits for answers before offsets are committed, except as the framework does by itself. This file imports nothing of
adaptd: the frameworks live in an environment of their own.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHAPE, CLASSES, POLL = 64, 10, 500
HEAD = struct.Struct("<8sBxHH2xdqI")
ANSWER_HEAD = struct.Struct("<8sBxHH2xdqQQI")
ANSWER = b"\xadADT\x01\x03\x07\x01"
TEMPLATE = (
    '{"version":1,"id":%s,"label":%d,"probabilities":['
    + ",".join(["%.9g"] * CLASSES)
    + '],"time":%r,"model":{"release":0,"step":0}}'
)
WEIGHTS = np.random.default_rng(0).normal(0, 0.1, (SHAPE, CLASSES)).astype(np.float32)

Row = tuple[str, float, Any]
Answer = tuple[bytes, bytes]


def note_start() -> None:
    """Write the moment and the processor's time so far into the file that the benchmark named."""
    Path(os.environ["ADAPTD_BENCHMARK_START"]).write_text(f"{time.time()} {time.process_time()}")


def once() -> Callable[[], None]:
    """A function that notes the start when it is called for the first time."""
    called: list[None] = []

    def call() -> None:
        if not called:
            called.append(None)
            note_start()

    return call


def read_json(value: bytes) -> Row:
    """Id, time and inputs of a record."""
    parsed = json.loads(value)
    return parsed["id"], parsed["time"], parsed["inputs"]


def read_binary(value: bytes) -> Row:
    """Id, time and inputs of a record."""
    _, _, size, _, time, _, _ = HEAD.unpack_from(value)
    return value[HEAD.size : HEAD.size + size].decode(), time, value[HEAD.size + size :]


def stack_json(inputs: Sequence[Any]) -> Any:
    return np.array(inputs, dtype=np.float32)


def stack_binary(inputs: Sequence[Any]) -> Any:
    return np.frombuffer(b"".join(inputs), "<f4").reshape(-1, SHAPE)


def write_json(name: str, time: float, label: int, row: Any) -> bytes:
    return (TEMPLATE % (json.dumps(name), label, *row.tolist(), time)).encode()


def write_binary(name: str, time: float, label: int, row: Any) -> bytes:
    key = name.encode()
    return ANSWER_HEAD.pack(ANSWER, 10, len(key), 0, time, label, 0, 0, CLASSES) + key + row.tobytes()


FORMS: dict[str, tuple[Callable[[bytes], Row], Callable[..., Any], Callable[..., bytes]]] = {
    "json": (read_json, stack_json, write_json),
    "binary": (read_binary, stack_binary, write_binary),
}


def answers(values: Iterable[bytes], form: str) -> list[Answer]:
    """Keys and values of the answers to a batch of records."""
    read, stack, write = FORMS[form]
    ids, times, inputs = zip(*map(read, values), strict=True)
    logits = stack(inputs) @ WEIGHTS
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    labels = probabilities.argmax(1).tolist()
    return [
        (name.encode(), write(name, time, label, row))
        for name, time, label, row in zip(ids, times, labels, probabilities, strict=True)
    ]


def kafka_python(bootstrap: str, data: str, out: str, form: str) -> None:
    from kafka import KafkaConsumer, KafkaProducer

    consumer = KafkaConsumer(
        data,
        bootstrap_servers=bootstrap,
        group_id=f"{out}-loop",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_poll_records=POLL,
    )
    producer = KafkaProducer(
        bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, linger_ms=5, batch_size=131_072
    )
    started = once()
    while True:
        polled = consumer.poll(timeout_ms=100)
        values = [record.value for records in polled.values() for record in records]
        if values:
            started()
            for key, value in answers(values, form):
                producer.send(out, value, key)
            consumer.commit_async()


def confluent(bootstrap: str, data: str, out: str, form: str, **fetching: str) -> None:
    """With the client's defaults, but for ``fetching``."""
    from confluent_kafka import Consumer, Producer

    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"{out}-loop",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            **fetching,
        }
    )
    consumer.subscribe([data])
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all", "enable.idempotence": True, "linger.ms": 5})
    started = once()
    while True:
        messages = [message for message in consumer.consume(POLL, 0.1) if message.error() is None]
        if messages:
            started()
            for key, value in answers([message.value() for message in messages], form):
                while True:
                    try:
                        producer.produce(out, value, key)
                        break
                    except BufferError:
                        producer.poll(0.05)
            producer.poll(0)
            consumer.commit(asynchronous=True)


def confluent_tuned(bootstrap: str, data: str, out: str, form: str) -> None:
    """With what adaptd sets: by default librdkafka fetches nothing for a second once 100,000 records wait."""
    fetching = {"fetch.queue.backoff.ms": "10", "queued.min.messages": "20000", "queued.max.messages.kbytes": "16384"}
    confluent(bootstrap, data, out, form, **fetching)


def kafka_python_orjson(bootstrap: str, data: str, out: str, form: str) -> None:
    """With the parser of JSON that adaptd has."""
    parse_with_orjson()
    kafka_python(bootstrap, data, out, form)


def confluent_orjson(bootstrap: str, data: str, out: str, form: str) -> None:
    """With the parser of JSON that adaptd has."""
    parse_with_orjson()
    confluent(bootstrap, data, out, form)


def parse_with_orjson() -> None:
    """Parse JSON faster from now on."""
    import orjson

    def read(value: bytes) -> Row:
        parsed = orjson.loads(value)
        return parsed["id"], parsed["time"], parsed["inputs"]

    FORMS["json"] = (read, stack_json, write_json)


def quix(bootstrap: str, data: str, out: str, form: str) -> None:
    from quixstreams import Application

    app = Application(
        broker_address=bootstrap,
        consumer_group=f"{out}-loop",
        auto_offset_reset="earliest",
        auto_create_topics=False,
        producer_extra_config={"acks": "all", "enable.idempotence": True, "linger.ms": 5},
        loglevel="ERROR",
    )
    stack = FORMS[form][1]
    write = FORMS[form][2]
    started = once()

    def answer(name: str, time: float, inputs: Any) -> bytes:
        started()
        logits = (stack([inputs]) @ WEIGHTS)[0]
        powers = np.exp(logits - logits.max())
        row = powers / powers.sum()
        return write(name, time, int(row.argmax()), row)

    def from_json(value: Any) -> bytes:
        return answer(value["id"], value["time"], value["inputs"])

    def from_binary(value: Any) -> bytes:
        return answer(*read_binary(value))

    source = app.topic(data, value_deserializer="json" if form == "json" else "bytes", key_deserializer="bytes")
    target = app.topic(out, value_serializer="bytes", key_serializer="bytes")
    app.dataframe(source).apply(from_json if form == "json" else from_binary).to_topic(target)
    app.run()


def bytewax(bootstrap: str, data: str, out: str, form: str) -> None:
    import bytewax.operators as op
    from bytewax.connectors.kafka import KafkaSinkMessage
    from bytewax.connectors.kafka import operators as kop
    from bytewax.dataflow import Dataflow
    from bytewax.testing import run_main

    flow = Dataflow("loop")
    source = kop.input("read", flow, brokers=[bootstrap], topics=[data], batch_size=POLL)

    started = once()

    def answer(messages: list[Any]) -> list[Any]:
        started()
        made = answers([message.value for message in messages], form)
        return [KafkaSinkMessage(key, value) for key, value in made]

    kop.output(
        "write",
        op.flat_map_batch("answer", source.oks, answer),
        brokers=[bootstrap],
        topic=out,
        add_config={"acks": "all", "enable.idempotence": "true", "linger.ms": "5"},
    )
    run_main(flow)


LOOPS = {
    loop.__name__: loop
    for loop in (kafka_python, kafka_python_orjson, confluent, confluent_tuned, confluent_orjson, quix, bytewax)
}

if __name__ == "__main__":
    assert Path(__file__).parent.as_posix() not in sys.path, "run with -P: a file here is called kafka.py as well"
    LOOPS[sys.argv[1]](*sys.argv[2:6])
