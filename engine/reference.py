"""Writes ``docs/policy.md`` and ``docs/metrics.md``, the references, from what they describe.

``python -m engine.reference`` writes them, ``python -m engine.reference --check`` fails where one is not up to date.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from engine.methodspec import MethodSpec, inline, summary
from engine.metric_reference import metric_reference
from engine.policy import Policy
from engine.policyfile import presets
from engine.problems import model_in
from policies import registry
from policies.units import BYTES, SECONDS

PLACE: Final = Path(__file__).resolve().parent.parent / "docs" / "policy.md"

_KINDS: Final = {
    "adaptation": "`adaptation`: one method",
    "reweighting": "`reweighting`: a list of methods",
    "safeguard": "`safeguards`: a list of methods",
    "interpolation": "`interpolation`: one method",
    "gate": "`gate`: one method",
}

_HEAD = """\
# Policy files

<!-- Written by `python -m engine.reference`; edit the models, not this page. -->

A policy is one YAML file. `adaptd validate POLICY` checks it, `adaptd validate --show POLICY` prints everything that is
in force, `adaptd schema` prints a JSON Schema for editors. Unknown keys, duplicate keys, anchors and tags are refused.

**Precedence.** Flags (`--set batching.max_size=32`) > environment (`ADAPTD_BATCHING__MAX_SIZE=32`) > file > preset >
defaults. Values of flags and variables are YAML. Mappings merge key by key and lists are replaced as a whole;
`--set safeguards.0.capacity=100` changes one item. A method of another name replaces the one below it with all its
parameters, and of one stream a file replaces a topic and a topic a file.

**Quantities.** A duration is a number of seconds or a number with a unit: `20ms`, `1.5h`, `7d`. A size is a number of
bytes or a number with a unit: `256MB`, `64MiB`. Paths are relative to the policy file, or with a preset in its place
to the current directory.
"""

_METHODS: Final = """
A method is written `{method: NAME}`, with its parameters beside the name. A bare `NAME` stands for the same without
parameters, in lists too: `adaptation: tent`, `safeguards: [finite, {method: replay, capacity: 5000}]`.
"""


def reference() -> str:
    """The whole page."""
    parts = [_HEAD, *_section("", Policy, "Top level"), "\n## Methods\n"]
    parts.append(_METHODS)
    for kind, title in _KINDS.items():
        parts.append(f"\n### {title}\n")
        for name in registry.METHODS[kind]:
            parts += _method(kind, name)
    parts.append("\n## Presets\n\nNamed by `preset: NAME` in a file, or in place of a file on the command line.\n\n")
    parts += [f"- `{name}`: {_first_comment(name)}\n" for name in presets()]
    return "".join(parts)


def _section(key: str, model: type[BaseModel], title: str = "") -> Iterator[str]:
    """The heading and table of a section, then its subsections."""
    yield f"\n## {title or f'`{key}`'}\n\n{_plain(summary(model))}\n\n"
    yield from _table(model)
    for name, field in model.model_fields.items():
        below = model_in(field.annotation)
        if below is not None and not issubclass(below, MethodSpec):
            yield from _section(f"{key}.{name}" if key else name, below)


def _method(kind: str, name: str) -> Iterator[str]:
    method = registry.find(kind, name)
    yield f"\n#### `{name}`\n\n{_plain(summary(method))}\n\n"
    if method.Params.model_fields:
        yield from _table(method.Params)
    else:
        yield "No parameters.\n"


def _table(model: type[BaseModel]) -> Iterator[str]:
    described = descriptions(model)
    schema = inline(model.model_json_schema())["properties"]
    yield "| key | value | default | meaning |\n| --- | --- | --- | --- |\n"
    for name, field in model.model_fields.items():
        below = model_in(field.annotation)
        if below is None:
            value = _value(schema[name])
        else:
            value = "see Methods" if issubclass(below, MethodSpec) else "see below"
        meaning = described.get(name) or ("" if below is None else summary(below))
        cells = [f"`{name}`", value, _default(field, value), meaning]
        yield "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |\n"


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What each field means: its description, the literal under it, or its line in a docstring's ``Attributes:``."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= _literals(base) | _attributes(base.__doc__ or "")
    return found | {name: field.description for name, field in model.model_fields.items() if field.description}


def _literals(model: type[BaseModel]) -> dict[str, str]:
    """The string literals under the fields of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for field, literal in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(literal, ast.Expr):
            text = literal.value.value if isinstance(literal.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return found


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of the section ``Attributes:`` of a Google docstring."""
    section = inspect.cleandoc(docstring).partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _plain(text: str) -> str:
    """Text of a docstring as one line of Markdown."""
    return " ".join(text.replace("``", "`").split())


def _default(field: FieldInfo, value: str) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return f"`{default.method}`" if isinstance(default, MethodSpec) else "as below"
    if default is None:
        return "none"
    if value in ("duration", "size"):
        return f"`{_quantity(default, SECONDS if value == 'duration' else BYTES)}`"
    return f"`{json.dumps(default, default=str)}`".replace('"', "") if default != "" else "empty"


def _quantity(value: float, units: Mapping[str, float]) -> str:
    """A quantity in its largest unit that gives a whole number."""
    fitting = {unit: value / scale for unit, scale in units.items() if unit not in ("d", "w") and value}
    whole = {
        unit: round(number) for unit, number in fitting.items() if number >= 1 and abs(number - round(number)) < 1e-9
    }
    unit = max(whole, key=lambda unit: units[unit], default="")
    return f"{whole[unit]}{unit}" if unit else "0"


def _value(schema: Mapping[str, Any]) -> str:
    """What may be written, in words."""
    if "anyOf" in schema:
        return _any(schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_value(schema.get('items', {'type': 'value'}))}"
    return _NAMES.get(schema.get("format", schema.get("type", "")), "value") + _bounds(schema)


_NAMES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "`true`, `false`",
    "object": "mapping",
    "path": "path",
}


def _any(options: Sequence[Mapping[str, Any]]) -> str:
    units = next((option["pattern"] for option in options if "pattern" in option and len(options) > 1), "")
    if "|ms|" in units:
        return "duration"
    if "|KiB|" in units:
        return "size"
    return " or ".join(dict.fromkeys(_value(option) for option in options if option.get("type") != "null"))


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return f", {', '.join(bounds)}" if bounds else ""


def _first_comment(preset: str) -> str:
    lines = files("policies.presets").joinpath(f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in lines if line.startswith("#")]
    return " ".join(comment)


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or compare them byte for byte."""
    stale = 0
    for place, text in ((PLACE, reference()), (PLACE.with_name("metrics.md"), metric_reference())):
        page = text.encode()
        if "--check" not in arguments:
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(page)
        elif not place.is_file() or place.read_bytes() != page:
            sys.stderr.write(f"{place} is not up to date; run: python -m engine.reference\n")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
