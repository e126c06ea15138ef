"""Nested states as named tensors and a JSON value, and back, bit for bit.

In the JSON value ``{"$tensor": name}`` stands for a tensor and ``{"$float": bits}`` for a float that JSON has no
spelling for (NaN and the infinities, as 16 hexadecimal digits of the IEEE 754 double). A key of the state that itself
begins with ``$`` gets a second one. A flat state keeps its keys as tensor names, so ``model.safetensors`` can be used
by other programs as it is; below that, names are paths joined with ``/``, and ``~`` escapes what would be ambiguous.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, BinaryIO

from torch import Tensor

from engine.checkpoint.errors import BadCheckpointError, StateError
from engine.checkpoint.strict import Json
from engine.checkpoint.tensors import check_tensor, write_tensors
from policies.interfaces import State

DEPTH_LIMIT = 64
"""Levels of nesting that a state may have."""

_MARK = "$"
_TENSOR = "$tensor"
_FLOAT = "$float"
_RESERVED = re.compile("[~/\ud800-\udfff]|^__metadata__$")


def flatten(state: State) -> tuple[dict[str, Tensor], Json]:
    """Copy ``state`` apart: tensors to the CPU, contiguous and sharing no memory with anything; the rest as JSON.

    Tuples become lists, parameters become plain tensors, tied tensors become equal ones. Key order is kept.

    Args:
        state: Dicts with string keys, lists and tuples of tensors, None, booleans, integers, floats and strings.

    Raises:
        StateError: Something else is in it; the message names the place.
    """
    tensors: dict[str, Tensor] = {}
    if not isinstance(state, Mapping):
        raise StateError(f"a state is a dict, not {type(state).__name__}")
    return tensors, _flatten(state, (), tensors)


def unflatten(tensors: Mapping[str, Tensor], tree: Any) -> State:
    """Put a state together again.

    Args:
        tensors: As `flatten` or `read_tensors` gave them; they are used as they are, not copied.
        tree: The JSON value of the same state.

    Raises:
        BadCheckpointError: The two do not belong together.
    """
    rest = dict(tensors)
    try:
        state = _unflatten(tree, rest, 0)
    except (KeyError, ValueError, TypeError, struct.error) as error:
        raise BadCheckpointError(f"state does not fit its tensors: {error}") from error
    if rest:
        raise BadCheckpointError(f"state does not fit its tensors: {next(iter(rest))!r} belongs nowhere")
    if not isinstance(state, dict):
        raise BadCheckpointError("state is not a dict")
    return state


def snapshot(states: Mapping[str, State]) -> tuple[dict[str, Callable[[BinaryIO], object]], dict[str, Json]]:
    """Copy several states at this instant, for `CheckpointStore.save`.

    Returns:
        The parts, ``NAME.safetensors`` for each state, and the JSON values by name, which belong into ``meta`` under
        ``states``. Neither shares memory with what it was taken from.

    Raises:
        StateError: As `flatten` does, with the state's name in front.
    """
    parts: dict[str, Callable[[BinaryIO], object]] = {}
    trees: dict[str, Json] = {}
    for name, state in states.items():
        try:
            tensors, trees[name] = flatten(state)
        except StateError as error:
            raise StateError(f"state {name!r}: {error}") from error
        parts[f"{name}.safetensors"] = partial(write_tensors, tensors=tensors)
    return parts, trees


def _flatten(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Json:
    if len(path) > DEPTH_LIMIT:
        raise StateError(f"{'/'.join(path[:4])}/...: nested more than {DEPTH_LIMIT} levels deep")
    match value:
        case Tensor():
            name = "/".join(path)
            check_tensor(value, name)
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        case Mapping():
            return {_key_out(key, path): _flatten(item, (*path, _name(key)), tensors) for key, item in value.items()}
        case list() | tuple():
            return [_flatten(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
        case _:
            return _scalar(value, path)


def _scalar(value: Any, path: tuple[str, ...]) -> Json:
    match value:
        case None | bool():
            return value
        # The conversions drop subclasses (enumerations, NumPy's float64), which JSON would spell in its own way.
        case int():
            return int(value)
        case str():
            return str.__str__(value)
        case float() if math.isfinite(value):
            return float(value)
        case float():
            return {_FLOAT: struct.pack(">d", value).hex()}
        case _:
            raise StateError(
                f"{'/'.join(path)}: a checkpoint cannot keep a {type(value).__name__}; use tensors and JSON"
            )


def _key_out(key: Any, path: tuple[str, ...]) -> str:
    if not isinstance(key, str):
        raise StateError(f"{'/'.join(path) or 'the state'}: key {key!r} is not a string; write str({key!r})")
    text = str.__str__(key)
    return _MARK + text if text.startswith(_MARK) else text


def _name(key: str) -> str:
    """A key inside the name of a tensor: different paths give different names, all of them valid UTF-8."""
    return _RESERVED.sub(_escape, str.__str__(key))


def _escape(found: re.Match[str]) -> str:
    text = str(found.group())
    return f"~{ord(text[0]):x}~{text[1:]}"


def _unflatten(tree: Any, rest: dict[str, Tensor], depth: int) -> Any:
    if depth > DEPTH_LIMIT:
        raise ValueError(f"nested more than {DEPTH_LIMIT} levels deep")
    if isinstance(tree, list):
        return [_unflatten(item, rest, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == {_TENSOR}:
        return rest.pop(tree[_TENSOR])
    if tree.keys() == {_FLOAT}:
        (value,) = struct.unpack(">d", bytes.fromhex(tree[_FLOAT]))
        return value
    return dict(_items(tree, rest, depth))


def _items(tree: dict[str, Any], rest: dict[str, Tensor], depth: int) -> Iterator[tuple[str, Any]]:
    for key, item in tree.items():
        if key.startswith(_MARK):
            if not key.startswith(_MARK * 2):
                raise ValueError(f"unknown mark {key!r}")
            key = key[1:]
        yield key, _unflatten(item, rest, depth + 1)
