"""The part of the join store that lies on disk: one SQLite file, made afresh at every start.

Nothing here outlives the process (checkpoints hold the truth), so nothing is synced. Rows are appended in the order in
which they come and mostly leave in that order too, so the pages that they free are used again by the next ones.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from streams.join_format import Fields, JoinError, encode_id, pack_entries, unpack_entries
from streams.join_pack import WaitingRows

__all__ = ["Row", "Spill", "row_bytes"]

T = TypeVar("T")

FILE_NAME = "joins.sqlite"
_PAGE = 16384  # five rows of 3 KB a page: little waste, and a removal rewrites little
_LOCAL = _PAGE - 35  # the largest row that SQLite keeps inside a page
_LOCAL_LEAST = (_PAGE - 12) * 32 // 255 - 23  # what it keeps there of a larger one
_ROW = 36  # header and number columns of a row, cell pointer
_CACHE_KIB = 4096
_WAL_PAGES = 256
_SCHEMA = """
CREATE TABLE waiting (
    seq INTEGER PRIMARY KEY, id BLOB NOT NULL, time REAL, cost INTEGER NOT NULL, part INTEGER NOT NULL,
    entry BLOB NOT NULL
);
CREATE UNIQUE INDEX by_id ON waiting (id);
CREATE INDEX by_time ON waiting (time);
"""
_SIZES = (1, 8, 64, 512)
_MOST = 2048
_COLUMNS = 6
# Lists of parameters come in few lengths, so that every statement is compiled once. They hold much, as the interpreter
# is given away for every step of a statement, and who then has it keeps it for milliseconds.
_BY_IDS = {n: f"SELECT seq, cost, entry FROM waiting WHERE id IN ({','.join('?' * n)})" for n in _SIZES}  # noqa: S608
_HAS_IDS = {n: f"SELECT id FROM waiting WHERE id IN ({','.join('?' * n)})" for n in _SIZES}  # noqa: S608
_INSERT = {n: f"INSERT INTO waiting VALUES {','.join(['(?, ?, ?, ?, ?, ?)'] * n)}" for n in (*_SIZES, _MOST)}  # noqa: S608
_DELETE = {n: f"DELETE FROM waiting WHERE seq IN ({','.join('?' * n)})" for n in (*_SIZES, _MOST)}  # noqa: S608


class Row(NamedTuple):
    """A waiting event as it lies on disk."""

    seq: int
    cost: int
    fields: Fields


@lru_cache(1024)
def row_bytes(id_size: int, entry_size: int) -> int:
    """Return what a row takes in the file, in bytes.

    That is its share of a page and its entries in both indexes, and half as much again for the holes that rows leave
    which are removed out of turn (SQLite merges pages only when they are emptier still; see benchmarks/join_memory).
    """
    size = _ROW + id_size + entry_size
    if size <= _LOCAL:
        share = _PAGE // (_PAGE // size)
    else:
        share = _LOCAL_LEAST - (_LOCAL_LEAST - size) // (_PAGE - 4) * _PAGE
    return (share + id_size + 32) * 3 // 2


def _parts(rows: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """Yield rows in parts of the lengths that there are statements for, none longer than ``most``."""
    at = 0
    while at < len(rows):
        size = next(size for size in (_MOST, *reversed(_SIZES)) if size <= min(most, len(rows) - at))
        yield rows[at : at + size]
        at += size


class Spill:
    """Waiting events on disk. Every call is made by the thread that owns the store.

    Raises:
        JoinError: The file cannot be made, read or changed; the message names it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME
        self.count = 0
        self.bytes = 0
        """What the rows take, by `row_bytes`."""
        self._next = 1
        try:
            self._connection = self._open()
        except (OSError, sqlite3.Error) as error:
            raise self._failed("made", error) from error
        # Some builds of SQLite take no more than 999.
        self._variables = self._connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._unlink()
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        for pragma in (
            f"page_size = {_PAGE}",
            "journal_mode = WAL",
            "synchronous = OFF",
            f"cache_size = -{_CACHE_KIB}",
            f"wal_autocheckpoint = {_WAL_PAGES}",
            f"journal_size_limit = {4 * _WAL_PAGES * _PAGE}",
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")
        connection.executescript(_SCHEMA)
        return connection

    def _unlink(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _failed(self, done: str, error: Exception) -> JoinError:
        return JoinError(f"waiting joins cannot be {done} in {self.path}: {error}; check the disk it is on")

    def put(self, events: WaitingRows) -> None:
        """Append events, in order and all or none."""
        keys = list(map(encode_id, events.ids))
        entries = pack_entries(keys, *events.columns[1:])
        costs = list(map(row_bytes, map(len, keys), map(len, entries)))
        numbers = range(self._next, self._next + len(keys))
        rows = list(zip(numbers, keys, events.times, costs, events.partitions, entries, strict=True))
        try:
            with _Transaction(self._connection):
                for part in _parts(rows, self._variables // _COLUMNS):
                    self._connection.execute(_INSERT[len(part)], list(chain.from_iterable(part)))
        except sqlite3.Error as error:
            raise self._failed("kept", error) from error
        self.count += len(rows)
        self.bytes += sum(costs)
        self._next = numbers.stop

    def find(self, ids: Sequence[str]) -> dict[str, Row]:
        """Return the rows of those ids that wait here."""
        found = {}
        for seq, cost, entry in self._select(_BY_IDS, ids):
            for name, fields in unpack_entries(entry):
                found[name] = Row(seq, cost, fields)
        return found

    def holds(self, ids: Sequence[str]) -> set[str]:
        """Return which of the ids wait here."""
        return {key.decode("utf-8", "surrogatepass") for (key,) in self._select(_HAS_IDS, ids)}

    def _select(self, statements: dict[int, str], ids: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        keys = [encode_id(name) for name in ids]
        most = max(size for size in _SIZES if size <= self._variables)
        for first in range(0, len(keys), most):
            part = keys[first : first + most]
            size = next(size for size in _SIZES if size >= len(part))
            part += part[-1:] * (size - len(part))
            try:
                yield from self._connection.execute(statements[size], part).fetchall()
            except sqlite3.Error as error:
                raise self._failed("read", error) from error

    def remove(self, rows: Sequence[tuple[int, int]]) -> None:
        """Remove rows, given as ``(seq, cost)``."""
        try:
            with _Transaction(self._connection):
                for part in _parts(rows, self._variables):
                    self._connection.execute(_DELETE[len(part)], [seq for seq, _ in part])
        except sqlite3.Error as error:
            raise self._failed("removed", error) from error
        self.count -= len(rows)
        self.bytes -= sum(cost for _, cost in rows)

    def take_before(self, time: float) -> Iterator[str]:
        """Remove what is older than a time, seconds, and yield the ids, oldest first."""
        yield from self._take("WHERE time < ? ORDER BY time, seq", time, self.bytes)

    def take_oldest(self, size: int) -> Iterator[str]:
        """Remove what came first until at least ``size`` bytes are free, and yield the ids."""
        yield from self._take("WHERE seq > ? ORDER BY seq", 0, size)

    def take_partition(self, number: int) -> Iterator[str]:
        """Remove what came from a partition, and yield the ids, oldest first. Reads the whole file."""
        yield from self._take("WHERE part = ? ORDER BY seq", number, self.bytes)

    def _take(self, where: str, value: float, size: int) -> Iterator[str]:
        select = f"SELECT seq, cost, id FROM waiting {where} LIMIT 512"  # noqa: S608 - two constants
        while size > 0:
            try:
                rows = self._connection.execute(select, (value,)).fetchall()
            except sqlite3.Error as error:
                raise self._failed("read", error) from error
            gone: list[tuple[int, int, bytes]] = []
            while len(gone) < len(rows) and size > 0:
                gone.append(rows[len(gone)])
                size -= gone[-1][1]
            if not gone:
                return
            self.remove([(seq, cost) for seq, cost, _ in gone])
            yield from (key.decode("utf-8", "surrogatepass") for _, _, key in gone)

    def reader(self) -> SpillReader:
        """Return a view of what waits here now, which later changes do not touch."""
        try:
            return SpillReader(self.path)
        except sqlite3.Error as error:
            raise self._failed("read", error) from error

    def clear(self) -> None:
        """Forget every row."""
        self._connection.execute("DELETE FROM waiting")
        self.count = self.bytes = 0

    def close(self) -> None:
        """Close and remove the file."""
        self._connection.close()
        self._unlink()


class SpillReader:
    """All rows as they were when this was made; may be read on another thread, once, and must be closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # A deferred transaction sees the database as of its first read, so that read must happen here.
        self._connection.execute("BEGIN")
        self._connection.execute("SELECT seq FROM waiting LIMIT 1").fetchone()

    def entries(self) -> Iterator[bytes]:
        """Yield the packed events, oldest first."""
        try:
            for (entry,) in self._connection.execute("SELECT entry FROM waiting ORDER BY seq"):
                yield entry
        except sqlite3.Error as error:
            raise JoinError(
                f"waiting joins cannot be read in {self._path}: {error}; check the disk it is on"
            ) from error

    def close(self) -> None:
        """Let the pages that only this view needs be used again."""
        self._connection.close()


class _Transaction:
    """All or none of what is executed inside."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            # A full disk makes SQLite roll back by itself at times; a second rollback would hide the reason.
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
