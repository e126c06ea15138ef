"""From a policy file, a preset, variables and flags to a policy; every mistake with its file and line.

Precedence: flags (``--set a.b=c``) > environment (``ADAPTD_A__B=c``) > file > preset > defaults. Mappings merge key by
key, lists are replaced as a whole, and a method with another name replaces the method below it with all its parameters.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import ValidationError

from engine.errors import PolicyFileError
from engine.overrides import flags, merge, unknown_variables, variables
from engine.policy import Policy
from engine.policycheck import impossible
from engine.problems import Key, Problem, coerced, is_secret, nearest, path, problems_of
from engine.strictyaml import MAX_BYTES, Entry, parse

MASK: Final = "********"


@dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy and where it comes from.

    Attributes:
        policy: The policy.
        path: The file; None for a preset.
        base: Directory that relative paths start from: that of the file; for a preset, the current one.
        digest: 64 hexadecimal digits that change with any effective value, and with nothing else.
        origins: Where each value was given, by key: ``policy.yaml:12``, ``--set seed``, ``ADAPTD_SEED``,
            ``preset rotta:3``. Keys that are not here have their default.
        source: What messages call the file.
    """

    policy: Policy
    path: Path | None
    base: Path
    digest: str
    origins: Mapping[str, str]
    source: str

    def resolve(self, path: Path) -> Path:
        """The place of a path that the policy names."""
        return self.base / path

    def origin(self, key: str) -> str:
        """Where a key was given, or else the section around it, or where the file begins; for messages."""
        above = key
        while above:
            if above in self.origins:
                return self.origins[above]
            above = above.rpartition(".")[0]
        return f"{self.source}:1" if key else self.source

    def locate(self, error: Exception) -> PolicyFileError:
        """An error of a later check, ``key.path: text`` a line, with file and line before each."""
        lines = [line for line in str(error).splitlines() if line]
        found = [(re.match(r"([a-z_]+(?:\.[a-z0-9_]+)*): ", line), line) for line in lines]
        told = []
        for key, line in found:
            origin = self.origin(key[1]) if key else self.source
            told.append(f"--set {line}" if key and origin == f"--set {key[1]}" else f"{origin}: {line}")
        return PolicyFileError("\n".join(told))


def presets() -> list[str]:
    """Names of the policies that ship."""
    return sorted(item.name[:-5] for item in files("policies.presets").iterdir() if item.name.endswith(".yaml"))


