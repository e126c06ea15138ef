"""Failpoints kill where and when they are asked to, and nowhere else."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streams import seams
from streams.seams import FAILPOINTS, SystemClock

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_THE_SEAM = {
    "engine/demo/main.py",
    "streams/seams.py",
}
"""Files that may ask the machine for the time by themselves; the list may only become shorter."""


def run(armed: str) -> tuple[int, bytes]:
    name = FAILPOINTS[0]
    code = f"from streams.seams import failpoint\nfor n in range(5): print(n, flush=True); failpoint({name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ADAPTD_FAILPOINT": armed},
        capture_output=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    return done.returncode, done.stdout + done.stderr


def test_an_armed_failpoint_kills_at_the_pass_that_was_named() -> None:
    assert run(f"{FAILPOINTS[0]}:3") == (-signal.SIGKILL, b"0\n1\n2\n")


def test_without_being_armed_it_does_nothing() -> None:
    assert run("") == (0, b"0\n1\n2\n3\n4\n")


@pytest.mark.parametrize("armed", ["nowhere:1", "journal.append", "journal.append:0", "journal.append:x"])
def test_what_cannot_be_armed_is_refused_with_the_names_there_are(armed: str) -> None:
    code, said = run(armed)
    assert code == 1
    assert b"write name:n, the name one of reader.polled, " in said


def test_arming_anew_forgets_what_was_armed_before() -> None:
    seams.arm("cut:1")
    seams.arm("replay:2")
    seams.failpoint("cut")
    assert seams._armed == {"replay": 2}
    with pytest.raises(ValueError, match="write name:n"):
        seams.arm("cut:0")
    assert seams._armed == {"replay": 2}
    seams.arm("")
    assert seams._armed == {}


def test_every_failpoint_in_the_code_is_listed_and_every_listed_one_is_in_the_code() -> None:
    sources = [path for package in ("engine", "streams") for path in (ROOT / package).rglob("*.py")]
    found = [name for path in sources for name in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())]
    assert sorted(set(found)) == sorted(FAILPOINTS)
    assert sorted(FAILPOINTS) == sorted(set(FAILPOINTS))


def test_the_clocks_of_the_machine_go_on() -> None:
    clock = SystemClock()
    assert clock.monotonic() <= clock.monotonic()
    assert clock.time() > 1.7e9


def test_whatever_goes_by_the_time_asks_the_clock_for_it() -> None:
    """Durations that are only reported are measured with `time.perf_counter`, which is not looked for."""
    sources = [path for package in ("engine", "streams") for path in (ROOT / package).rglob("*.py")]
    found = {
        str(path.relative_to(ROOT)) for path in sources if re.search(r"\btime\.(monotonic|time)\(", path.read_text())
    }
    assert found <= WITHOUT_THE_SEAM
    assert "streams/seams.py" in found
