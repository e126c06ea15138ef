"""Fixtures of the crash tier: a prepared demonstration, and what an uninterrupted run makes of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engine.demo.main import _prepare

EVENTS = 6000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.crash)


def command(directory: Path) -> list[str]:
    return [sys.executable, "-m", "engine.cli", "run", str(directory / "policy.yaml")]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ADAPTD_CHECKPOINT__EVERY": "300ms"}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared")
    _prepare(directory, EVENTS, 0, Console(quiet=True))
    return directory


@pytest.fixture
def fresh(prepared: Path, tmp_path: Path) -> Iterator[Callable[[], Path]]:
    made: list[Path] = []

    def make() -> Path:
        made.append(Path(shutil.copytree(prepared, tmp_path / f"run{len(made)}")))
        return made[-1]

    yield make
    for directory in made:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "run"))
    subprocess.run(command(directory), env=environment(), check=True, timeout=120)
    return directory
