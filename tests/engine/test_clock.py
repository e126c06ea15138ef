"""A wall clock that jumps by days changes what is reported as an age, and nothing else."""

from pathlib import Path

from prometheus_client import CollectorRegistry

from engine.metrics import Metrics
from streams.codec import encode_event
from streams.memory import MemorySink, MemorySource
from tests.engine.cores import choice, make_core, rows
from tests.engine.parts import daemon_on, memory, run

DAY = 86_400.0


class Jumping:
    """A clock that is set a day forward or back whenever it is looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def monotonic(self) -> float:
        raise AssertionError("reports are about the wall clock")

    def time(self) -> float:
        self.looks += 1
        return 1.7e9 + (DAY if self.looks % 2 else -DAY)


async def test_answers_and_state_are_the_same_under_a_clock_that_jumps(tmp_path: Path) -> None:
    sinks, clock = [MemorySink(), MemorySink()], Jumping()
    for number, sink in enumerate(sinks):
        core = make_core(choice("adaptation", "rotta", capacity=16, interval=16), choice("reweighting", "age"))
        metrics = Metrics(CollectorRegistry(), clock) if number else None
        with daemon_on(
            tmp_path / str(number), memory(200), core=core, predictions=sink, by_time=True, metrics=metrics
        ) as daemon:
            await run(daemon)
    assert clock.looks > 10
    assert sinks[0].messages == sinks[1].messages
    (first, *_), (second, *_) = (sorted((tmp_path / n).glob("ckpt-*"), reverse=True) for n in "01")
    for file in first.iterdir():
        assert file.name == "MANIFEST" or file.read_bytes() == (second / file.name).read_bytes()


async def test_ages_are_never_negative(tmp_path: Path) -> None:
    source, registry = MemorySource({"data": 1, "feedback": 1}, bounded=True), CollectorRegistry()
    for number, row in enumerate(rows(0, 40)):
        source.append("data", encode_event(f"e{number}", row, time=float(number)), timestamp=1.7e9 + DAY * (number % 3))
    with daemon_on(tmp_path, source, metrics=Metrics(registry, Jumping())) as daemon:
        await run(daemon)
        daemon.export()
    assert registry.get_sample_value("adaptd_latency_seconds_sum") is not None
    ages = [s.value for family in registry.collect() for s in family.samples if "seconds" in s.name]
    assert min(ages) >= 0
