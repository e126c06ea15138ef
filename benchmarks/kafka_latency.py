"""Time from a record's place in the broker's log to its answer's, while records come at a fixed rate.

What the machine and the broker allow is what a bare loop takes that gets records at the same rate, so one runs beside
each daemon.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.kafka_arena import PARTITIONS, PATIENCE, Records, running

if TYPE_CHECKING:
    from benchmarks.kafka import Bench

TARGET_P99_MS = 50.0
WARM_SHARE = 0.25
"""Share of the records, from the first, that are not counted."""
PIECE_SECONDS = 0.005
"""As long as producers linger unless told otherwise, so that the broker's work is that of an ordinary writer."""


def latency(bench: Bench, name: str, form: str, rate: float) -> dict[str, Any]:
    """Milliseconds from append to answer of a daemon and of the bare loop with its client, in turn at the same rate.

    Each figure is the median over the turns.
    """
    client = name.rpartition("/")[2]
    turns = [(waits(bench, name, form, rate), _bare(bench, client, form, rate)) for _ in range(bench.options.turns)]
    own, bare = map(_medians, zip(*turns, strict=True))
    return own | {"reaches_target": own["p99_ms"] < TARGET_P99_MS, "bare_loop": bare}


def _medians(turns: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The median of each figure, and every turn's `p99_ms`."""
    medians = {figure: statistics.median(turn[figure] for turn in turns) for figure in turns[0]}
    return medians | {"p99_ms_of_runs": [turn["p99_ms"] for turn in turns]}


def _bare(bench: Bench, client: str, form: str, rate: float) -> dict[str, float]:
    """Of a bare loop; one that gave nothing for a minute is begun anew once, and noted."""
    try:
        return waits(bench, client, form, rate)
    except RuntimeError as error:
        bench.stood_still.append(f"{form} {client}: {error}")
        return waits(bench, client, form, rate)


def waits(bench: Bench, name: str, form: str, rate: float) -> dict[str, float]:
    """Milliseconds from append to answer of one contestant, by the broker's stamps of a millisecond each."""
    arena, count = bench.arena, int(rate * bench.options.seconds)
    data, answers = arena.topic("live"), arena.topic("live-answers")
    with running(command_of(bench, name, form, data, answers), bench.directory / "log.txt") as process:
        produce(arena.bootstrap, data, form, 1, rate)
        arena.wait(answers, 1, lambda: process.poll() is None, PATIENCE)
        command = [sys.executable, "-m", "benchmarks.kafka_latency", arena.bootstrap, data, form, str(count), str(rate)]
        subprocess.run(command, check=True)
        arena.wait(answers, count, lambda: process.poll() is None, PATIENCE)
    written, answered = arena.times(data), arena.times(answers)
    chosen = counted(count)
    times = sorted(1e3 * (answered[key] - at) for key, at in written.items() if key in chosen)
    appended = [written[key] for key in chosen]
    arena.drop(data)
    arena.drop(answers)
    return {
        "records_per_second": round((len(appended) - 1) / (max(appended) - min(appended))),
        "wanted_records_per_second": round(rate),
        "p50_ms": round(statistics.median(times), 1),
        "p99_ms": round(times[int(0.99 * len(times))], 1),
        "p999_ms": round(times[int(0.999 * len(times))], 1),
        "max_ms": round(times[-1], 1),
    }


def command_of(bench: Bench, name: str, form: str, data: str, answers: str) -> list[str]:
    """The command of a daemon, or of a bare loop, on a topic that records are being written to."""
    kind, _, client = name.rpartition("/")
    if kind:
        return [sys.executable, "-m", "engine.cli", "run", str(bench.policy(client, form, data, answers, {}))]
    return bench.loop(name, form, answers, data)


def counted(count: int) -> frozenset[bytes]:
    """Keys of the records that count."""
    return frozenset(b"event-%07d" % number for number in range(int(WARM_SHARE * count), count))


def produce(bootstrap: str, topic: str, form: str, count: int, rate: float) -> None:
    """Append records at a rate, in small pieces; what is late is made up for."""
    records = Records(form)
    made = [records.data(number) for number in range(count)]
    send, serve, flush = producer(bootstrap)
    started, sent = time.monotonic(), 0
    while sent < count:
        due = min(count, int((time.monotonic() - started) * rate) + 1)
        for number in range(sent, due):
            key, value = made[number]
            send(topic, value, key, number // 8 % PARTITIONS)
        sent = due
        serve(0)
        time.sleep(PIECE_SECONDS)
    flush()


def producer(bootstrap: str) -> tuple[Any, Any, Any]:
    """Functions that send, take in reports, and flush.

    They are of the cheapest client there is: the writer must not be what is measured.
    """
    try:
        from confluent_kafka import Producer
    except ImportError:
        from kafka import KafkaProducer

        slow: Any = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=5)

        def send(topic: str, value: bytes, key: bytes, partition: int) -> None:
            slow.send(topic, value, key, partition=partition)

        return send, lambda _: None, slow.flush
    fast = Producer({"bootstrap.servers": bootstrap})
    return fast.produce, fast.poll, fast.flush


if __name__ == "__main__":
    produce(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
