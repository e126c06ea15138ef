"""Fixtures of the crash tier: the zygote, workloads and what uninterrupted runs make of them, and the one result."""

import json
import math
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from streams.seams import FAILPOINTS
from tests.broker.conftest import admin, bootstrap, client, node, settings, topic
from tests.crash import workload
from tests.crash.results import KILLS, summary
from tests.crash.sweep import FileTrial
from tests.crash.verifier import truth_of
from tests.crash.workload import Workload
from tests.crash.zygote import Zygote

__all__ = ["admin", "bootstrap", "client", "node", "settings", "topic"]

EVENTS = 600
ENOUGH = 2.5 * len(FAILPOINTS)
"""Kills within which each failpoint comes up once: with random ones, and a second one behind every third."""
Tell = Callable[[str, object], None]
"""The fixture ``record_property``."""

POLICIES = {"bn": workload.POLICY, "rotta": workload.ROTTA}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.crash)


@dataclass(frozen=True)
class Budget:
    """How much the whole tier may do; every sweep takes its share."""

    kills: float = float(os.environ.get("ADAPTD_CRASH_KILLS", "1000"))
    seconds: float = float(os.environ.get("ADAPTD_CRASH_SECONDS", "inf"))
    seed: int = field(default_factory=lambda: int(os.environ.get("ADAPTD_CRASH_SEED", time.time_ns() % 2**32)))

    def seed_of(self, sweep: str) -> int:
        """A seed for each sweep: with one for all, each would kill at the same points first."""
        return self.seed ^ zlib.crc32(sweep.encode())

    def covers(self, kills: float) -> bool:
        """Whether a sweep of so many kills has to come to every failpoint."""
        return math.isinf(self.seconds) and kills >= ENOUGH


@pytest.fixture(scope="session")
def budget() -> Budget:
    return Budget()


@pytest.fixture(scope="session")
def work() -> Workload:
    return workload.make(EVENTS)


@pytest.fixture(scope="session")
def uninterrupted(zygote: Zygote, work: Workload, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileTrial]:
    """A run that nobody killed, by policy."""
    runs = {}
    for name, policy in POLICIES.items():
        directory = tmp_path_factory.mktemp("whole")
        workload.write(directory, work, policy)
        runs[name] = FileTrial(zygote, directory, truth_of(work))
        assert not runs[name].wait(runs[name].start(""), None)
    return runs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what all sweeps together have found, and write it where ``ADAPTD_CRASH_RESULT`` says."""
    told = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    sweeps = dict(value for report in told for name, value in report.user_properties if name == KILLS)
    if not sweeps:
        return
    made = summary(sweeps)
    terminalreporter.write_line(json.dumps({key: made[key] for key in made if key != "sweeps"}))
    if path := os.environ.get("ADAPTD_CRASH_RESULT"):
        Path(path).write_text(json.dumps(made, indent=2) + "\n")
