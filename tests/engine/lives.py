"""A core with its keeper, journal and cutter in a state directory: what is left of a daemon without threads."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

from prometheus_client import CollectorRegistry

from engine.checkpoint.store import CheckpointStore
from engine.core import Core
from engine.keeper import Keeper
from engine.metrics import Metrics
from engine.runner import Runner
from engine.timecutter import TimeCutter
from engine.writer import Outgoing, Writer
from streams.journal import Journal, Kind
from tests.engine.cores import events, feedback

KINDS = {"data": Kind.DATA, "feedback": Kind.FEEDBACK}
SIZE = 16


class Answered:
    """Stands for the writer and keeps the answers."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[bytes, int, int]] = {}

    def put(self, item: Outgoing) -> None:
        if item.answers is not None:
            given = item.answers
            for event, row in zip(given.events, given.probabilities, strict=True):
                self.rows[event.id] = (row.tobytes(), given.release, given.step)

    def wait_flushed(self) -> None:
        """What is put is out."""


class Life:
    """One life of a process on a state directory; it ends with `crash`.

    A background job is taken in whenever the number of the next journal entry is a multiple of ``take_in``, so that
    every life decides the same wherever it goes on; in a replay, the journal says when.
    """

    def __init__(
        self,
        directory: Path,
        make: Callable[[], Core],
        *,
        batches: int = 16,
        save_every: float = 4,
        take_in: int = 5,
        digest: str = "0" * 64,
    ) -> None:
        self.store = CheckpointStore(directory)
        self.store.lock()
        self.store.sweep()
        self.core = make()
        self.keeper = Keeper(self.store, Journal(directory), digest)
        self.save_every, self.take_in = save_every, take_in
        restored = self.keeper.restore(self.core)
        positions, entries = restored if restored is not None else ({}, [])
        self.answered = Answered()
        metrics = Metrics(CollectorRegistry())
        self.runner = Runner(self.core, self.keeper, cast("Writer", self.answered), metrics, positions)
        self.cutter = TimeCutter(KINDS, SIZE, entries)
        partitions = [("data", 0), ("feedback", 0)]
        self.cutter.assigned(partitions)
        begin = [positions.get(partition, 0) for partition in partitions]
        self.cutter.feed(events(begin[0], batches * SIZE - begin[0]), 0.0)
        self.cutter.feed(feedback(begin[1], batches * SIZE - begin[1]), 0.0)
        self.cutter.ended(partitions)
        if restored is None:
            self.save()

    def save(self) -> None:
        self.keeper.write(self.runner.snapshot())

    def maybe_save(self) -> None:
        assert self.keeper.saved_step is not None
        if self.core.job is None and self.keeper.sequence - self.keeper.saved_step >= self.save_every:
            self.save()

    def step(self) -> bool:
        """Do the next thing; False when there is none."""
        replaying = self.cutter.replaying
        if self.core.job is not None and not replaying and (self.keeper.sequence + 1) % self.take_in == 0:
            self.core.learner.run(self.core.job)
            self.runner.done()
            self.maybe_save()
            self.core.make_job()
            return True
        if not replaying:
            self.maybe_save()
        cut = self.cutter.next(0.0)
        if cut is not None:
            self.runner.apply([cut])
        return cut is not None

    def run(self, until: float = math.inf) -> Life:
        """Go on until the journal has so many entries, or to the end."""
        while self.keeper.sequence < until and self.step():
            pass
        return self

    def finish(self) -> Life:
        """Go on to the end and do what is left to do."""
        self.run()
        while self.core.job is not None:
            self.core.learner.run(self.core.job)
            self.runner.done()
            self.core.make_job()
        self.runner.finish()
        return self

    def crash(self) -> None:
        self.keeper.journal.close()
        self.store.close()

    def state(self) -> dict[str, bytes]:
        """Everything that a checkpoint of this instant would hold."""
        snapshot = self.runner.snapshot()
        found = {"meta": repr(sorted(snapshot.meta.items())).encode()}
        for name, write in snapshot.parts.items():
            file = io.BytesIO()
            write(file)
            found[name] = file.getvalue()
        return found
