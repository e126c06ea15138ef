"""The state of a join store at one point, on its way to a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from streams.join_format import FRAME_BYTES, Early, pack_early, pack_settled, payloads, write_frames
from streams.join_pack import Packed, payload_of
from streams.join_rows import SharedRows
from streams.join_settled import How
from streams.join_spill import SpillReader
from streams.pace import Pace

__all__ = ["JoinSnapshot"]

_ENTRY_BYTES = 256  # what an entry takes beside its inputs, as a rule
_ENTRIES = 64
"""Entries that are packed between two looks whether to rest."""


class JoinSnapshot:
    """The state of a join store at one point; made by `JoinStore.snapshot`, written on any thread, once."""

    def __init__(
        self,
        scalars: dict[str, Any],
        reader: SpillReader | None,
        waiting: SharedRows,
        early: dict[str, Early],
        settled: dict[str, How],
    ) -> None:
        self._scalars = scalars
        self._reader = reader
        self._waiting = waiting
        self._early = early
        self._settled = settled

    def write(self, file: BinaryIO, pause: Callable[[float], object] | None = None) -> None:
        """Write everything in the form of `streams.join_format`, and close.

        Args:
            file: Where to.
            pause: See `Pace`.

        Raises:
            OSError: The file cannot be written.
            JoinError: The events on disk cannot be read.
        """
        try:
            write_frames(file, self._frames(Pace(pause)))
        finally:
            self.close()

    def _frames(self, pace: Pace) -> Iterator[tuple[bytes, bytes]]:
        yield b"S", json.dumps(self._scalars).encode()
        settled = (pack_settled(name, how) for name, how in self._settled.items())
        early = (pack_early(name, feedback) for name, feedback in self._early.items())
        on_disk = self._reader.entries() if self._reader is not None else ()
        parts = (
            (b"R", payloads(pace.over(settled, _ENTRIES))),
            (b"D", payloads(pace.over(on_disk, _ENTRIES))),
            (b"B", self._blocks(pace)),
            (b"F", payloads(pace.over(early, _ENTRIES))),
        )
        for kind, packed in parts:
            for payload in pace.over(packed):
                yield kind, payload

    def _blocks(self, pace: Pace) -> Iterator[bytes]:
        """What waits in memory in payloads of about `FRAME_BYTES`, the same for the same events."""
        size = max(1, FRAME_BYTES // (_ENTRY_BYTES + max(pace.over(self._waiting.longest()), default=0)))
        held: list[Packed] = []
        room = size
        for part in pace.over(self._waiting.parts()):
            at = 0
            while len(part) - at >= room:
                yield payload_of([*held, part.between(at, at + room)])
                at, held, room = at + room, [], size
            held.append(part.between(at, len(part)))
            room -= len(part) - at
        if room < size:
            yield payload_of(held)

    def close(self) -> None:
        """Let go of everything. Safe to call twice."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._waiting, self._early, self._settled = SharedRows(()), {}, {}
