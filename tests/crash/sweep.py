"""The kill sweep: lives of a daemon on one state directory, each killed where or when it was asked for.

A trial is a fresh directory and lives on it, killed one after another until one ends by itself; then the verifier
looks. The plan goes through every failpoint at its first pass, then at its second and seventh, random instants between
them, and after every third kill a second one while the next life restores.
"""

from __future__ import annotations

import json
import random
import signal
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from streams.seams import FAILPOINTS
from tests.crash import verifier
from tests.crash.verifier import Checkpoint, Findings, Truth
from tests.crash.zygote import Life, Zygote

PASSES = (1, 2, 7)
KILLS_OF_A_TRIAL = 6
TRIES = 3
"""Lives in which a failpoint may not be reached before it is given up: some are passed once in a life at most."""

LIMIT = 40.0
LATER = 10
"""Kills until a failpoint that a life did not come to is tried again."""
WHILE_RESTORING = ("restore.loaded:1", "restore.applied:1", "replay:1", "replay:2", "replay:7", "disk.rename:1")


PHASES = {
    "reading": ("reader.polled", "reader.decoded", "reader.handed", "reader.commit", "reader.committed"),
    "journal": ("cut", "journal."),
    "answering": ("answered", "answers.put", "followed", "feedback.joined"),
    "learning": ("learn.", "job."),
    "sending": ("writer.", "files.", "transaction."),
    "checkpoint": ("snapshot", "checkpoint.saved", "disk."),
    "restoring": ("restore.", "replay"),
    "reload": ("reload.",),
    "leaving": ("drain",),
    "any moment": ("random",),
}
"""What the daemon was at when it was killed, by how the names of failpoints begin."""


def phase_of(point: str) -> str:
    """The phase of a failpoint."""
    return next(phase for phase, names in PHASES.items() if point.startswith(names))


@dataclass
class Report:
    """What a sweep did and found.

    Attributes:
        name: Of the sweep.
        client: That reads and writes; ``files`` where there is none.
        delivery: The mode of delivery.
        kills: By failpoint and pass, or ``random``.
        unreached: Failpoints and passes that no life came to.
    """

    name: str
    client: str
    delivery: str
    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    compound: int = 0
    trials: int = 0
    unreached: list[str] = field(default_factory=list)
    seconds: float = 0.0
    findings: Findings = field(default_factory=Findings)

    @property
    def never(self) -> set[str]:
        """Failpoints at which nothing was killed, at any pass."""
        return set(FAILPOINTS) - {name.partition(":")[0] for name in self.kills}

    def as_json(self) -> dict[str, Any]:
        found = self.findings
        by_point: Counter[str] = Counter()
        by_phase: Counter[str] = Counter()
        for name, count in self.kills.items():
            by_point[name.partition(":")[0]] += count
            by_phase[phase_of(name)] += count
        return {
            "client": self.client,
            "delivery": self.delivery,
            "kills": self.kills.total(),
            "kills_while_restoring_after_a_kill": self.compound,
            "trials": self.trials,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "lost": found.lost,
            "applied_twice": found.applied_twice,
            "missing": found.missing,
            "different": found.different,
            "duplicates": found.duplicates,
            "by_phase": dict(sorted(by_phase.items())),
            "by_failpoint": dict(sorted(by_point.items())),
            "by_pass": dict(sorted(self.kills.items())),
            "not_reached": sorted(self.unreached),
        }


class Trial(Protocol):
    """A fresh directory, and how its lives are run and judged."""

    directory: Path

    def start(self, armed: str) -> Life:
        """Begin a life."""
        ...

    def wait(self, life: Life, kill_after: float | None) -> bool:
        """Wait until it was killed (True) or has ended as it should (False)."""
        ...

    def judge(self) -> Findings:
        """Look at what is there after the last life."""
        ...


