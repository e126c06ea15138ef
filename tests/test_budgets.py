"""Files have 400 lines at most and functions 40 (kernels: 500 and 100), docstrings of functions not counted."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "streams", "policies", "kernels")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or 0) - node.lineno + 1
    doc = node.body[0]
    if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str):
        lines -= (doc.end_lineno or 0) - doc.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    kernel = path.relative_to(ROOT).parts[0] == "kernels"
    text = path.read_text()
    assert len(text.splitlines()) <= (500 if kernel else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length(node) <= (100 if kernel else 40), f"{node.name} has {length(node)} lines"
