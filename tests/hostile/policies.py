"""Policy files that somebody made to harm whoever loads them: none of them may become a running policy."""

from __future__ import annotations

from collections.abc import Iterator

BASE = 'version: 1\nmodel: {factory: "./model.py:build", inputs: {shape: [4], dtype: float32}}\n'


def corpus() -> Iterator[tuple[str, str]]:
    """Names and texts, always the same."""
    for maker in (_bombs, _tags, _nested, _twice, _huge, _factories, _escapes, _cut):
        for number, text in enumerate(maker()):
            yield f"{maker.__name__[1:]} {number}", text


def _bombs() -> Iterator[str]:
    """Few bytes that grow to many values where aliases are followed."""
    for width, depth in ((9, 9), (2, 40), (100, 4), (10, 2)):
        lines = ["a0: &a0 [x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
        yield BASE + "\n".join(lines) + "\n"
    yield BASE + "x: &x [*x]\n"
    yield BASE + "x: &x {<<: *x}\n"
    yield BASE + "state: &s ./state\nlog: {level: *s}\n"
    yield "&r " + BASE


def _tags() -> Iterator[str]:
    """Objects that some loaders would make."""
    for tag in (
        "!!python/object/apply:os.system [id]",
        "!!python/object/new:os.system [id]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:engine.policy.Policy {}",
        "!!python/tuple [1]",
        "!!python/object/apply:subprocess.Popen [[id]]",
        "!!python/object/apply:eval ['1']",
        "!!binary aGk=",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!timestamp 2001-01-01",
        "!!str x",
        "!include /etc/passwd",
        "!env HOME",
        "! x",
        "!<tag:yaml.org,2002:python/name:os.system> x",
    ):
        yield BASE + f"state: {tag}\n"
    yield "%TAG ! tag:yaml.org,2002:python/\n---\n" + BASE + "state: !name:os.system\n"


def _nested() -> Iterator[str]:
    for depth in (21, 500, 5_000, 50_000):
        yield BASE + f"state: {'[' * depth}{']' * depth}\n"
        yield BASE + f"state: {'{a: ' * depth}{'}' * depth}\n"
        yield BASE + f"state: {'[' * depth}\n"
    for depth in (21, 300):
        yield BASE + "state:\n" + "".join(f"{' ' * (n + 1)}a:\n" for n in range(depth))
        yield BASE + "state:\n" + "- " * depth + "x\n"


def _twice() -> Iterator[str]:
    for section in ("state: ./a\n", "seed: 1\n", "log: {level: info}\n", "batching: {max_size: 8}\n"):
        yield BASE + section + section
    yield BASE + "batching: {max_size: 8, max_size: 8}\n"
    yield BASE + BASE
    yield BASE + "---\n" + BASE
    yield BASE + "? [a, b]\n: 1\n"
    yield BASE + "? {a: b}\n: 1\n"


def _huge() -> Iterator[str]:
    yield BASE + f"state: {'x' * 2_000_000}\n"
    yield BASE + f"seed: {'9' * 500_000}\n"
    yield BASE + f"seed: {'9' * 4_000}\n"
    yield BASE + f"learning: {{lr: 1e{'9' * 50}}}\n"
    yield BASE + f"batching: {{max_size: {2**63}}}\n"
    yield BASE + f"batching: {{max_delay: {'9' * 40}h}}\n"
    yield BASE + f"join: {{max_bytes: {'9' * 40}GB}}\n"
    yield BASE + f"join: {{max_bytes: {'9' * 400}GB}}\n"
    yield BASE + f"join: {{window: {'9' * 400}w}}\n"
    yield BASE + "join: {window: 1e300}\n"
    yield BASE.replace("[4]", "[100000, 100000]")
    yield BASE.replace("[4]", "[4294967296, 4294967296, 4294967296]")
    yield BASE.replace("[4]", f"[{', '.join(['1'] * 5_000)}]")
    yield BASE + "#" * 1_100_000
    yield BASE + f"{'k' * 100_000}: 1\n"


def _factories() -> Iterator[str]:
    for name in (
        *("os:system", "os.path:join", "builtins:eval", "builtins:exec", "subprocess:run", "shutil:rmtree", "sys:exit"),
        *("importlib:import_module", "posix:system", "pty:spawn", "code:interact", "pickle:loads", "torch:load"),
        *("policies.__builtins__:eval", "engine.factory:build_model", "engine.cli:main", "kernels:self_check"),
        *(
            "./missing.py:build",
            "./model.py:missing",
            "./model.py:__builtins__",
            "./model.py:secret",
            "././model.py:os",
        ),
        *("../model.py:build", "./../model.py:build", "/etc/passwd:build", "//model.py:build", "~/model.py:build"),
        *("file:///model.py:build", "http://127.0.0.1/model.py:build", "./model.pyc:build", "./model.so:build"),
        *(
            "\uff0fmodel.py:build",
            "\u2024/model.py:build",
            "./m\u043edel.py:build",
            "./model.py\u200b:build",
            "\uff4fs:system",
        ),
        *("./model.py:build;import os", "./model.py:build\\n", "./model.py::build", ":build", ".:build", "./:build"),
        *(
            "./model.py:lambda",
            "model:build",
            "model.py",
            "./pipe.py:build",
            "./folder.py:build",
            "./model.py\\0:build",
        ),
    ):
        yield BASE.replace("./model.py:build", name)


def _escapes() -> Iterator[str]:
    """Characters that would end up in a terminal or a path."""
    for character in ("\\0", "\\x1b[2J", "\\r", "\\u202e"):
        yield BASE.replace("./model.py", f"./{character}model.py")
    for character in ("\x00", "\x1b", "\x7f", "\ufffe"):
        yield BASE + f"state: a{character}b\n"
    yield BASE + "\tstate: x\n"


def _cut() -> Iterator[str]:
    for end in range(3, len(BASE) - 2, 12):
        yield BASE[:end]
