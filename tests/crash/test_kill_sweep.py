"""Kill the daemon at random moments until its streams are through; it must end as if nothing had happened.

The comparison shares no code with the engine: final states are compared file by file, answers line by line.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import EVENTS, command, environment

SECONDS = float(os.environ.get("ADAPTD_CRASH_SECONDS", "120"))


def final_state(directory: Path) -> dict[str, bytes]:
    newest = max((directory / "state").glob("ckpt-*"))
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.name != "MANIFEST"}
    return {"step": newest.name.encode(), **files}


def answers(directory: Path) -> tuple[dict[str, str], int]:
    """Answers by event id, and how many lines came beyond the first of an id; these must be equal to it."""
    found: dict[str, str] = {}
    again = 0
    for line in (directory / "predictions.jsonl").read_text().splitlines():
        name = json.loads(line)["id"]
        if name in found:
            assert found[name] == line, f"{name} was answered in two ways"
            again += 1
        found[name] = line
    return found, again


def run_until_killed(directory: Path, after: float) -> bool:
    """Run and kill after a while; whether the run ended by itself before that."""
    process = subprocess.Popen(command(directory), env=environment(), stderr=subprocess.PIPE)
    try:
        _, log = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    assert process.returncode == 0, log.decode()
    return True


def run_to_the_end(directory: Path, delays: list[float]) -> int:
    kills = 0
    for delay in delays:
        if run_until_killed(directory, delay):
            return kills
        kills += 1
    assert run_until_killed(directory, 120)
    return kills


def check(directory: Path, whole: Path) -> int:
    expected, _ = answers(whole)
    got, again = answers(directory)
    assert len(got) == EVENTS
    assert got == expected
    ours, theirs = final_state(directory), final_state(whole)
    assert {name: len(data) for name, data in ours.items()} == {name: len(data) for name, data in theirs.items()}
    assert [name for name in ours if ours[name] != theirs[name]] == []
    return again


@pytest.mark.timeout(SECONDS + 400)
def test_killed_at_random_moments_the_daemon_ends_as_if_nothing_had_happened(
    fresh: Callable[[], Path], uninterrupted: Path
) -> None:
    seed = int(os.environ.get("ADAPTD_CRASH_SEED", time.time_ns() % 2**32))
    rng = random.Random(seed)
    started = time.monotonic()
    assert run_until_killed(fresh(), 120)
    whole_run = time.monotonic() - started
    kills = runs = again = 0
    while time.monotonic() - started < SECONDS:
        directory = fresh()
        kills += run_to_the_end(directory, [rng.uniform(0.1, whole_run) for _ in range(rng.randint(1, 6))])
        again += check(directory, uninterrupted)
        runs += 1
    print(f"\nseed {seed}: {kills} kills in {runs} runs, {again} answers came twice, equal each time")
    assert kills > 0


def test_two_uninterrupted_runs_are_equal(fresh: Callable[[], Path], uninterrupted: Path) -> None:
    directory = fresh()
    assert run_until_killed(directory, 120)
    assert check(directory, uninterrupted) == 0


def test_a_terminated_daemon_drains_and_goes_on_later(fresh: Callable[[], Path], uninterrupted: Path) -> None:
    directory = fresh()
    process = subprocess.Popen(command(directory), env=environment(), stderr=subprocess.PIPE)
    state = directory / "state"
    for _ in range(600):
        if len(list(state.glob("ckpt-*"))) > 1 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log.decode()
    assert run_until_killed(directory, 120)
    check(directory, uninterrupted)
