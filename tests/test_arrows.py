"""Imports point one way: engine -> streams, engine -> policies -> kernels."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "engine": {"engine", "streams", "policies", "kernels"},
    "streams": {"streams"},
    "policies": {"policies", "kernels"},
    "kernels": {"kernels"},
}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


@cache
def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & MAY_IMPORT.keys() <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] == "streams"], ids=lambda path: path.name)
def test_streams_know_nothing_of_tensors(path: Path) -> None:
    assert "torch" not in imported(path)


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == MAY_IMPORT.keys()