class FileTrial:
    """Files in, files out: ends by itself, and must end as the uninterrupted run did, bit for bit."""

    def __init__(self, zygote: Zygote, directory: Path, truth: Truth, whole: Path | None = None) -> None:
        self.zygote, self.directory, self.truth, self.whole = zygote, directory, truth, whole

    def start(self, armed: str) -> Life:
        environment = {"ADAPTD_FAILPOINT": armed}
        return self.zygote.start(["run", str(self.directory / "policy.yaml")], environment, self.directory / "log")

    def wait(self, life: Life, kill_after: float | None) -> bool:
        code = life.wait(LIMIT if kill_after is None else kill_after)
        if code is None and kill_after is not None:
            life.signal(signal.SIGKILL)
            code = life.wait(LIMIT)
        assert code in (0, -signal.SIGKILL), f"{code}: {life.words[-3000:]}"
        return code != 0

    def judge(self) -> Findings:
        found = Findings()
        answers = verifier.check_answers(found, self.truth, self._lines(self.directory, "predictions.jsonl"))
        letters = [b64decode(json.loads(line)["value"]) for line in self._lines(self.directory, "dead-letters.jsonl")]
        verifier.check_letters(found, self.truth, letters)
        ends = {(name, 0): (self.directory / f"{file}.jsonl").stat().st_size for name, file in STREAMS.items()}
        kept = verifier.check_state(found, self.truth, self.directory / "state", ends)
        if self.whole is not None:
            expected = verifier.check_answers(Findings(), self.truth, self._lines(self.whole, "predictions.jsonl"))
            wrong = [name for name in expected if answers.get(name) != expected[name]]
            found.say("different", len(wrong), f"{wrong[:5]} are not answered as in the uninterrupted run")
            verifier.check_equal(found, kept, Checkpoint.newest(self.whole / "state"))
        return found

    @staticmethod
    def _lines(directory: Path, name: str) -> list[bytes]:
        return (directory / name).read_bytes().splitlines()


STREAMS = {"data": "events", "feedback": "feedback"}


class Plan:
    """What to kill at next: failpoints in a random order, by pass, over and over, and random instants between them."""

    def __init__(self, rng: random.Random, report: Report) -> None:
        self._rng = rng
        self._report = report
        self._tries: Counter[str] = Counter()
        self._reached: set[str] = set()
        self._queue: list[str] = []

    def next(self) -> str:
        """A failpoint with its pass, or ``random``."""
        if not self._queue:
            for n in reversed(PASSES):
                points = [f"{name}:{n}" for name in FAILPOINTS if f"{name}:{n}" not in self._report.unreached]
                points += ["random"] * (len(points) // 2)
                self._rng.shuffle(points)
                self._queue += points
        return self._queue.pop()

    def reached(self, point: str) -> None:
        """It was killed there."""
        self._reached.add(point)

    def missed(self, point: str) -> None:
        """A life ended without coming there; it is tried again, a few times."""
        self._tries[point] += 1
        if point in self._reached or point == "random":
            return
        if self._tries[point] < TRIES:
            self._queue.insert(max(0, len(self._queue) - LATER), point)
        else:
            self._report.unreached.append(point)


def sweep(trials: Iterator[Trial], report: Report, *, kills: int, seconds: float, length: float) -> None:
    """Run trials until there were so many kills or until the time is over.

    Args:
        trials: Fresh ones.
        report: Where to count.
        kills: How many to make.
        seconds: When to stop all the same.
        length: Seconds that a whole life takes; random kills come before that.
    """
    rng = random.Random(report.seed)
    plan = Plan(rng, report)
    started = time.monotonic()
    while report.kills.total() < kills and time.monotonic() - started < seconds:
        trial = next(trials)
        history = _one(trial, plan, rng, report, length)
        found = trial.judge()
        found.problems = [f"seed {report.seed}, {history}: {problem}" for problem in found.problems]
        report.findings.add(found)
        report.trials += 1
    report.seconds = time.monotonic() - started


def _one(trial: Trial, plan: Plan, rng: random.Random, report: Report, length: float) -> list[str]:
    """The lives of one trial; what each was killed at."""
    history: list[str] = []
    restoring = False
    while len(history) < KILLS_OF_A_TRIAL:
        point = rng.choice(WHILE_RESTORING) if restoring else plan.next()
        after = rng.uniform(0.01, length) if point == "random" else None
        life = trial.start("" if point == "random" else point)
        if not trial.wait(life, after):
            if not restoring:
                plan.missed(point)
                return history
            return history
        history.append(point)
        report.kills[point] += 1
        report.compound += restoring
        if not restoring:
            plan.reached(point)
        restoring = not restoring and len(history) % 3 == 1
    assert not trial.wait(trial.start(""), None), "nobody killed the last life"
    return history
