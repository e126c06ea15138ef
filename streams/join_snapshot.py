"""The state of a join store at one point, on its way to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from streams.join_format import Early, Fields, pack_early, pack_entry, pack_settled, payloads, write_frames
from streams.join_settled import How
from streams.join_spill import SpillReader

__all__ = ["JoinSnapshot"]


class JoinSnapshot:
    """The state of a join store at one point; made by `JoinStore.snapshot`, written on any thread, once."""

    def __init__(
        self,
        scalars: dict[str, Any],
        reader: SpillReader | None,
        waiting: dict[str, Fields],
        early: dict[str, Early],
        settled: dict[str, How],
    ) -> None:
        self._scalars = scalars
        self._reader = reader
        self._waiting = waiting
        self._early = early
        self._settled = settled

    def write(self, file: BinaryIO) -> None:
        """Write everything in the form of `streams.join_format`, and close.

        Raises:
            OSError: The file cannot be written.
            JoinError: The events on disk cannot be read.
        """
        try:
            write_frames(file, self._frames())
        finally:
            self.close()

    def _frames(self) -> Iterator[tuple[bytes, bytes]]:
        yield b"S", json.dumps(self._scalars).encode()
        parts = (
            (b"R", (pack_settled(name, how) for name, how in self._settled.items())),
            (b"D", self._reader.entries() if self._reader is not None else ()),
            (b"W", (pack_entry(name, fields) for name, fields in self._waiting.items())),
            (b"F", (pack_early(name, feedback) for name, feedback in self._early.items())),
        )
        for kind, packed in parts:
            for payload in payloads(packed):
                yield kind, payload

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._waiting, self._early, self._settled = {}, {}, {}
