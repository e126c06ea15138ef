"""Finds the factory of the model that a policy names, and refuses to import anything else.

A factory is the user's own code and runs with the daemon's rights. So it comes from one of two places only: a file
beside the policy file, or a package that the policy allows or that is installed as an entry point ``adaptd.models``.
Names are checked before anything is imported.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from hashlib import blake2b
from importlib.machinery import SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from engine.errors import PolicyFileError
from engine.policy import Model

ENTRY_POINTS: Final = "adaptd.models"

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_IMPORTED = re.compile(rf"({_NAME}(?:\.{_NAME})*):({_NAME})")
_FROM_FILE = re.compile(rf"\./([^:\0]+\.py):({_NAME})")
_ELSEWHERE = re.compile(rf"(?:/|\.\./)[^:\0]*\.py:{_NAME}")

_ZIP: Final = b"PK\x03\x04"
_TORCH_SAVES: Final = (_ZIP, b"\x80\x02")
"""How files of `torch.save` begin, of today and of old."""

_SAVE_AGAIN: Final = "save the weights of the model that the factory builds"
CHECK_PATH: Final = "check the path, which starts at the directory of the policy file"


class _Loader(SourceFileLoader):
    """Compiles the source anew, so that an edited file is never hidden by an older cached one."""

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def build_model(model: Model, base: Path, seed: int = 0) -> nn.Module:
    """Build the model of a policy, with its weights, on the CPU.

    Args:
        model: The policy's section.
        base: Directory of the policy file.
        seed: Seeds PyTorch while the factory runs.

    Raises:
        PolicyFileError: As `resolve_factory` and `load_weights` do.
    """
    built = resolve_factory(model.factory, base, model.allowed_prefixes, seed=seed)()
    if model.weights is not None:
        load_weights(built, base / model.weights)
    return built


def resolve_factory(spec: str, base: Path, prefixes: Sequence[str] = (), *, seed: int = 0) -> Callable[[], nn.Module]:
    """Find the factory that a policy names, importing its module.

    Args:
        spec: ``./file.py:function`` or ``package.module:function``.
        base: Directory of the policy file.
        prefixes: Packages that may be imported from.
        seed: Seeds PyTorch while the factory runs; the global state is as before afterwards.

    Returns:
        What builds the model; it raises `PolicyFileError` if the factory fails or gives something else.

    Raises:
        PolicyFileError: If the factory is refused or missing, or its module fails. The message begins with the key.
    """
    place, name = locate_factory(spec, base, prefixes)
    if isinstance(place, Path):
        with _siblings(place.parent):
            function = _function(_load_file(place, spec), name, spec)
        return partial(_build, function, spec, place.parent, seed)
    return partial(_build, _function(_import(place, spec), name, spec), spec, None, seed)


def locate_factory(spec: str, base: Path, prefixes: Sequence[str] = ()) -> tuple[Path | str, str]:
    """Where the factory is that a policy names: its file or its module, and its name there. Imports nothing.

    Raises:
        PolicyFileError: If the factory is refused, or its file is missing. The message begins with the key.
    """
    in_file, imported = _FROM_FILE.fullmatch(spec), _IMPORTED.fullmatch(spec)
    if in_file is not None:
        return _file(in_file[1], base), in_file[2]
    if _ELSEWHERE.fullmatch(spec):
        _refuse(f"{spec!r} lies outside the directory of the policy file; put the file there, './model.py:build'")
    if imported is None:
        _refuse(f"{spec!r} names no factory; write './model.py:build' or 'package.module:build', in plain ASCII names")
    _check_allowed(spec, imported[1], prefixes)
    return imported[1], imported[2]


def _build(function: Callable[[], Any], spec: str, directory: Path | None, seed: int) -> nn.Module:
    """Run a factory; modules beside its file can still be imported while it runs."""
    with nullcontext() if directory is None else _siblings(directory), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            built = function()
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            _refuse(f"{spec} raised {_told(error, directory)}")
    if not isinstance(built, nn.Module):
        _refuse(f"{spec} gave {type(built).__name__}; expected a torch.nn.Module")
    return built


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into a model; tensors that the model shares may be in it once.

    Raises:
        PolicyFileError: If the file is missing, is not safetensors, or does not fit. The message begins with the key.
    """
    key = "model.weights"
    try:
        missing, unexpected = load_model(model, file, strict=False)
    except FileNotFoundError:
        _refuse(f"there is no file {file}; {CHECK_PATH}", key)
    except OSError as error:
        _refuse(f"{file} cannot be read: {error.strerror or error}", key)
    except SafetensorError as error:
        _refuse(not_safetensors(file, error), key)
    except RuntimeError as error:
        found = str(error).strip().splitlines()[-1].strip().rstrip(".")
        _refuse(f"{file} does not fit the model: {found}; {_SAVE_AGAIN}", key)
    # A counter that only BatchNorm with momentum=None reads; many exports leave it out.
    missing = sorted(name for name in missing if not name.endswith("num_batches_tracked"))
    if missing or unexpected:
        _refuse(f"{file} does not fit the model: {_difference(missing, sorted(unexpected))}; {_SAVE_AGAIN}", key)


