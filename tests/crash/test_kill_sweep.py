"""Kill the daemon at every failpoint and at random moments; it must end as if nothing had happened."""

import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from blake3 import blake3

from tests.crash import workload
from tests.crash.conftest import POLICIES, Budget, Tell
from tests.crash.results import KILLS
from tests.crash.sweep import FileTrial, Report, sweep
from tests.crash.workload import Workload
from tests.crash.zygote import Zygote

SHARE = 0.5
"""Of the kills and of the time of the whole tier."""
ABSENT = {"reload.take", "job.taken", "transaction.begun", "transaction.offsets", "transaction.committed"}
"""Failpoints that files without transactions never come to, nor learning inline, nor a policy that stays as it is."""


@pytest.fixture
def trials(zygote: Zygote, work: Workload, uninterrupted: dict[str, FileTrial], tmp_path: Path) -> Iterator[FileTrial]:
    def make() -> Iterator[FileTrial]:
        for number in count():
            name = list(POLICIES)[number % len(POLICIES)]
            directory = tmp_path / f"trial-{number}"
            directory.mkdir()
            workload.write(directory, work, POLICIES[name])
            whole = uninterrupted[name]
            yield FileTrial(zygote, directory, whole.truth, whole.directory)
            shutil.rmtree(directory)

    return make()


@pytest.mark.timeout(3600)
def test_killed_anywhere_the_daemon_ends_as_if_nothing_had_happened(
    trials: Iterator[FileTrial], budget: Budget, record_property: Tell
) -> None:
    started = time.monotonic()
    trial = next(trials)
    assert not trial.wait(trial.start(""), None)
    length = time.monotonic() - started
    report = Report("files", "files", "at_least_once", budget.seed_of("files"))
    sweep(trials, report, kills=int(budget.kills * SHARE), seconds=budget.seconds * SHARE, length=length)
    record_property(KILLS, [report.name, report.as_json()])
    assert report.findings.problems == []
    assert report.kills.total() > 0
    if budget.covers(report.kills.total()):
        assert report.never <= ABSENT


def test_two_uninterrupted_runs_are_equal(trials: Iterator[FileTrial], uninterrupted: dict[str, FileTrial]) -> None:
    for _ in uninterrupted:
        trial = next(trials)
        assert not trial.wait(trial.start(""), None)
        found = trial.judge()
        assert found.problems == []
        assert found.duplicates == 0


def test_a_terminated_daemon_drains_and_goes_on_later(trials: Iterator[FileTrial]) -> None:
    trial = next(trials)
    life = trial.start("")
    state = trial.directory / "state"
    for _ in range(2000):
        if len(list(state.glob("ckpt-*"))) > 1 or life.ended is not None:
            break
        time.sleep(0.005)
    life.signal(signal.SIGTERM)
    assert life.wait(60) == 0, life.words
    assert not trial.wait(trial.start(""), None)
    found = trial.judge()
    assert found.problems == []
    assert found.duplicates == 0


def test_the_verifier_sees_what_is_wrong(trials: Iterator[FileTrial]) -> None:
    trial = next(trials)
    assert not trial.wait(trial.start(""), None)
    predictions = trial.directory / "predictions.jsonl"
    lines = predictions.read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    predictions.write_bytes(b"".join([*lines[3:], lines[5], lines[6].replace(b'"version":1', b'"version":2')]))
    with (trial.directory / "events.jsonl").open("ab") as file:
        file.write(b"no json either\n")
    found = trial.judge()
    assert (found.missing, found.duplicates, found.lost) == (3, 1, 1)
    assert found.different >= 1


def test_the_verifier_sees_what_was_applied_twice(trials: Iterator[FileTrial]) -> None:
    trial = next(trials)
    assert not trial.wait(trial.start(""), None)
    folder = max((trial.directory / "state").glob("ckpt-*"))
    whole, listed = (folder / "meta.json").read_bytes(), (folder / "MANIFEST").read_bytes().splitlines()[0]

    def forge(name: str, more: int) -> None:
        meta, manifest = json.loads(whole), json.loads(listed)
        meta["states"]["policy"]["core"]["counts"][name] += more
        forged = json.dumps(meta).encode()
        manifest["files"]["meta.json"]["blake3"] = blake3(forged).hexdigest()
        body = json.dumps(manifest).encode() + b"\n"
        (folder / "meta.json").write_bytes(forged)
        (folder / "MANIFEST").write_bytes(body + hashlib.blake2b(body, digest_size=32).hexdigest().encode() + b"\n")

    for name in ("events", "feedback", "labels"):
        for more, expected in ((1, (0, 1)), (-1, (1, 0)), (0, (0, 0))):
            forge(name, more)
            found = trial.judge()
            assert (found.lost, found.applied_twice, found.missing) == (*expected, 0), (name, more, found.problems)
            assert sum(f" {name} of " in problem for problem in found.problems) == abs(more)
