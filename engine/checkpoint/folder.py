"""One checkpoint folder: how it is written, and what is proven before any of it is used."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from engine.checkpoint.disk import Disk
from engine.checkpoint.errors import BadCheckpointError, NewerFormatError
from engine.checkpoint.manifest import FILE_NAME, LIMIT, FileEntry, Manifest, OldFileEntry, decode
from engine.checkpoint.migrate import migrate
from engine.checkpoint.state import unflatten
from engine.checkpoint.strict import Json, dumps, loads
from engine.checkpoint.tensors import read_tensors
from policies.interfaces import State
from streams.pace import Pace
from streams.seams import failpoint

MANIFEST = "MANIFEST"
META = "meta.json"
STATES = "states"
"""Key of ``meta`` that holds the JSON values of the states."""

CHUNK = 1 << 20
"""Bytes hashed and written at a time: what was just hashed is still in the processor's cache when it is written."""

Part: TypeAlias = Callable[[BinaryIO], object]
"""Writes one file of a checkpoint, in order and without seeking; what it returns is ignored."""

# A read that fails in one of these ways says something about the checkpoint; any other (too many open files, no
# permission) says something about the process, and must not make it give up a good checkpoint for an older one.
_DAMAGE = frozenset({errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EBADMSG, errno.ENXIO})


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is durable.

    Attributes:
        path: Its folder.
        step: Its step.
        bytes: Length of all its files but the manifest.
        seconds: What the save took.
        problems: What went wrong afterwards (an elder that could not be deleted, say); worth a log line each.
    """

    path: Path
    step: int
    bytes: int
    seconds: float
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fallback:
    """A checkpoint that was passed over, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Info:
    """What a manifest says.

    Attributes:
        name: The folder's name.
        step: Taken from the name, so that it is known for a damaged one as well.
        pinned: Whether it is kept for good.
        manifest: The body of the manifest; None if that cannot be read.
        problem: Why it cannot be read; empty otherwise.
    """

    name: str
    step: int
    pinned: bool
    manifest: Manifest | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A verified checkpoint.

    Attributes:
        path: Its folder.
        manifest: What it consists of and who wrote it.
        meta: What was given to `CheckpointStore.save` as ``meta``, brought to the newest format.
        fallbacks: Newer checkpoints that were passed over, newest first.
    """

    path: Path
    manifest: Manifest
    meta: dict[str, Any]
    disk: Disk = field(repr=False)
    fallbacks: tuple[Fallback, ...] = ()

    @property
    def step(self) -> int:
        """How many journal records the state covers."""
        return self.manifest.step

    def open(self, name: str) -> BinaryIO:
        """Open a file of the checkpoint for reading.

        Raises:
            BadCheckpointError: The checkpoint has no such file.
        """
        if name not in self.manifest.files:
            raise BadCheckpointError(f"{self.path.name} has no file {name!r}")
        return self.disk.open(self.path / name)

    def state(self, name: str) -> State:
        """Read the state that `snapshot` was given as ``name``; every call reads anew and shares nothing.

        Raises:
            BadCheckpointError: The checkpoint has no such state, or it is malformed.
        """
        trees = self.meta.get(STATES)
        if not isinstance(trees, dict) or name not in trees:
            raise BadCheckpointError(f"{self.path.name} has no state {name!r}")
        with _damage(name), self.open(f"{name}.safetensors") as file:
            return unflatten(read_tensors(file), trees[name])


class HashingFile(io.BufferedIOBase):
    """A file that is written to and never read: writes all it is given, and hashes it on the way."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._hash = FileEntry.hasher()
        self._count = 0

    def writable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._count

    def write(self, data: Any, /) -> int:
        """Write all of ``data`` (anything with contiguous bytes); returns its length in bytes."""
        view = memoryview(data)
        if not view.nbytes:
            return 0
        view = view.cast("B")
        failpoint("disk.write")
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            self._hash.update(chunk)
            while chunk:
                chunk = chunk[self._raw.write(chunk) :]
        self._count += len(view)
        return len(view)

    def entry(self) -> FileEntry:
        """Length and hash of what was written."""
        return FileEntry(bytes=self._count, blake3=self._hash.hexdigest())


def files_of(parts: Mapping[str, Part], meta: Mapping[str, Json]) -> dict[str, Part]:
    """All files of a checkpoint but the manifest.

    Raises:
        ValueError: A name of ``parts`` cannot be that of a file here, or ``meta`` is not strict JSON.
        TypeError: ``meta`` holds something that is not JSON.
    """
    for name in parts:
        if name == META or not re.fullmatch(FILE_NAME, name):
            raise ValueError(f"{name!r} cannot be a file of a checkpoint")
    raw = dumps(meta)
    return {**parts, META: lambda file: file.write(raw)}


