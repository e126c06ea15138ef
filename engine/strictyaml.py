"""YAML without surprises: every value knows where it was written, and nothing is guessed.

Refused: duplicate keys, anchors and aliases, tags, several documents, more than `MAX_BYTES`, nesting deeper than
`MAX_DEPTH`, numbers that are not finite. Plain scalars follow the core schema of YAML 1.2: ``1e-3`` is a number;
``on``, ``off``, ``yes``, ``no``, ``12:30:00`` and ``2024-01-01`` are text; so is ``012``, which one reader takes for
ten and another for twelve.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final

import yaml

from engine.errors import PolicyFileError

MAX_BYTES: Final = 1_000_000
MAX_DEPTH: Final = 20

_NULL = re.compile(r"(?:~|null|Null|NULL)?")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_MAX_DIGITS = 30


@dataclass(slots=True)
class Entry:
    """A value and where it comes from.

    Attributes:
        value: A scalar, a list of entries, or a dict of entries.
        origin: ``policy.yaml:12``, or the flag or variable that gave it.
        raw: A scalar as it was written.
    """

    value: Any
    origin: str
    raw: str = ""

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value


class _RefusedError(Exception):
    """Something that YAML allows and we do not."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(line, text)
        self.line = line
        self.text = text


class _Loader(yaml.SafeLoader):
    """Composes nodes without anchors, aliases, tags and deep nesting; scalars stay text."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _RefusedError(line, "anchors (&name) and aliases (*name) are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(line, f"tags are not allowed, found {event.tag}; remove it")
        if self.depth >= MAX_DEPTH:
            raise _RefusedError(line, f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse(data: bytes, source: str, problems: list[str], *, lines: bool = True) -> Entry:
    """Read one YAML document.

    Args:
        data: UTF-8, at most `MAX_BYTES`.
        source: Name of the file, or the flag or variable that ``data`` is the value of.
        problems: Takes what is wrong but does not keep the rest from being read.
        lines: Whether origins hold a line after the source.

    Raises:
        PolicyFileError: If ``data`` is not YAML, or not YAML that is allowed here.
    """
    if len(data) > MAX_BYTES:
        raise PolicyFileError(f"{source}: larger than {MAX_BYTES:,} bytes, which no policy is")
    where = f"{source}:{{}}" if lines else source
    try:
        node = _Loader(data.decode("utf-8-sig")).get_single_node()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyFileError(f"{where.format(line)}: not UTF-8 text: byte 0x{data[error.start]:02x}") from None
    except _RefusedError as error:
        raise PolicyFileError(f"{where.format(error.line)}: {error.text}") from None
    except yaml.reader.ReaderError as error:
        line = data.decode("utf-8-sig").count("\n", 0, error.position) + 1
        raise PolicyFileError(f"{where.format(line)}: character U+{error.character:04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        raise PolicyFileError(_syntax(error, where)) from None
    if node is None:
        return Entry(None, where.format(1))
    return _Builder(where, problems).build(node, "")


def _syntax(error: yaml.MarkedYAMLError, where: str) -> str:
    """A sentence for what PyYAML found wrong."""
    problem = error.problem or "cannot be read"
    # Something left open is wrong where it was opened, not where the file ends.
    left_open = "end of stream" in problem or "<stream end>" in problem
    mark = (error.context_mark if left_open else None) or error.problem_mark or error.context_mark
    hint = ""
    if "but found another document" in problem:
        problem = "a second document begins; a policy is one document"
    elif "'\\t'" in problem:
        hint = "; indent with spaces, not tabs"
    elif "mapping values are not allowed" in problem:
        hint = "; check the indentation, and quote text that holds ': '"
    return f"{where.format(mark.line + 1 if mark else 1)}: not valid YAML: {problem}{hint}"


class _Builder:
    """Turns nodes into entries."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self._where = where
        self._problems = problems

    def build(self, node: yaml.Node, path: str, origin: str = "") -> Entry:
        """The entry of ``node``; ``origin`` is the line of its key, where it has one."""
        origin = origin or self._origin(node)
        if isinstance(node, yaml.MappingNode):
            return Entry(self._mapping(node, path), origin)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return Entry([self.build(item, f"{path}.{index}" if path else str(index)) for index, item in items], origin)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return Entry(self._scalar(node.value, f"{origin}: {path}: ") if plain else node.value, origin, node.value)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            origin = self._origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._problems.append(
                    f"{origin}: {path or 'the file'}: a key is a list or a mapping; keys are plain words"
                )
                continue
            key = key_node.value
            at = f"{path}.{key}" if path else key
            if key in found:
                first = found[key].origin
                self._problems.append(f"{origin}: {at}: given twice, first at {first}; keep one of them")
                continue
            found[key] = self.build(value_node, at, origin)
        return found

    def _origin(self, node: yaml.Node) -> str:
        return self._where.format(node.start_mark.line + 1)

    def _scalar(self, text: str, place: str) -> Any:
        """The value of a plain scalar."""
        if _NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text) and len(text) <= _MAX_DIGITS:
            return int(text)
        if _FLOAT.fullmatch(text):
            value = float(text)
            if not math.isfinite(value):
                self._problems.append(f"{place}{text[:40]} is too large for a number")
                return 0.0
            return value
        if _NOT_FINITE.fullmatch(text):
            self._problems.append(f"{place}{text} is not a number that can be used; write a finite one")
            return 0.0
        return text
