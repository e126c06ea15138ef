"""What pydantic found wrong, as sentences: what is wrong, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from engine.methodspec import PARAMETERS, MethodSpec
from engine.policy import Policy

Key = tuple[str | int, ...]

_SECRET = re.compile(r"(password|secret|token|credential)(?!.*_(file|env)$)", re.IGNORECASE)

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
    "tuple_type": "a list, such as [a, b]",
    "dict_type": "a mapping, with one 'key: value' a line",
    "model_type": "a mapping, with one 'key: value' a line",
    "model_attributes_type": "a mapping, with one 'key: value' a line",
    "finite_number": "a finite number",
}


class Problem(NamedTuple):
    """One thing wrong in a policy.

    Attributes:
        key: Path of the key.
        text: What is wrong and what was expected.
        wants_text: Whether text was expected and another scalar was found.
    """

    key: Key
    text: str
    wants_text: bool = False


def path(key: Key) -> str:
    """A key's path as people write it: ``safeguards.0.capacity``."""
    return ".".join(str(part) for part in key)


def is_secret(name: str) -> bool:
    """Whether the value of a key with this name must not be shown."""
    return _SECRET.search(name) is not None


def problems_of(errors: Sequence[Mapping[str, Any]], data: Any) -> Iterator[Problem]:
    """Sentences for pydantic's errors on the plain ``data`` of a policy; errors of method parameters are unfolded."""
    for error in errors:
        key: Key = tuple(part for part in error["loc"])
        if error["type"] == PARAMETERS:
            inner = error["ctx"]["errors"]
            yield from problems_of([{**one, "loc": (*key, *one["loc"])} for one in inner], data)
        else:
            key = key if error["type"] == "missing" else _shorten(key, data)
            text = _sentence(error, key, data)
            key = (*key, "method") if error["type"] in ("method_unknown", "method_import") else key
            yield Problem(key, text, wants_text=error["type"] == "string_type")


def coerced(given: Any, result: Any, key: Key = ()) -> Iterator[Problem]:
    """Scalars that pydantic turned into another type without a word, such as ``true`` into 1."""
    if isinstance(result, MethodSpec):
        result = result.params
    if isinstance(given, dict) and isinstance(result, BaseModel | dict):
        fields = result if isinstance(result, dict) else dict(result)
        for name, value in given.items():
            yield from coerced(value, fields.get(name), (*key, name))
    elif isinstance(given, list) and isinstance(result, list | tuple):
        for index, (one, other) in enumerate(zip(given, result, strict=False)):
            yield from coerced(one, other, (*key, index))
    else:
        yield from _coerced_scalar(given, result, key)


def _coerced_scalar(given: Any, result: Any, key: Key) -> Iterator[Problem]:
    is_number = isinstance(result, int | float) and not isinstance(result, bool)
    if isinstance(result, bool) and not isinstance(given, bool):
        yield Problem(key, f"{show(given)} is not true or false; write true or false, without quotes")
    elif is_number and isinstance(given, bool):
        yield Problem(key, f"{show(given)} is not a number; expected a number")
    elif is_number and isinstance(given, str) and not any(c.isalpha() for c in given.replace("e", "").replace("E", "")):
        yield Problem(key, f"{show(given)} is text; write the number without quotes or leading zeros")


def show(value: Any) -> str:
    """A value for a message, short."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    if value is None:
        return "nothing (null)"
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint at the nearest valid name, and the valid names."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Known here: {', '.join(known)}" if known else ("; no key is known here" if not near else hint)


def keys_at(key: Key, data: Any) -> list[str]:
    """Names of the keys that the mapping at ``key`` may have."""
    model: type[BaseModel] | None = Policy
    for part in key:
        if isinstance(part, str) and model is not None:
            field = model.model_fields.get(part)
            model = None if field is None else model_in(field.annotation)
    if model is not None and issubclass(model, MethodSpec):
        entry = _at(key, data)
        name = entry.get("method") if isinstance(entry, dict) else None
        return ["method", *model.params_of(str(name)).model_fields]
    return [] if model is None else list(model.model_fields)


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as ``tuple[Model, ...]`` or ``Model | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, types.UnionType):
        return next((found for part in get_args(annotation) if (found := model_in(part))), None)
    return None


def _at(key: Key, data: Any) -> Any:
    """The plain value at a key, which must be there."""
    for part in key:
        data = data[part]
    return data


def _shorten(key: Key, data: Any) -> Key:
    """Without what pydantic adds to name the branch of a union: parts that are not in the data."""
    for length, part in enumerate(key):
        there = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if not there:
            return key[:length]
        data = data[part]
    return key


def _sentence(error: Mapping[str, Any], key: Key, data: Any) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    last = str(key[-1]) if key else ""
    if kind == "extra_forbidden":
        return f"unknown key {last!r}{nearest(last, keys_at(key[:-1], data))}"
    if kind == "missing":
        return f"missing; add a line '{last}: ...'"
    shown = "the value given" if any(is_secret(str(part)) for part in key) else show(value)
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
        return f"{shown} is not a choice{_choices(value, allowed)}"
    if kind in _EXPECTED:
        return f"{shown} is not what belongs here; expected {_EXPECTED[kind]}"
    if kind == "value_error":
        return str(context["error"])
    if kind.startswith("method_"):
        return str(error["msg"])
    return f"{shown}: {_expectation(error['msg'])}"


def _choices(value: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), allowed, n=1)
    return (f"; did you mean {near[0]!r}?" if near else ".") + f" Expected: {', '.join(allowed)}"


def _expectation(message: str) -> str:
    """Pydantic's message in the words of the others."""
    words = {
        "Input should be ": "expected ",
        "String should match ": "expected text that matches ",
        "String should have ": "expected text of ",
        "Tuple should have ": "expected a list of ",
        "List should have ": "expected a list of ",
    }
    for theirs, ours in words.items():
        if message.startswith(theirs):
            return ours + message[len(theirs) :]
    return message[:1].lower() + message[1:]