def write_folder(
    disk: Disk, folder: Path, parts: Mapping[str, Part], finish: Callable[[dict[str, FileEntry]], Manifest]
) -> Manifest:
    """Make ``folder`` and write all of a checkpoint into it, durable down to the names in it, the manifest last.

    Args:
        disk: Where to write.
        folder: Does not exist yet. Its own name is made durable by nobody here.
        parts: What writes each file.
        finish: Gives the manifest for the files written.

    Raises:
        OSError: From the disk. The folder is then left as it is, for the caller to remove.
    """
    disk.mkdir(folder)
    manifest = finish({name: write_file(disk, folder / name, part) for name, part in parts.items()})
    raw = manifest.encode()
    write_file(disk, folder / MANIFEST, lambda file: file.write(raw))
    disk.sync_dir(folder)
    return manifest


def write_file(disk: Disk, path: Path, part: Part) -> FileEntry:
    """Make a file, durable in its bytes; its name needs `Disk.sync_dir`.

    Raises:
        OSError: From the disk.
    """
    with disk.create(path) as raw:
        file = HashingFile(raw)
        part(cast("BinaryIO", file))
        disk.fsync(raw)
    return file.entry()


def read_manifest(disk: Disk, folder: Path) -> Manifest:
    """Read the manifest of ``folder`` and compare it with the folder's name; looks at no other file.

    Raises:
        BadCheckpointError: There is none or it is damaged.
        NewerFormatError: A later version wrote it.
        OSError: It could not be read for a reason that lies outside the checkpoint.
    """
    with _damage(MANIFEST):
        _expect(disk, folder, "directory")
        _expect(disk, folder / MANIFEST, "file")
        with disk.open(folder / MANIFEST) as file:
            raw = file.read(LIMIT + 1)
    if len(raw) > LIMIT:
        raise BadCheckpointError(f"MANIFEST is longer than {LIMIT} bytes")
    try:
        manifest = decode(raw)
    except NewerFormatError as error:
        raise NewerFormatError(f"checkpoint {folder} cannot be read: {error}") from None
    if folder.name != name_of(manifest.step):
        raise BadCheckpointError(f"MANIFEST is that of {name_of(manifest.step)}")
    return manifest


def verify_folder(disk: Disk, folder: Path, pause: Callable[[float], object] | None = None) -> Manifest:
    """Prove that ``folder`` holds exactly the files of its manifest, each of its length and hash.

    Args:
        disk: Where it lies.
        folder: What to prove.
        pause: How to rest on the way; see `Pace`.

    Raises:
        BadCheckpointError: It does not; the message says what is wrong.
        NewerFormatError: A later version wrote it.
        OSError: It could not be read for a reason that lies outside the checkpoint.
    """
    manifest, pace = read_manifest(disk, folder), Pace(pause)
    with _damage(folder.name):
        present = set(disk.listdir(folder)) - {MANIFEST}
    _compare(manifest.files.keys() - present, "is missing")
    _compare(present - manifest.files.keys(), "does not belong to it")
    for name, entry in manifest.files.items():
        with _damage(name):
            _expect(disk, folder / name, "file")
            with disk.open(folder / name) as file:
                _verify_file(name, file, entry, pace)
    return manifest


def load_folder(disk: Disk, folder: Path) -> Loaded:
    """Verify ``folder`` and read its ``meta``, in the newest format.

    Raises:
        BadCheckpointError: As `verify_folder` does.
        NewerFormatError: As `verify_folder` does.
        OSError: As `verify_folder` does.
    """
    manifest = verify_folder(disk, folder)
    if META not in manifest.files:
        raise BadCheckpointError(f"{META} is missing")
    with _damage(META), disk.open(folder / META) as file:
        raw = file.read()
    try:
        meta = loads(raw)
    except ValueError as error:
        raise BadCheckpointError(f"{META}: {error}") from error
    if not isinstance(meta, dict):
        raise BadCheckpointError(f"{META} is not an object")
    return Loaded(path=folder, manifest=manifest, meta=migrate(meta, manifest.format), disk=disk)


def name_of(step: int) -> str:
    """The name of the folder of a step."""
    return f"ckpt-{step:012d}"


def _verify_file(name: str, file: BinaryIO, entry: FileEntry | OldFileEntry, pace: Pace) -> None:
    length = file.seek(0, os.SEEK_END)
    if length != entry.bytes:
        raise BadCheckpointError(f"{name} has {length} bytes, {entry.bytes} were written")
    file.seek(0)
    found = entry.hasher()
    buffer = memoryview(bytearray(min(CHUNK, length)))
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        found.update(buffer[:size])
        pace.rest()
    if not entry.matches(found):
        raise BadCheckpointError(f"{name} is damaged: its hash differs from that in MANIFEST")


def _expect(disk: Disk, path: Path, wanted: str) -> None:
    kind = disk.kind(path)
    if kind is None:
        raise BadCheckpointError(f"{path.name} is missing")
    if kind != wanted:
        raise BadCheckpointError(f"{path.name} is not a {wanted} (found: {kind})")


def _compare(names: Iterable[str], what: str) -> None:
    for name in sorted(names):
        raise BadCheckpointError(f"{name!r} {what}")


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn a read error that says something about the checkpoint into `BadCheckpointError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DAMAGE:
            raise
        raise BadCheckpointError(f"{name} cannot be read: {error.strerror}") from error
