"""What the sweeps of a run found, as one result, whichever processes they ran in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

KILLS = "kill_sweep"
"""The property of a test under which a sweep tells its name and what it found."""

COUNTED = ("kills", "kills_while_restoring_after_a_kill", "trials", "lost", "applied_twice", "missing", "different")


def summary(sweeps: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Totals over all sweeps, by phase, client, mode of delivery, and whether the kill before was still recovered from.

    Args:
        sweeps: What each found, by its name.
    """
    totals = {key: sum(sweep[key] for sweep in sweeps.values()) for key in (*COUNTED, "duplicates")}
    by: dict[str, Counter[str]] = {"by_phase": Counter(), "by_client": Counter(), "by_delivery": Counter()}
    for sweep in sweeps.values():
        by["by_phase"].update(sweep["by_phase"])
        by["by_client"][sweep["client"]] += sweep["kills"]
        by["by_delivery"][sweep["delivery"]] += sweep["kills"]
    exact = sum(sweep["duplicates"] for sweep in sweeps.values() if sweep["delivery"] == "exactly_once")
    return {
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": sys.version.split()[0],
        **totals,
        "duplicates_in_exactly_once": exact,
        **{name: dict(sorted(counts.items())) for name, counts in by.items()},
        "sweeps": dict(sorted(sweeps.items())),
    }


def command() -> str:
    """What gives these results again, but for the instants of random kills."""
    given = {
        key: value for key, value in sorted(os.environ.items()) if key in ("ADAPTD_CRASH_KILLS", "ADAPTD_CRASH_SECONDS")
    }
    return " ".join([*(f"{key}={value}" for key, value in given.items()), "make crash"])


def commit() -> str | None:
    """Of the code that was killed; None where that is not known."""
    asked = ["git", "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
