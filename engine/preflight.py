"""What a run would refuse before its first record, looked for without running anything.

No broker is asked, nothing of the user's is executed, nothing is written. What cannot be known so, `unchecked` says.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.errors import PolicyFileError
from engine.factory import CHECK_PATH, locate_factory, not_safetensors
from engine.host import choose_device
from engine.policy import SourceEndpoint
from engine.policyfile import LoadedPolicy
from streams.base import StreamError
from streams.framing import SUFFIXES


def check(loaded: LoadedPolicy) -> None:
    """Check a policy against what is on this machine.

    Raises:
        PolicyFileError: With a line for each problem, with file, line and key.
    """
    problems = [*_model(loaded), *_state(loaded), *_streams(loaded)]
    if problems:
        raise loaded.locate(PolicyFileError("\n".join(problems)))


def unchecked(loaded: LoadedPolicy) -> str:
    """What `check` leaves to a run, as the end of a sentence."""
    left = ["what the model's factory gives when it is called"]
    if loaded.policy.model.weights is not None:
        left.append("whether the weights fit it")
    if loaded.policy.streams is None:
        return ", ".join(left) + "; without streams the policy serves for 'adaptd backtest' alone"
    if loaded.policy.streams.kafka is not None:
        left.append("brokers and topics")
    if loaded.policy.metrics.enabled and loaded.policy.metrics.port:
        left.append("whether the port is free")
    return ", ".join(left)


# -- the model ----------------------------------------------------------------------------------------------------


def _model(loaded: LoadedPolicy) -> Iterator[str]:
    model = loaded.policy.model
    try:
        _factory(model.factory, loaded.base, model.allowed_prefixes)
    except PolicyFileError as error:
        yield str(error)
    try:
        choose_device(model.device)
    except PolicyFileError as error:
        yield str(error)
    if model.weights is not None:
        yield from _weights(loaded.resolve(model.weights))


def _factory(spec: str, base: Path, prefixes: tuple[str, ...]) -> None:
    """Find the factory's source and the function in it, without running either."""
    place, name = locate_factory(spec, base, prefixes)
    file = place if isinstance(place, Path) else _source_of(place, spec)
    if file is None:
        return
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        raise PolicyFileError(f"model.factory: {file.name} raised SyntaxError: {text} ({file.name}{line})") from error
    except OSError as error:
        raise PolicyFileError(f"model.factory: {file} cannot be read: {error.strerror}") from error
    found = _defined(tree, name)
    if found is None:
        raise PolicyFileError(f"model.factory: {spec}: there is no function {name} in {file.name}")
    if isinstance(found, ast.FunctionDef) and _needs_arguments(found):
        raise PolicyFileError(f"model.factory: {spec} needs arguments; expected a function that takes none")


def _source_of(module: str, spec: str) -> Path | None:
    """The source of a module, found by its path alone: importing its package would run it. None for what has none."""
    paths: list[str] | None = None
    found = None
    if module in sys.modules:
        file = getattr(sys.modules[module], "__file__", None) or ""
        return Path(file) if file.endswith(".py") else None
    for depth, _ in enumerate(parts := module.split("."), 1):
        name = ".".join(parts[:depth])
        found = importlib.machinery.PathFinder.find_spec(name, paths)
        if found is None:
            raise PolicyFileError(f"model.factory: {spec}: no module is named {name!r}; is its package installed?")
        paths = list(found.submodule_search_locations or ())
    origin = None if found is None else found.origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def _defined(tree: ast.Module, name: str) -> ast.stmt | None:
    """The last statement anywhere outside of functions and classes that may give a module the name."""
    last: ast.stmt | None = None
    waiting: list[ast.AST] = [tree]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if isinstance(child, ast.stmt) and name in _names(child):
                last = child
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                waiting.append(child)
    return last


def _names(statement: ast.stmt) -> set[str]:
    """Names that a statement may define."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.ImportFrom | ast.Import):
        names = {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        return names if "*" not in names else _Everything()
    targets = [node for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {node.id for node in targets}


class _Everything(set[str]):
    """What ``import *`` may define."""

    def __contains__(self, name: object) -> bool:
        return True


def _needs_arguments(function: ast.FunctionDef) -> bool:
    given = function.args
    positional = len(given.posonlyargs) + len(given.args) - len(given.defaults)
    return not function.decorator_list and (positional > 0 or None in given.kw_defaults)


def _weights(file: Path) -> Iterator[str]:
    """Read the header of the weights; tensors stay where they are."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb"), safe_open(file, framework="np"):
            pass
    except FileNotFoundError:
        yield f"model.weights: there is no file {file}; {CHECK_PATH}"
    except OSError as error:
        yield f"model.weights: {file} cannot be read: {error.strerror or error}"
    except SafetensorError as error:
        yield f"model.weights: {not_safetensors(file, error)}"


# -- directories and streams --------------------------------------------------------------------------------------


def _state(loaded: LoadedPolicy) -> Iterator[str]:
    state = loaded.resolve(loaded.policy.state)
    above = state
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        yield f"state: {above} is not a directory; choose a directory that can be written"
    elif not os.access(above, os.W_OK | os.X_OK):
        yield f"state: {above} cannot be written; choose another directory"


def _streams(loaded: LoadedPolicy) -> Iterator[str]:
    if loaded.policy.streams is None:
        return
    for name, endpoint in loaded.policy.streams.endpoints():
        if endpoint.file is None:
            continue
        key, path = f"streams.{name}.file", loaded.resolve(endpoint.file)
        if isinstance(endpoint, SourceEndpoint):
            if path.exists() or not endpoint.follow:  # a followed file is waited for
                yield from _readable(key, path)
        elif not path.parent.is_dir():
            yield f"{key}: there is no directory {path.parent}; make it, or name another"
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            yield f"{key}: {path} cannot be written; choose another place"
    kafka = loaded.policy.streams.kafka
    if kafka is not None:
        try:
            kafka.admin_config()
        except StreamError as error:
            yield f"streams.kafka: {error}"


def _readable(key: str, path: Path) -> Iterator[str]:
    if not path.exists():
        yield f"{key}: there is no file {path}; {CHECK_PATH}"
    elif not os.access(path, os.R_OK):
        yield f"{key}: {path} cannot be read; check its permissions"
    elif path.is_dir() and not any(entry.suffix in SUFFIXES for entry in path.iterdir()):
        yield f"{key}: {path} holds no file whose name ends in {' or '.join(SUFFIXES)}"
