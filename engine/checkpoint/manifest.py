"""The manifest: what a checkpoint consists of, with a hash of each file and one of itself.

It is two lines: a JSON object, and the BLAKE2b-256 of that line in hexadecimal. So the bytes are proven intact before
anything parses them, in this format and in all later ones.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Protocol

import blake3 as blake3_
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from engine.checkpoint.errors import BadCheckpointError, NewerFormatError
from engine.checkpoint.strict import dumps, loads

FORMAT = 3
"""The format written. A later one adds a pure function to `engine.checkpoint.migrate`, and a golden checkpoint."""

READER = "0.1.0"
"""The first version of adaptd that reads `FORMAT`."""

FILE_NAME = r"^[a-z][a-z0-9_-]{0,63}\.[a-z0-9]{1,16}$"
"""What a file of a checkpoint may be called: no path, no dot in front, nothing a shell would notice."""

LIMIT = 1 << 20
"""Bytes of the largest manifest that is read."""

_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Step = Annotated[int, Field(ge=0, lt=10**12)]


def digest(data: bytes) -> str:
    """BLAKE2b-256 in hexadecimal."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


class Hash(Protocol):
    """A running hash, of `hashlib` or like one."""

    def update(self, data: Any, /) -> object:
        """Take in more bytes."""
        ...

    def hexdigest(self) -> str:
        """The hash of all bytes so far, in hexadecimal."""
        ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(_Strict):
    """Length in bytes and BLAKE3 of one file: it is as sure as BLAKE2b, and most of a save was hashing."""

    bytes: Annotated[int, Field(ge=0)]
    blake3: _Digest

    @staticmethod
    def hasher() -> Hash:
        """Return a hash of no bytes yet, of the kind that `matches` takes."""
        return blake3_.blake3()

    def matches(self, found: Hash) -> bool:
        """Whether the file had this hash when it was written."""
        return found.hexdigest() == self.blake3


class OldFileEntry(_Strict):
    """Length in bytes and BLAKE2b-256 of one file, as formats 1 and 2 have it."""

    bytes: Annotated[int, Field(ge=0)]
    blake2b: _Digest

    @staticmethod
    def hasher() -> Hash:
        """See `FileEntry.hasher`."""
        return hashlib.blake2b(digest_size=32)

    def matches(self, found: Hash) -> bool:
        """See `FileEntry.matches`."""
        return found.hexdigest() == self.blake2b


class Manifest(_Strict):
    """The body of a manifest.

    Attributes:
        format: Version of the layout.
        reader: First version of adaptd that reads it.
        step: How many journal records the state covers.
        epoch: How many times a daemon had started on the directory; tells apart equal steps of different runs.
        parent: The step that this run continued from, if any.
        created: Wall clock in seconds since the epoch, for people only.
        adaptd: Version that wrote it.
        torch: Version of PyTorch that wrote it.
        config_digest: Digest of the policy in force.
        files: Every other file of the folder by name.
    """

    format: Annotated[int, Field(ge=1, le=FORMAT)] = FORMAT
    reader: str = READER
    step: _Step
    epoch: Annotated[int, Field(ge=1)]
    parent: _Step | None
    created: float
    adaptd: str
    torch: str
    config_digest: str
    files: dict[Annotated[str, StringConstraints(pattern=FILE_NAME)], FileEntry | OldFileEntry]

    def encode(self) -> bytes:
        """The two lines."""
        body = dumps(self.model_dump())
        return body + digest(body).encode("ascii") + b"\n"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.files.values())


def decode(raw: bytes) -> Manifest:
    """Read the two lines.

    Raises:
        BadCheckpointError: They are damaged or say something impossible.
        NewerFormatError: They are intact, and written by a later version.
    """
    body, newline, rest = raw.partition(b"\n")
    if digest(body + newline).encode("ascii") + b"\n" != rest:
        raise BadCheckpointError("MANIFEST does not match its own hash")
    try:
        value = loads(body)
        _refuse_newer(value)
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BadCheckpointError(f"MANIFEST: {place or 'body'}: {first['msg']}") from error
    except ValueError as error:
        raise BadCheckpointError(f"MANIFEST: {error}") from error


def _refuse_newer(value: Any) -> None:
    written = value.get("format") if isinstance(value, dict) else None
    if type(written) is int and written > FORMAT:
        needed = value.get("reader")
        install = f"adaptd {needed}" if isinstance(needed, str) else "the version of adaptd that wrote it"
        raise NewerFormatError(
            f"it has format {written} and this version reads up to {FORMAT}; install {install} or later"
        )