def load(
    path_or_preset: str | Path, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> LoadedPolicy:
    """Load a policy.

    Args:
        path_or_preset: Path of a file, or the name of a preset.
        overrides: Flags as given: ``a.b=value``, the value in YAML.
        environ: Where variables ``ADAPTD_...`` are looked for.

    Raises:
        PolicyFileError: If anything is wrong; the message has one line for each problem.
    """
    problems: list[str] = []
    name = str(path_or_preset)
    if name in presets():
        file, base, source = None, Path.cwd(), f"preset {name}"
        tree = _preset(name)
    else:
        file, source = Path(path_or_preset).absolute(), name
        base = file.parent
        tree = _root(parse(_read(Path(path_or_preset)), source, problems), source)
    problems += unknown_variables(environ, tree)
    tree = merge(tree, merge(variables(environ, problems), flags(overrides, problems), problems), problems)
    tree = _with_preset(tree, problems)
    policy = _validate(tree, problems)
    if policy is None:
        raise PolicyFileError("\n".join(sorted(dict.fromkeys(problems), key=_by_line)))
    return LoadedPolicy(policy, file, base, digest(policy), dict(_origins(tree)), source)


def digest(policy: Policy) -> str:
    """64 hexadecimal digits of all effective values, secrets left out."""
    canonical = json.dumps(_masked(policy.model_dump(mode="json")), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=32).hexdigest()


def effective(policy: Policy) -> str:
    """The whole policy as YAML, defaults included and secrets masked."""
    dumped = _masked(policy.model_dump(mode="json"))
    return yaml.dump(dumped, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a policy file for editors, with the parameters of every registered method."""
    schema = Policy.model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "adaptd policy"
    return schema


class _Dumper(yaml.SafeDumper):
    """Indents lists, and writes numbers and words so that the strict loader reads them back the same."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _float(dumper: _Dumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_Dumper.add_representer(float, _float)


def _masked(value: Any, name: str = "") -> Any:
    """A copy without secrets."""
    if isinstance(value, dict):
        return {key: _masked(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item, name) for item in value]
    return MASK if value is not None and is_secret(name) else value


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(str(file), presets(), n=1)
        hint = f"did you mean the preset {near[0]!r}?" if near else "'adaptd init' writes one to start from"
        text = f"no such file; {hint}"
    except IsADirectoryError:
        text = f"is a directory; name the policy file in it, for instance {file / 'policy.yaml'}"
    except OSError as error:
        text = f"cannot be read: {error.strerror}"
    raise PolicyFileError(f"{file}: {text}")


def _root(tree: Entry, source: str) -> Entry:
    """The tree, which must be a mapping; an empty file is an empty one."""
    if tree.value is None:
        return Entry({}, f"{source}:1")
    if not isinstance(tree.value, dict):
        raise PolicyFileError(f"{tree.origin}: expected a mapping, beginning with 'version: 1'")
    return tree


def _preset(name: str) -> Entry:
    problems: list[str] = []
    tree = parse(files("policies.presets").joinpath(f"{name}.yaml").read_bytes(), f"preset {name}", problems)
    assert not problems
    return tree


def _with_preset(tree: Entry, problems: list[str]) -> Entry:
    """The tree over the preset that it names."""
    chosen = tree.value.get("preset")
    if chosen is None or not isinstance(chosen.value, str):
        return tree
    if chosen.value not in presets():
        problems.append(
            f"{chosen.origin}: preset: no preset is named {chosen.value!r}{nearest(chosen.value, presets())}"
        )
        return tree
    below = _preset(chosen.value)
    below.value.pop("version")  # which version a file is written in, it says itself
    below.origin = tree.origin
    return merge(below, tree, problems)


def _validate(tree: Entry, problems: list[str]) -> Policy | None:
    """The policy; None if there are problems, which are appended."""
    data = tree.plain()
    policy = None
    try:
        policy = Policy.model_validate(data)
    except ValidationError as error:
        found = list(problems_of(error.errors(include_url=False), data))
        if any(_put_raw(tree, problem.key) for problem in found if problem.wants_text):
            return _validate(tree, problems)
    else:
        found = list(coerced(data, policy)) or list(impossible(policy))
    first: dict[Key, Problem] = {}
    for problem in found:
        first.setdefault(problem.key, problem)
    for problem in first.values():
        place = _placed(_origin_of(tree, problem.key), path(problem.key))
        # What the parser refused has no value that anything more could be said of, nor has a list of what is wrong.
        if not any(told.startswith(f"{place}: ") for told in problems) and not _follows(problem, first):
            problems.append(f"{place}: {problem.text}")
    return None if problems else policy


def _placed(origin: str, key: str) -> str:
    """Where a key was given, and the key; a flag names it already."""
    return origin if origin == f"--set {key}" else f"{origin}: {key}"


def _follows(problem: Problem, others: Mapping[Key, Problem]) -> bool:
    """Whether a list is too short only for what is wrong with its items."""
    below = [key for key in others if key[:-1] == problem.key]
    return bool(below) and "after validation" in problem.text


def _put_raw(tree: Entry, key: Key) -> bool:
    """Take the value of a flag or variable as the text that it is; those have no quotes of their own."""
    entry: Entry = tree
    for part in key:
        entry = entry.value[part]
    if not entry.origin.startswith(("--set ", "ADAPTD_")) or isinstance(entry.value, str) or not entry.raw:
        return False
    entry.value = entry.raw
    return True


def _origin_of(tree: Entry, key: Key) -> str:
    """Where a key was given, or the nearest mapping above it."""
    origin = tree.origin
    for part in key:
        try:
            tree = tree.value[part]
        except (KeyError, IndexError, TypeError):
            break
        origin = tree.origin
    else:
        return _overridden(tree) or origin
    return origin


def _overridden(tree: Entry) -> str:
    """Which flag or variable has changed something directly in a mapping, if one has."""
    given = [entry.origin for entry in tree.value.values()] if isinstance(tree.value, dict) else []
    return next((origin for origin in given if origin.startswith(("--set ", "ADAPTD_"))), "")


def _origins(tree: Entry, key: Key = ()) -> Iterable[tuple[str, str]]:
    """Every key that was given, with where."""
    children = enumerate(tree.value) if isinstance(tree.value, list) else tree.value.items()
    for part, entry in children:
        yield path((*key, part)), entry.origin
        if isinstance(entry.value, dict | list):
            yield from _origins(entry, (*key, part))


def _by_line(problem: str) -> tuple[str, int]:
    """Sorts problems of one file by line."""
    found = re.match(r"(.*?):(\d+): ", problem)
    return (found[1], int(found[2])) if found else (problem, 0)
