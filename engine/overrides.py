"""Flags and variables that override a policy file, and how layers of a policy merge."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from engine.errors import PolicyFileError
from engine.policy import Policy
from engine.problems import nearest
from engine.strictyaml import Entry, parse

PREFIX: Final = "ADAPTD_"

_ALTERNATIVE: Final = {"kafka": "file", "file": "kafka"}
"""Keys of one stream that exclude each other: the one above replaces the other below."""

_OTHERS: Final = tuple(
    PREFIX + rest for rest in ("FAILPOINT", "TEST_", "CRASH_", "BROKER_", "CACHE", "VENV", "REQUIRE_", "BENCHMARK_")
)
"""What begins like a variable of a policy and is none: tests and their tools."""

_KEY = re.compile(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*")


def flags(overrides: Sequence[str], problems: list[str]) -> Entry:
    """A tree of flags ``a.b=value``; a later flag wins."""
    tree = Entry({}, "--set")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            shown = key if equals else override
            problems.append(f"--set {shown}: expected KEY=VALUE, for instance --set batching.max_size=32")
            continue
        tree = _over(tree, key.split("."), text, f"--set {key}", problems)
    return tree


def variables(environ: Mapping[str, str], problems: list[str]) -> Entry:
    """A tree of variables ``ADAPTD_SECTION__KEY``; see also `unknown_variables`."""
    tree = Entry({}, "the environment")
    for name, parts in sorted(_named(environ)):
        if parts[0] not in Policy.model_fields:
            hint = nearest(parts[0], list(Policy.model_fields))
            problems.append(f"{name}: a policy has no section {parts[0]!r}{hint}")
            continue
        tree = _over(tree, parts, environ[name], name, problems)
    return tree


def unknown_variables(environ: Mapping[str, str], tree: Entry) -> Iterator[str]:
    """A sentence for each variable ``ADAPTD_...`` that means nothing, which most likely is a slip of the pen.

    Args:
        environ: The environment.
        tree: The policy so far; variables that it names, as those of secrets, mean what it says.
    """
    named = set(_values_of_env(tree))
    known = [PREFIX + field.upper() for field in Policy.model_fields]
    meant = {name for name, _ in _named(environ)}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in meant or name in named or name.startswith(_OTHERS):
            continue
        near = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {near[0]}? A" if near else "a"
        yield f"{name}: no such variable; {hint} key of a policy is written ADAPTD_SECTION__KEY"


def _values_of_env(tree: Entry) -> Iterator[str]:
    """Names of variables that a policy takes secrets from."""
    if isinstance(tree.value, dict):
        for key, entry in tree.value.items():
            if key.endswith("_env") and isinstance(entry.value, str):
                yield entry.value
            yield from _values_of_env(entry)


def _named(environ: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Variables that mean a key of a policy, with the key."""
    for name in environ:
        parts = name[len(PREFIX) :].lower().split("__")
        if name.startswith(PREFIX) and all(parts) and (len(parts) > 1 or parts[0] in Policy.model_fields):
            yield name, parts


def _over(tree: Entry, key: Sequence[str], text: str, origin: str, problems: list[str]) -> Entry:
    """The tree with one more value."""
    try:
        entry = parse(text.encode("utf-8", "surrogateescape"), origin, problems, lines=False)
    except PolicyFileError as error:
        problems.append(f"{error}")
        return tree
    for part in reversed(key):
        entry = Entry({part: entry}, origin)
    return merge(tree, entry, problems)


def merge(below: Entry, above: Entry, problems: list[str]) -> Entry:
    """One tree of two; neither is changed.

    Mappings merge key by key; of one stream, a file replaces a topic and a topic a file. A mapping with numbers for
    keys changes items of a list. Anything else is replaced, and so is a method by one of another name.
    """
    if (
        isinstance(above.value, dict)
        and isinstance(below.value, list)
        and above.value
        and all(map(str.isdigit, above.value))
    ):
        return _merge_items(below, above, problems)
    if not isinstance(above.value, dict) or not isinstance(below.value, dict) or _other_method(below, above):
        return above
    merged = {key: entry for key, entry in below.value.items() if _ALTERNATIVE.get(key) not in above.value}
    for key, entry in above.value.items():
        merged[key] = merge(merged[key], entry, problems) if key in merged else entry
    return Entry(merged, below.origin)


def _merge_items(below: Entry, above: Entry, problems: list[str]) -> Entry:
    items = list(below.value)
    for key, entry in above.value.items():
        if int(key) < len(items):
            items[int(key)] = merge(items[int(key)], entry, problems)
        else:
            problems.append(
                f"{entry.origin}: there is no item {key}; the list at {below.origin} has {len(items)}, counted from 0"
            )
    return Entry(items, below.origin)


def _other_method(below: Entry, above: Entry) -> bool:
    method, other = (entry.value.get("method") for entry in (below, above))
    return method is not None and other is not None and method.value != other.value
