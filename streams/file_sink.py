"""Writing messages to files."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from streams.base import Message, Record, RefusedMessageError, StreamError, StreamUnavailableError
from streams.file_state import sync_directory
from streams.framing import MAGIC, FrameError, Origin, frames_of, line_of, split_frames, split_of

_BLOCK_BYTES: Final = 1024 * 1024
_ERRORS: Final = "__adaptd.errors."


class FileSink:
    """Appends messages to one file, one writer at a time.

    ``.jsonl`` takes one value a line and ``.rec`` one a frame; keys and headers are not written. With ``envelope`` a
    line is a JSON object of all there is: ``key`` and ``value`` in base64 (``key`` may be null), ``headers`` as a list
    of name and base64, and ``errors``, what the headers of a dead letter say, in plain text.

    A file that is not there is made with the permissions that the umask leaves, as others read it.

    Args:
        path: The file; its folder must exist.
        envelope: Write whole messages rather than values; for dead letters.
        fsync: Make `flush` wait for the disk.
        name: The stream written to; by default the name of the file.

    Raises:
        StreamError: The name ends in neither ``.jsonl`` nor ``.rec``, or an envelope is asked of ``.rec``.

    Attributes:
        repaired: Bytes of torn records that `open` has cut off the end.
    """

    def __init__(self, path: Path, *, envelope: bool = False, fsync: bool = True, name: str | None = None) -> None:
        self.repaired = 0
        self._path = Path(path)
        split_of(self._path)
        self._frames = self._path.suffix == ".rec"
        if envelope and self._frames:
            raise StreamError(f"{path}: envelopes are lines of JSON; give the file a name that ends in .jsonl")
        self._envelope = envelope
        self._fsync = fsync
        self._name = name or self._path.name
        self._fd = -1
        self._size = 0
        self._parts: list[bytes] = []
        self._buffered = 0

    @property
    def name(self) -> str:
        """The stream written to."""
        return self._name

    def open(self) -> None:
        """Open the file for appending, and cut off what a crash left of a last record.

        Raises:
            StreamError: The file cannot be written, is damaged before its end, or has another writer.
        """
        self.close()
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._repair()
            sync_directory(self._path.parent)
        except BlockingIOError:
            self._abandon()
            raise StreamError(
                f"{self._path} is being written by somebody else; give each writer its own file"
            ) from None
        except OSError as error:
            self._abandon()
            raise StreamError(f"cannot write {self._path}: {error.strerror}") from error
        except StreamError:
            self._abandon()
            raise

    def send(self, messages: Sequence[Message]) -> None:
        """Accept messages in order; they are written when a block is full, or by `flush`.

        Raises:
            RefusedMessageError: A message cannot be a record of this file; none of them is accepted.
            StreamUnavailableError: The disk takes nothing at present; none of them is accepted.
        """
        part = self._encode(messages)
        if self._buffered + len(part) >= _BLOCK_BYTES:
            self._write(part)
            return
        self._parts.append(part)
        self._buffered += len(part)

    def flush(self, timeout: float) -> None:
        """Return once everything sent is in the file, and on the disk unless ``fsync`` is off.

        Args:
            timeout: Not used: the operating system gives no way to stop waiting for a disk.

        Raises:
            StreamUnavailableError: The disk is full or does not write at present.
            StreamError: The disk failed to keep what it took; a second attempt would not show it.
        """
        self._write()
        if not self._fsync or self._fd < 0:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            # After a failed fsync the kernel may have dropped the pages and report success next time.
            self._abandon()
            raise StreamError(f"the disk lost what was written to {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Write what is left, as far as possible, and close the file. Safe to call twice."""
        if self._fd < 0:
            return
        with contextlib.suppress(StreamError):  # only `flush` promises; nothing was committed on the strength of this
            self.flush(0)
        self._abandon()

    def _encode(self, messages: Sequence[Message]) -> bytes:
        try:
            if self._frames:
                return frames_of([message.value for message in messages])
            values = [_seal(message) if self._envelope else message.value for message in messages]
            return b"".join(map(line_of, values))
        except ValueError as error:
            raise RefusedMessageError(f"{self._path}: {error}") from None

    def _write(self, part: bytes = b"") -> None:
        """Write what is buffered and this part, or nothing."""
        block = b"".join((*self._parts, part))
        if not block:
            return
        if self._fd < 0:
            raise StreamError(f"{self._path} is not open")
        try:
            written = 0
            while written < len(block):
                written += os.write(self._fd, memoryview(block)[written:])
        except OSError as error:
            # Part of the block may be in the file; a retry must not follow half a record.
            os.ftruncate(self._fd, self._size)
            raise StreamUnavailableError(f"cannot write {self._path}: {error.strerror}") from error
        self._size += len(block)
        self._parts, self._buffered = [], 0

    def _abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._parts, self._buffered = [], 0

    def _repair(self) -> None:
        size = os.fstat(self._fd).st_size
        good = self._last_frame(size) if self._frames else self._last_line(size)
        if good < size:
            os.ftruncate(self._fd, good)
            self.repaired += size - good
        if self._frames and not good:
            os.write(self._fd, MAGIC)
            good = len(MAGIC)
        self._size = good

    def _last_line(self, size: int) -> int:
        """End of the last whole line."""
        at = size
        while at > 0:
            start = max(0, at - _BLOCK_BYTES)
            found = os.pread(self._fd, at - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            at = start
        return 0

    def _last_frame(self, size: int) -> int:
        """End of the last whole frame; everything before it is checked."""
        at = 0
        carry = b""
        while block := os.pread(self._fd, _BLOCK_BYTES, at + len(carry)):
            buffer = carry + block
            records: list[Record] = []
            try:
                used = split_frames(buffer, Origin(self._name, 0, 0, at), records)
            except FrameError as error:
                return self._judge(at + error.at, size, error.message)
            at, carry = at + used, buffer[used:]
        return at

    def _judge(self, at: int, size: int, message: str) -> int:
        """Take a bad last frame for a torn one; anywhere else it means damage."""
        head = os.pread(self._fd, 8, at)
        rest = os.pread(self._fd, _BLOCK_BYTES, at)
        if at and (at + 8 + int.from_bytes(head[:4], "little") == size or not rest.strip(b"\0")):
            return at
        raise StreamError(f"{self._path} is damaged at byte {at}: {message}; restore the file, or move it away")


def _seal(message: Message) -> bytes:
    errors = {name.removeprefix(_ERRORS): value for name, value in message.headers if name.startswith(_ERRORS)}
    sealed: dict[str, Any] = {
        "errors": {name: value.decode(errors="replace") for name, value in errors.items()},
        "key": None if message.key is None else base64.b64encode(message.key).decode(),
        "headers": [[name, base64.b64encode(value).decode()] for name, value in message.headers],
        "value": base64.b64encode(message.value).decode(),
    }
    return json.dumps(sealed, separators=(",", ":")).encode()


def open_envelope(line: bytes) -> Message:
    """Return the message that an envelope holds.

    Raises:
        ValueError: The line is not an envelope.
    """
    try:
        sealed = json.loads(line)
        key, headers = sealed["key"], sealed["headers"]
        return Message(
            None if key is None else base64.b64decode(key, validate=True),
            base64.b64decode(sealed["value"], validate=True),
            tuple((str(name), base64.b64decode(value, validate=True)) for name, value in headers),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("the line is not an envelope of a message") from error
