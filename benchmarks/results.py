"""What all benchmarks share: options, where results go, and the machine they were measured on.

A result is one JSON object: what was asked (``command``, ``quick``), when (``date``), where (``machine``, with the load
average before and after, which says how much else ran), with what (``versions``), and the figures under ``results``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "results"
BENCH = Path(__file__).parents[2] / "shared" / "bench"
"""Real data and the model to measure with; benchmarks that need it skip where it is missing."""

PACKAGES = ("adaptd", "torch", "numpy", "anyio")


class Report:
    """One benchmark's result from its start to its file.

    Args:
        name: Of the benchmark and of its file.
        options: As parsed; ``quick`` and ``output`` are read of them.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self._name = name
        self._options = options
        self._started = datetime.now(UTC)
        self._load = os.getloadavg()

    def write(self, results: Mapping[str, Any]) -> Path | None:
        """Print the result and write it to its file; a quick run only prints, unless a file is named.

        Returns:
            The file; None where there is none.
        """
        text = json.dumps(self._envelope() | {"results": results}, indent=2) + "\n"
        sys.stdout.write(text)
        sys.stdout.flush()
        path = self._options.output or (None if self._options.quick else DIRECTORY / f"{self._name}.json")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return path

    def skip(self, reason: str) -> None:
        """Say why nothing was measured; the last result stays as it is."""
        sys.stdout.write(json.dumps({"name": self._name, "skipped": reason}, indent=2) + "\n")

    def _envelope(self) -> dict[str, Any]:
        return {
            "name": self._name,
            "command": " ".join(["python -m", f"benchmarks.{self._name}", *map(_without_folders, sys.argv[1:])]),
            "quick": self._options.quick,
            "date": self._started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self._started).total_seconds(), 1),
            "machine": machine() | {"load_before": rounded(self._load), "load_after": rounded(os.getloadavg())},
            "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        }


def _without_folders(argument: str) -> str:
    """A path of this machine, which says nothing elsewhere, becomes its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def rounded(values: Sequence[float], digits: int = 2) -> list[float]:
    """The values with fewer digits."""
    return [round(value, digits) for value in values]


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a short run that shows that it works; writes no result")
    made.add_argument("--output", type=Path, help="write the result here")
    return made


def pinned(core: int) -> list[str]:
    """What goes before a command to keep it on one core; nothing where there is no ``taskset``."""
    return ["taskset", "-c", str(core)] if shutil.which("taskset") else []


def one_thread() -> dict[str, str]:
    """The environment of a process whose tensor operations take one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
