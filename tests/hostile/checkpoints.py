"""Ways to damage or forge the files of a checkpoint: none may be loaded, none may be followed out of its folder."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from blake3 import blake3

from engine.checkpoint.manifest import digest

Harm = Callable[[Path], object]
FILES = ("MANIFEST", "meta.json", "model.safetensors", "policy.safetensors")


def corpus() -> Iterator[tuple[str, Harm]]:
    """Names and what to do to the folder of a checkpoint, always the same."""
    for maker in (_flips, _cuts, _strangers, _forged_manifests, _forged_tensors):
        for number, harm in enumerate(maker()):
            yield f"{maker.__name__[1:]} {number}", harm


def found(folder: Path) -> frozenset[tuple[str, object]]:
    """What a folder holds, by name: two harms that leave the same are one."""
    return frozenset((path.name, _content(path)) for path in folder.iterdir())


def _content(path: Path) -> object:
    if path.is_symlink():
        return str(path.readlink())
    if not path.is_file():
        return path.stat().st_mode
    return path.read_bytes() if path.stat().st_size < 1 << 24 else path.stat().st_size


def _write(name: str, content: Callable[[bytes], bytes]) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content(path.read_bytes()))

    return harm


def _flips() -> Iterator[Harm]:
    """One bit, somewhere in each file."""
    source = random.Random(0)
    for name in FILES:
        for where, bit in [(source.random(), source.randrange(8)) for _ in range(8)]:

            def flipped(raw: bytes, where: float = where, bit: int = bit) -> bytes:
                at = int(where * len(raw))
                return raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]

            yield _write(name, flipped)


def _cuts() -> Iterator[Harm]:
    """Less of a file than there was, or more."""
    for name in FILES:
        for eighths in range(8):
            yield _write(name, lambda raw, eighths=eighths: raw[: len(raw) * eighths // 8])  # type: ignore[misc]
        yield _write(name, lambda raw: raw + b"\0")
        yield _write(name, lambda raw: raw + raw)


def _strangers() -> Iterator[Harm]:
    """Other things under the names of files, and files that do not belong."""
    pickled = b"\x80\x04\x95\x1d\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
    for name in FILES:
        yield _write(name, lambda raw: pickled)
        yield lambda folder, name=name: (folder / name).unlink()  # type: ignore[misc]
        yield lambda folder, name=name: _replace(folder / name, os.mkfifo)  # type: ignore[misc]
        yield lambda folder, name=name: _replace(folder / name, Path.mkdir)  # type: ignore[misc]
        yield lambda folder, name=name: _replace(  # type: ignore[misc]
            folder / name, lambda path: path.symlink_to("/dev/zero")
        )
        yield lambda folder, name=name: _replace(folder / name, _link)  # type: ignore[misc]
        yield lambda folder, name=name: os.truncate(folder / name, 1 << 40)  # type: ignore[misc]
    for name in ("evil.pkl", "data.pkl", "..x", "model.pt", "MANIFEST.1", "policy.safetensors\n"):
        yield lambda folder, name=name: (folder / name).write_bytes(pickled)  # type: ignore[misc]
    yield lambda folder: (folder / "model.safetensors").rename(folder / "model.pt")
    yield lambda folder: _swap(folder / "model.safetensors", folder / "policy.safetensors")
    yield lambda folder: _swap(folder / "model.safetensors", folder / "meta.json")
    yield lambda folder: _swap(folder / "MANIFEST", folder / "meta.json")


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _link(path: Path) -> None:
    """A link to the very bytes that belong there."""
    elsewhere = path.parent.parent / "elsewhere"
    shutil.copy(path.parent.parent / "copy" / path.name, elsewhere)
    path.symlink_to(elsewhere)


def _swap(one: Path, other: Path) -> None:
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)


def _forged_manifests() -> Iterator[Harm]:
    """A manifest whose own hash fits, and that says what it must not."""
    entry = {"bytes": 1, "blake3": "0" * 64}
    for name in ("../x", "/etc/passwd", "a/b", "..", ".", "", "x\0y", "meta.json\n", "\u202etxt", "x" * 5_000):
        yield _forged(lambda body, name=name: body["files"].update({name: entry}))  # type: ignore[misc]
    for key, value in (
        ("format", 2**70),
        ("format", "1"),
        ("format", None),
        ("step", 1.5),
        ("step", 2**70),
        ("step", "1"),
        ("files", []),
        ("files", {"meta.json": {}}),
        ("files", None),
        ("new", 1),
    ):
        yield _forged(lambda body, key=key, value=value: body.update({key: value}))  # type: ignore[misc]
    for size in (-1, 1e300, 2**70, "1", None):
        yield _forged(lambda body, size=size: body["files"]["meta.json"].update(bytes=size))  # type: ignore[misc]
    for text in (
        "[" * 50_000,
        '{"format":1,"format":1}',
        '{"format":1e999}',
        "{",
        "null",
        '"x"',
        "\ufeff{}",
        "1" * 9_000,
    ):
        yield lambda folder, text=text: _sign(folder, text.encode())  # type: ignore[misc]


def _forged(change: Callable[[dict[str, object]], object]) -> Harm:
    def harm(folder: Path) -> None:
        body = json.loads((folder / "MANIFEST").read_bytes().partition(b"\n")[0])
        change(body)
        _sign(folder, json.dumps(body).encode())

    return harm


def _sign(folder: Path, body: bytes) -> None:
    (folder / "MANIFEST").write_bytes(body + b"\n" + digest(body + b"\n").encode() + b"\n")


def _forged_tensors() -> Iterator[Harm]:
    """Tensors with a hash that fits, whose head claims what is not there."""
    heads: tuple[object, ...] = (
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 2**42]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}},
        {"w": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}},
        {"w": {"dtype": "PY", "shape": [3], "data_offsets": [0, 12]}},
        {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "v": {"dtype": "F32"}},
        {},
        [],
    )
    for head in heads:
        text = json.dumps(head).encode()
        yield resigned("model.safetensors", struct.pack("<Q", len(text)) + text + b"\0" * 12)
    for claim in (2**63, 2**40, 100 * 2**20):
        yield resigned("model.safetensors", struct.pack("<Q", claim) + b"{}")
    yield resigned("meta.json", b'{"states": {}, "states": {}}')
    yield resigned("meta.json", b"[" * 100_000)
    yield resigned("meta.json", b'{"states": NaN}')
    yield resigned("meta.json", b"\x80\x04.")


def resigned(name: str, content: bytes) -> Harm:
    """Write a file and have the manifest vouch for it."""

    def harm(folder: Path) -> None:
        (folder / name).write_bytes(content)
        body = json.loads((folder / "MANIFEST").read_bytes().partition(b"\n")[0])
        known = body["files"][name]
        known["bytes"], known["blake3"] = len(content), blake3(content).hexdigest()
        _sign(folder, json.dumps(body).encode())

    return harm
