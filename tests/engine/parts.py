"""A daemon put together by hand on streams in memory, and the errors that end it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import numpy as np
from prometheus_client import CollectorRegistry

from engine.checkpoint.store import CheckpointStore
from engine.core import Core
from engine.cutter import ArrivalCutter, Cutter
from engine.daemon import Daemon
from engine.floors import Floors
from engine.keeper import Keeper
from engine.launch import _start, covered
from engine.metrics import Metrics
from engine.reader import Reader
from engine.runner import Runner
from engine.timecutter import TimeCutter
from engine.writer import Writer
from streams.base import Positions, Sink, Source, Transactions
from streams.codec import InputSpec, decode_prediction, encode_event, encode_feedback
from streams.journal import Journal, Kind
from streams.memory import MemorySink, MemorySource
from tests.engine.cores import FEATURES, label_of, make_core, rows

KINDS = {"data": Kind.DATA, "feedback": Kind.FEEDBACK}
SPEC = InputSpec((FEATURES,), np.dtype("<f4"))
SIZE = 16


def fill(source: MemorySource, start: int, count: int) -> MemorySource:
    """Append events, and the label of each, a second later than its event."""
    for number, row in enumerate(rows(start, count), start):
        source.append("data", encode_event(f"e{number}", row, time=float(number)))
        source.append("feedback", encode_feedback(f"e{number}", label=label_of(row), time=float(number + 1)))
    return source


def memory(count: int, *, bounded: bool = True) -> MemorySource:
    return fill(MemorySource({"data": 1, "feedback": 1}, bounded=bounded), 0, count)


@contextmanager
def daemon_on(
    directory: Path,
    source: Source,
    *,
    core: Core | None = None,
    predictions: Sink | None = None,
    letters: Sink | None = None,
    by_time: bool = False,
    every: float = 1e9,
    high: int = 1000,
    transactions: Transactions | None = None,
    window: float = 1e6,
    metrics: Metrics | None = None,
) -> Iterator[Daemon]:
    """A daemon as `engine.launch` puts it together, on a state directory that it holds until the block ends."""
    core = core or make_core(background=not by_time)
    with CheckpointStore(directory, reserve_bytes=0) as store:
        store.sweep()
        keeper = Keeper(store, Journal(directory), "0" * 64)
        restored = keeper.restore(core)
        positions, entries = restored if restored is not None else ({}, [])
        readers: list[Reader] = []

        def flushed(reached: Positions, floors: Positions) -> None:
            readers[0].commit(reached, floors)

        metrics = metrics or Metrics(CollectorRegistry())
        writer = Writer(
            predictions or MemorySink(),
            letters,
            form="json",
            flushed=flushed,
            metrics=metrics,
            transactions=transactions,
        )
        cutter: Cutter = TimeCutter(KINDS, SIZE, entries)
        if not by_time:
            cutter = ArrivalCutter(KINDS, SIZE, entries, max_delay=0.001)
        daemon = Daemon(
            runner=Runner(core, keeper, writer, metrics, positions, Floors(KINDS, window if source.shared else None)),
            cutter=cutter,
            readers=readers,
            writer=writer,
            metrics=metrics,
            checkpoint_every=every,
        )
        start, taken = _start(positions, daemon.runner.taken, entries)
        readers.append(
            Reader(
                source,
                KINDS,
                SPEC,
                start,
                hand_over=daemon.hand_over,
                revoked=daemon.handover.revoked,
                high=high,
                taken=taken,
                exact=transactions is not None,
            )
        )
        readers[0].retention.covered = partial(covered, store)
        daemon.readers = readers
        try:
            yield daemon
        finally:
            keeper.journal.close()


async def run(daemon: Daemon, beside: Callable[[Daemon], object] | None = None) -> None:
    """Run to the end, or fail before the whole test suite hangs; ``beside`` is an async function that runs with it."""
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            if beside is not None:
                tasks.start_soon(beside, daemon)  # type: ignore[arg-type]
            await daemon.run()


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that other threads bring about."""
    while not condition():
        await anyio.sleep(0.001)


def resting(daemon: Daemon) -> bool:
    """Whether nothing is being done: no batch, no background job, nothing between two of them."""
    idle = daemon.core.job is None and daemon._job is None and not daemon.turn.locked()
    return idle and daemon.state == "waiting for records"


def errors_of(error: BaseException) -> list[BaseException]:
    """The errors in a group, however deep."""
    if isinstance(error, BaseExceptionGroup):
        return [inner for each in error.exceptions for inner in errors_of(each)]
    return [error]


def answered(sink: MemorySink) -> list[str]:
    return [decode_prediction(message.value).id for message in sink.messages]


def names(start: int, end: int) -> list[str]:
    return [f"e{number}" for number in range(start, end)]


def kinds_of(error: BaseException) -> Sequence[type[BaseException]]:
    return [type(one) for one in errors_of(error)]
