"""The state of a join store at one point, on its way to a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from streams.join_format import FRAME_BYTES, Early, pack_block, pack_early, pack_settled, payloads, write_frames
from streams.join_rows import WaitingRows
from streams.join_settled import How
from streams.join_spill import SpillReader

__all__ = ["JoinSnapshot"]

_ENTRY_BYTES = 256  # what an entry takes beside its inputs, as a rule


class JoinSnapshot:
    """The state of a join store at one point; made by `JoinStore.snapshot`, written on any thread, once."""

    def __init__(
        self,
        scalars: dict[str, Any],
        reader: SpillReader | None,
        waiting: WaitingRows,
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
            (b"R", payloads(pack_settled(name, how) for name, how in self._settled.items())),
            (b"D", payloads(self._reader.entries() if self._reader is not None else ())),
            (b"B", self._blocks()),
            (b"F", payloads(pack_early(name, feedback) for name, feedback in self._early.items())),
        )
        for kind, packed in parts:
            for payload in packed:
                yield kind, payload

    def _blocks(self) -> Iterator[bytes]:
        """What waits in memory in payloads of about `FRAME_BYTES`, the same for the same events."""
        waiting = self._waiting
        size = max(1, FRAME_BYTES // (_ENTRY_BYTES + max(map(len, waiting.inputs), default=0)))
        for at in range(0, len(waiting), size):
            yield pack_block(*waiting[at : at + size].columns)

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._waiting, self._early, self._settled = WaitingRows.of([]), {}, {}
