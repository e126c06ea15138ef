"""Fixtures of the crash tier: the zygote, workloads and what uninterrupted runs make of them, and the report."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.broker.conftest import admin, bootstrap, client, node, settings, topic
from tests.crash import workload
from tests.crash.sweep import FileTrial, Report
from tests.crash.verifier import truth_of
from tests.crash.workload import Workload
from tests.crash.zygote import Zygote

__all__ = ["admin", "bootstrap", "client", "node", "settings", "topic"]

EVENTS = 600
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


@pytest.fixture(scope="session")
def budget() -> Budget:
    return Budget()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


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


@pytest.fixture(scope="session")
def reports() -> Iterator[list[Report]]:
    """What the sweeps of this session found; written where ``ADAPTD_CRASH_RESULT`` says."""
    made: list[Report] = []
    yield made
    path = os.environ.get("ADAPTD_CRASH_RESULT")
    if path and made:
        Path(path).write_text(json.dumps(summary(made), indent=2) + "\n")


def summary(reports: list[Report]) -> dict[str, object]:
    sweeps = {report.name: report.as_json() for report in reports}
    totals = {
        key: sum(sweep[key] for sweep in sweeps.values())
        for key in ("kills", "lost", "applied_twice", "missing", "different", "duplicates")
    }
    return {"command": command(), "python": sys.version.split()[0], **totals, "sweeps": sweeps}


def command() -> str:
    """What gives these results again, but for the instants of random kills."""
    given = {
        key: value for key, value in sorted(os.environ.items()) if key in ("ADAPTD_CRASH_KILLS", "ADAPTD_CRASH_SECONDS")
    }
    return " ".join([*(f"{key}={value}" for key, value in given.items()), "make crash"])
