"""Fixtures of every test."""

import logging
import os
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.crash.zygote import Zygote

# Read when PyTorch is loaded. Tensors of tests are small and workers share the cores: more threads wait for each other
# by spinning, which makes some tests ten times as slow where something else runs beside them.
os.environ["OMP_NUM_THREADS"] = "1"

# How busy the machine is decides nothing.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A run within the process configures logging onto that test's own standard error; undo it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts daemons without their having to import anything."""
    with Zygote() as started:
        yield started


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many states the enumerators of crashes have visited."""
    told = [
        (report.nodeid, value)
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "crash_states"
    ]
    for test, states in told:
        terminalreporter.write_line(f"{states} distinct crash states: {test}")
