"""File streams: lines of JSON, frames of ``.rec``, recorded ``.npz``, and folders of such files as partitions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from streams.base import Assignment, Found, Partition, Positions, Record, StreamError
from streams.file_reader import FileReader, Reader
from streams.file_sink import FileSink, open_envelope
from streams.file_state import FileState, PartitionState
from streams.framing import SUFFIXES
from streams.npz import NpzReader, Recorded, recorded
from streams.seams import CLOCK

__all__ = ["FileSink", "FileSource", "Recorded", "open_envelope", "recorded"]

_LOOK_EVERY: Final = 0.02
"""Seconds between two looks at files that have nothing new."""


class FileSource:
    """Reads named streams from files, to their ends or followed as they grow.

    A path that ends in ``.jsonl`` (one record a line), ``.rec`` (frames, see `streams.framing`) or ``.npz`` (see
    `streams.npz`, never followed) is one partition, 0. A folder is a stream whose partitions are the ``.jsonl`` and
    ``.rec`` files in it, numbered by name; a file keeps its number when others are added later, provided that
    ``state`` is given, and files added while the source is open are read from the next `open` on.

    Offsets are bytes (rows of ``.npz``). Timestamps are NaN: the time of an event is in its payload. At the end of a
    bounded file a line without a line feed is a record, a torn frame is passed over and counted in `torn`; a followed
    file is waited for. A followed file may be renamed and begun anew, or copied and truncated: the old one is read to
    its end first, and offsets go on increasing. What is written and truncated away between two looks is lost to any
    reader; and of several files rotated within one look, order is taken from their modification times.

    Args:
        streams: Path of each stream by name.
        follow: Wait for more at the end.
        state: Folder for committed offsets and for what is known of rotated files; without it both last as long as
            this object.
    """

    def __init__(self, streams: Mapping[str, Path], *, follow: bool = False, state: Path | None = None) -> None:
        self._paths = {stream: Path(path) for stream, path in streams.items()}
        self._follow = follow
        self._state = FileState(state)
        self._readers: dict[Partition, Reader] = {}
        self._paused: set[str] = set()
        self._turn = itertools.count()

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that this source reads."""
        return tuple(self._paths)

    @property
    def bounded(self) -> bool:
        """Whether the source ends by itself: not followed, or ``.npz`` alone."""
        return not self._follow or all(path.suffix == ".npz" for path in self._paths.values())

    @property
    def shared(self) -> bool:
        """Never: whoever reads a file reads all of it."""
        return False

    @property
    def trouble(self) -> str:
        """None: a file that cannot be read is an error."""
        return ""

    @property
    def torn(self) -> int:
        """Bytes passed over because a crash or a truncation left only part of a record."""
        return sum(reader.torn for reader in self._readers.values())

    def open(self, assignment: Assignment) -> None:
        """Find the files and take all of them as partitions.

        Raises:
            StreamError: A path is missing or is no stream, a file was replaced, or the state cannot be read.
        """
        self.close()
        self._state.load()
        self._readers = {partition: reader for stream in self._paths for partition, reader in self._find(stream)}
        kept = {partition: self._state.partitions[partition].committed for partition in self._readers}
        starts = assignment.assigned({partition: Found(0, committed) for partition, committed in kept.items()})
        try:
            for partition, reader in self._readers.items():
                reader.open(starts.get(partition, kept[partition] or 0))
        except StreamError:
            self.close()
            raise

    def poll(self, max_records: int, timeout: float) -> Sequence[Record]:
        """Return up to ``max_records`` records, fairly from all partitions; wait ``timeout`` seconds for the first.

        Returns at once when every partition has ended.

        Raises:
            StreamError: A file is damaged, or cannot be read.
        """
        deadline = CLOCK.monotonic() + timeout
        while True:
            records = self._take(max_records)
            if records or all(reader.ended for reader in self._readers.values()):
                return records
            left = deadline - CLOCK.monotonic()
            if left <= 0:
                return records
            time.sleep(min(left, _LOOK_EVERY))

    def ended(self) -> frozenset[Partition]:
        """Partitions of bounded streams that have been read to their end."""
        return frozenset([partition for partition, reader in self._readers.items() if reader.ended])

    def pause(self, streams: Sequence[str]) -> None:
        """Give no more records of these streams until `resume`."""
        self._paused.update(streams)

    def resume(self, streams: Sequence[str]) -> None:
        """Give records of these streams again."""
        self._paused.difference_update(streams)

    def commit(self, positions: Mapping[Partition, int], floors: Mapping[Partition, int] | None = None) -> None:
        """Remember that everything before these positions is answered; durable when it returns.

        Raises:
            StreamError: It could not be saved.
        """
        for partition, position in positions.items():
            if partition in self._state.partitions:
                self._state.partitions[partition].committed = position
        for reader in self._readers.values():
            reader.refresh()
        self._state.save()

    def committed(self) -> Positions:
        """The positions last committed."""
        known = {partition: self._state.partitions[partition].committed for partition in self._readers}
        return {partition: position for partition, position in known.items() if position is not None}

    def position(self, partition: Partition) -> int | None:
        """Where `poll` reads on."""
        reader = self._readers.get(partition)
        return None if reader is None else reader.position

    def identities(self) -> dict[str, str]:
        """None here: each partition remembers the file that it was read from, and refuses another."""
        return {}

    def beginnings(self) -> Positions:
        """None here: nobody takes away what a file holds."""
        return {}

    def lag(self) -> dict[Partition, int]:
        """Bytes (rows, for ``.npz``) between the position of `poll` and the end of each partition."""
        return {partition: reader.lag() for partition, reader in self._readers.items()}

    def close(self) -> None:
        """Close the files. Safe to call twice and before `open`."""
        for reader in self._readers.values():
            reader.close()
        self._readers = {}

    def _take(self, max_records: int) -> list[Record]:
        """Take from each partition in turn, first a fair share, then what the others left over."""
        readers = [r for r in self._readers.values() if r.partition[0] not in self._paused and not r.ended]
        if not readers:
            return []
        first = next(self._turn) % len(readers)
        readers = readers[first:] + readers[:first]
        records: list[Record] = []
        share = -(-max_records // len(readers))
        for limit in (share, max_records) if len(readers) > 1 else (max_records,):
            for reader in readers:
                if left := max_records - len(records):
                    records += reader.take(min(limit, left))
        return records

    def _find(self, stream: str) -> list[tuple[Partition, Reader]]:
        path = self._paths[stream]
        if not path.is_dir():
            return [((stream, 0), self._reader((stream, 0), path))]
        kept = {state.name: number for (name, number), state in self._state.partitions.items() if name == stream}
        names = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        if not names and not kept:
            raise StreamError(f"{path} holds no file whose name ends in {' or '.join(SUFFIXES)}")
        unused = itertools.count(max(kept.values(), default=-1) + 1)
        numbers = kept | {name: next(unused) for name in names if name not in kept}
        return [((stream, number), self._reader((stream, number), path / name)) for name, number in numbers.items()]

    def _reader(self, partition: Partition, path: Path) -> Reader:
        state = self._state.partitions.setdefault(partition, PartitionState(path.name))
        if path.suffix == ".npz":
            return NpzReader(partition, path)
        if path.suffix not in SUFFIXES:
            raise StreamError(f"{path}: a stream is a .jsonl, .rec or .npz file, or a folder of .jsonl and .rec files")
        return FileReader(partition, path, follow=self._follow, state=state, save=self._state.save)
