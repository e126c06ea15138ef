"""A disk that refuses the journal or a checkpoint: the daemon waits, says so, and ends in good order if it lasts."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from engine.daemon import Daemon
from engine.errors import StorageError
from engine.launch import run_policy
from engine.policyfile import load
from engine.status import status
from streams import journal as journals
from streams.journal import Entry, JournalError, Kind
from tests.engine.cores import make_core
from tests.engine.lives import Life
from tests.engine.test_restarts import MODEL, POLICY

EVENTS = 300
CODES = [errno.ENOSPC, errno.EIO, errno.EROFS]


class Disk:
    """Refuses what the journal writes, as long as it is told to."""

    def __init__(self) -> None:
        self.code = 0
        self.refused = 0
        self.passed = 0
        self.break_at = -1
        self.mend_after = 1 << 30
        self._write = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        if self.passed == self.break_at and self.refused < self.mend_after:
            self.refused += 1
            raise OSError(self.code, os.strerror(self.code))
        self.passed += 1
        return self._write(descriptor, data)


class FakeOs:
    """The module `os` but for writing."""

    def __init__(self, disk: Disk) -> None:
        self.write = disk.write

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(journals, "os", FakeOs(made))
    monkeypatch.setattr("engine.keeper.BACKOFF_SECONDS", (0.001,))
    return made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text(POLICY.replace("./events}", "./events.jsonl}"))
    (tmp_path / "model.py").write_text(MODEL)
    rows = [{"id": f"e{n}", "inputs": [n % 3, 1.5, -0.25, 0.125], "time": n} for n in range(EVENTS)]
    told = [{"id": f"e{n}", "label": n % 3, "time": n + 5} for n in range(EVENTS)]
    for name, lines in (("events", rows), ("feedback", told)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def answers(place: Path) -> list[str]:
    return (place / "predictions.jsonl").read_text().splitlines()


def run(place: Path, *flags: str, watch: Callable[[Daemon], Any] | None = None) -> None:
    run_policy(load(str(place / "policy.yaml"), flags, {}), watch=watch)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_journal_that_the_disk_refuses_for_a_while_is_waited_for_and_said_so(
    code: int, place: Path, tmp_path: Path, disk: Disk
) -> None:
    disk.code, disk.break_at = code, 5
    seen: list[str] = []

    async def watch(daemon: Daemon) -> None:
        while os.strerror(code) not in (told := status(daemon)["waiting_for"]):
            await anyio.sleep(0.001)
        before = daemon.core.counts["events"]
        await anyio.sleep(0.02)
        assert daemon.core.counts["events"] == before
        seen.append(told)
        disk.break_at = -1

    run(place, watch=watch)
    assert len(seen) == 1
    assert disk.refused > 0
    assert [json.loads(line)["id"] for line in answers(place)] == [f"e{n}" for n in range(EVENTS)]


def test_one_that_lasts_ends_the_daemon_and_nothing_is_lost(place: Path, disk: Disk) -> None:
    disk.code, disk.break_at = errno.ENOSPC, 5
    with pytest.raises(BaseExceptionGroup) as told:
        run(place, "checkpoint.patience=50ms")
    assert told.group_contains(StorageError, match=r"No space left.*more than checkpoint\.patience; nothing is lost")
    disk.break_at = -1
    run(place)
    lines = list(dict.fromkeys(answers(place)))  # what had not been flushed is answered again, and equal
    assert [json.loads(line)["id"] for line in lines] == [f"e{n}" for n in range(EVENTS)]


def test_a_daemon_that_waits_for_the_disk_ends_when_it_is_told_to(place: Path, disk: Disk) -> None:
    disk.code, disk.break_at = errno.ENOSPC, 5

    async def watch(daemon: Daemon) -> None:
        while not daemon.runner.keeper.trouble:
            await anyio.sleep(0.001)
        daemon.stop()

    with pytest.raises(BaseExceptionGroup) as told:
        run(place, watch=watch)
    assert told.group_contains(StorageError, match="the next start goes on from there")


def test_a_segment_that_cannot_be_begun_costs_a_checkpoint_and_no_more(tmp_path: Path, disk: Disk) -> None:
    life = Life(tmp_path, make_core).run(8)
    disk.code, disk.break_at = errno.ENOSPC, disk.passed
    with pytest.raises(StorageError, match=r"checkpoint 8 was not saved: .*No space left"):
        life.save()
    disk.break_at = -1
    assert life.keeper.saved_step != 8
    life.finish()
    life.save()
    assert life.core.counts == Life(tmp_path / "whole", make_core).finish().core.counts


def test_checkpoints_that_fail_for_too_long_end_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path, make_core, save_every=float("inf")).run(8)
    now = [0.0]

    class Clock:
        def monotonic(self) -> float:
            return now[0]

        def time(self) -> float:
            return 0.0

    life.keeper._clock, life.keeper._patience = Clock(), 60.0

    def refuse(*args: object, **more: object) -> None:
        raise StorageError("no")

    with monkeypatch.context() as patch:
        patch.setattr(life.store, "save", refuse)
        with pytest.raises(StorageError, match="no"):
            life.save()
    now[0] = 59.0
    life.run(10)
    now[0] = 61.0
    with pytest.raises(StorageError, match="no checkpoint could be written for 61 s, which is more than"):
        life.run(12)
    life.crash()
    assert Life(tmp_path, make_core).run(12).keeper.sequence == 12


def test_a_closed_journal_ends_the_daemon_at_once(tmp_path: Path) -> None:
    life = Life(tmp_path, make_core).run(4)
    life.keeper.journal.close()
    with pytest.raises(JournalError, match="restart from the last checkpoint"):
        life.keeper.append(Entry(5, Kind.TICK, 0.0))