def _difference(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """How the names in a file of weights differ from those of the model."""
    fault = f"{missing[0]} is not in it" if missing else f"the model has no {unexpected[0]}"
    if missing and unexpected:
        fault += f", but {unexpected[0]} is"
    count = len(missing) + len(unexpected)
    return f"{fault} ({count} names differ)" if count > 1 else fault


def not_safetensors(file: Path, error: SafetensorError) -> str:
    """What to say of a file of weights that is none, with how to make one."""
    with file.open("rb") as opened:
        start = opened.read(len(_ZIP))
    saved = f"torch.load({file.name!r}, weights_only=True)" if start.startswith(_TORCH_SAVES) else "model.state_dict()"
    how = f"make one with safetensors.torch.save_file({saved}, 'model.safetensors')"
    return f"{file} is not a safetensors file: {error}; {how}"


def _refuse(text: str, key: str = "model.factory") -> NoReturn:
    raise PolicyFileError(f"{key}: {text}")


def _told(error: BaseException, directory: Path | None = None) -> str:
    """An error of the user's code: type, first line, and the innermost place, if there is one inside ``directory``."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if directory is not None:
        places = [Path(frame.filename) for frame in frames]
        own = [place.is_relative_to(directory) and "site-packages" not in place.parts for place in places]
        frames = [frame for frame, inside in zip(frames, own, strict=True) if inside] or frames
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = f" ({Path(error.filename or '?').name}, line {error.lineno})"
        return f"SyntaxError: {error.msg}{where}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}{f': {first}' if first else ''}{where}"


def _check_allowed(spec: str, module: str, prefixes: Sequence[str]) -> None:
    if any(f"{module}.".startswith(f"{prefix}.") for prefix in prefixes):
        return
    if any(point.value.replace(" ", "") == spec for point in entry_points(group=ENTRY_POINTS)):
        return
    allowed = ", ".join(prefixes) or "none"
    _refuse(
        f"{module} may not be imported; list its package in model.allowed_prefixes (now: {allowed}), or use a file "
        "beside the policy, './model.py:build'"
    )


def _import(module: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        _refuse(f"{spec}: no module is named {error.name!r}; is its package installed?")
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        _refuse(f"importing {module} raised {_told(error)}")


def _file(name: str, base: Path) -> Path:
    """The file of a factory, which must lie beside the policy file or below, with every link followed."""
    if ".." in Path(name).parts or Path(name).is_absolute():
        _refuse(f"./{name} leaves the directory of the policy file; put the file beside the policy")
    root, file = base.resolve(), (base / name).resolve()
    if not file.is_relative_to(root):
        _refuse(f"./{name} is a link to {file}, outside the directory of the policy file; put the file itself there")
    if not file.is_file():
        _refuse(f"there is no file {base / name}; write one with a function that returns the model")
    return file


def _load_file(file: Path, spec: str) -> ModuleType:
    """Run a file as a module under a private name."""
    name = f"_adaptd_model_{blake2b(str(file).encode(), digest_size=8).hexdigest()}"
    found = spec_from_file_location(name, file, loader=_Loader(name, str(file)))
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    sys.modules[name] = module  # dataclasses look their module up here
    try:
        found.loader.exec_module(module)
    except ModuleNotFoundError as error:
        del sys.modules[name]
        _refuse(f"{spec}: no module is named {error.name!r}; install it or put it beside {file.name}")
    except Exception as error:  # noqa: BLE001 - the user's code may raise anything
        del sys.modules[name]
        _refuse(f"{file.name} raised {_told(error, file.parent)}")
    return module


@contextmanager
def _siblings(directory: Path) -> Iterator[None]:
    """Let modules in ``directory`` be imported, after all installed ones, and forget them afterwards.

    They are forgotten so that the next load reads them anew, and so that no name of theirs meets another policy's.
    """
    before, entry = set(sys.modules), str(directory)
    sys.path.append(entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)
        for name in set(sys.modules) - before:
            place = getattr(sys.modules[name], "__file__", None)
            if place and not name.startswith("_adaptd_model_") and Path(place).is_relative_to(directory):
                del sys.modules[name]


def _function(module: ModuleType, name: str, spec: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if function is None:
        _refuse(f"{spec}: there is no function {name} in {Path(module.__file__ or module.__name__).name}")
    if not callable(function):
        _refuse(f"{spec}: {name} is {type(function).__name__}; expected a function that returns the model")
    try:
        inspect.signature(function).bind()
    except TypeError:
        _refuse(f"{spec} needs arguments; expected a function that takes none")
    except ValueError:
        pass  # a built-in without a signature: calling it will tell
    result: Callable[[], Any] = function
    return result
