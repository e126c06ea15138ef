"""Recorded streams: arrays in ``.npz``, or lines of JSON with their labels, for backtests and as a source of events.

An ``.npz`` holds ``x`` (N, ...) and may hold ``y`` (N,) class indices, ``t`` (N,) seconds, ``group`` (N,) tenants,
``domain`` (N,) names or, with ``domains`` the list of names, indices of it. Without ``t`` the row number counts as
seconds.
A line of recorded ``.jsonl`` is ``{"id", "inputs", "time", "label"?, "group"?, "domain"?}``.

Arrays are never unpickled. Where an array is stored uncompressed (`numpy.savez`) it is mapped, not read.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy

from streams.base import Partition, Record, StreamError
from streams.codec_binary import encode_events
from streams.codec_json import decode_event, parse, read_label
from streams.codec_types import LATEST_TIME, BadRecord, InputSpec, check_id
from streams.framing import Origin, split_lines

Array = np.ndarray[Any, Any]

_ROWS: Final = 256
"""Rows encoded at a time."""

_MAP_BYTES: Final = 1024 * 1024
"""Smaller arrays are read: a map costs more than it saves."""

_LOCAL_HEADER: Final = struct.Struct("<26xHH")


@dataclass(frozen=True, eq=False)
class Recorded:
    """A stream with its labels, in order.

    Attributes:
        x: ``(N, ...)`` inputs as records hold them; possibly mapped from the file.
        t: ``(N,)`` float64 seconds, in the order of the file.
        ids: One for each row.
        y: ``(N,)`` int64 class indices, -1 where a row has none; None without labels.
        group: Tenants, which methods may see; None without.
        domain: ``(N,)`` index into ``domains``, for reports alone; None without.
        domains: Names of domains, in the order of their first row unless the file orders them.
    """

    x: Array
    t: Array
    ids: Sequence[str]
    y: Array | None = None
    group: Sequence[str | None] | None = None
    domain: Array | None = None
    domains: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    @property
    def spec(self) -> InputSpec:
        """Inputs of one row."""
        return InputSpec(self.x.shape[1:], self.x.dtype)


def recorded(path: Path, spec: InputSpec | None = None) -> Recorded:
    """Open a recorded stream.

    Args:
        path: An ``.npz`` or ``.jsonl`` file.
        spec: What inputs must be; needed for ``.jsonl``, whose numbers do not tell their dtype.

    Raises:
        StreamError: The file cannot be read, or is not such a stream; the message says what is missing or differs.
    """
    try:
        if path.suffix == ".npz":
            return _from_arrays(path, _arrays(path), spec)
        if path.suffix == ".jsonl" and spec is not None:
            return _from_lines(path, spec)
    except OSError as error:
        raise StreamError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix == ".jsonl":
        raise StreamError(f"{path}: shape and dtype of inputs must be given to read a recorded .jsonl")
    raise StreamError(f"{path}: a recorded stream must be .npz or .jsonl")


def _arrays(path: Path) -> dict[str, Array]:
    """Arrays of the file by name, mapped where they are stored as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _array(path, archive, info) for info in archive.infolist()}
    except (zipfile.BadZipFile, zlib.error, LookupError, ValueError, EOFError, RuntimeError) as error:
        raise StreamError(f"{path} is not an .npz file of plain arrays: {error}") from error


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    with archive.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < _MAP_BYTES:
            return np.asarray(npy.read_array(member, allow_pickle=False))
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(member)]
        shape, fortran, dtype = read(member)
        if dtype.hasobject:
            raise ValueError("object arrays are refused")
        header = member.tell()
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    offset = info.header_offset + _LOCAL_HEADER.size + name + extra + header
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _from_arrays(path: Path, arrays: dict[str, Array], spec: InputSpec | None) -> Recorded:
    if "x" not in arrays:
        raise StreamError(f"{path} has no array x of inputs; it has {', '.join(sorted(arrays)) or 'none at all'}")
    x = arrays["x"]
    rows = len(x) if x.ndim else 0
    for name in ("y", "t", "group", "domain"):
        if name in arrays and arrays[name].shape != (rows,):
            raise StreamError(f"{path}: {name} has shape {arrays[name].shape}, {rows} rows of x need ({rows},)")
    _check_inputs(path, x, spec)
    domain, domains = _domains(path, arrays.get("domain"), arrays.get("domains"))
    return Recorded(
        x=x,
        t=_times(path, arrays.get("t"), rows),
        ids=[str(row) for row in range(rows)],
        y=_labels(path, arrays.get("y")),
        group=_groups(path, arrays.get("group")),
        domain=domain,
        domains=domains,
    )


def _check_inputs(path: Path, x: Array, spec: InputSpec | None) -> None:
    if not len(x.shape) or not x.shape[0]:
        raise StreamError(f"{path}: x has no rows")
    try:
        found = InputSpec(x.shape[1:], x.dtype)
    except ValueError as error:
        raise StreamError(f"{path}: x does not do: {error}") from error
    if spec is not None and (found.shape, found.dtype.name) != (spec.shape, spec.dtype.name):
        raise StreamError(
            f"{path}: rows of x are {found.dtype.name} {list(found.shape)}, "
            f"the inputs were declared {spec.dtype.name} {list(spec.shape)}"
        )


def _times(path: Path, t: Array | None, rows: int) -> Array:
    if t is None:
        return np.arange(rows, dtype=np.float64)
    if t.dtype.kind not in "iuf" or not np.isfinite(t).all():
        raise StreamError(f"{path}: t must be finite numbers of seconds")
    times: Array = t.astype(np.float64)
    wrong = np.flatnonzero((times < 0) | (times >= LATEST_TIME))
    if len(wrong):
        found = f"time {times[wrong[0]]:.6g} in row {wrong[0]} of t"
        raise StreamError(f"{path}: {found} must be in seconds since 1970, and before the year 2100")
    return times


def _labels(path: Path, y: Array | None) -> Array | None:
    if y is None:
        return None
    if y.dtype.kind not in "iu":
        raise StreamError(f"{path}: y must be integers, class indices, not {y.dtype.name}")
    labels = y.astype(np.int64)
    if (labels < -1).any():
        raise StreamError(f"{path}: y must be class indices of at least 0, or -1 where a row has no label")
    return labels


def _groups(path: Path, group: Array | None) -> list[str | None] | None:
    if group is None:
        return None
    if group.dtype.kind not in "iuUS":
        raise StreamError(f"{path}: group must be text or integers, not {group.dtype.name}")
    names = group.astype(np.str_).tolist()
    try:
        for name in set(names):
            check_id(name, "group")
    except BadRecord as error:
        raise StreamError(f"{path}: {error.message}") from error
    return list(names)


def _domains(path: Path, domain: Array | None, names: Array | None) -> tuple[Array | None, tuple[str, ...]]:
    if domain is None:
        return None, ()
    if names is not None:
        if domain.dtype.kind not in "iu" or domain.min() < 0 or domain.max() >= names.size:
            raise StreamError(f"{path}: domain must be indices of the {names.size} names in domains")
        return domain.astype(np.int64), tuple(map(str, names.ravel().tolist()))
    return _number(domain.tolist())


def _number(names: Sequence[object]) -> tuple[Array, tuple[str, ...]]:
    """Number names in the order in which they first come."""
    numbers: dict[str, int] = {}
    rows = [numbers.setdefault(str(name), len(numbers)) for name in names]
    return np.array(rows, dtype=np.int64), tuple(numbers)


def _from_lines(path: Path, spec: InputSpec) -> Recorded:
    data = path.read_bytes()
    records: list[Record] = []
    split_lines(data if data.endswith(b"\n") else data + b"\n", Origin(path.name, 0, 0, 0), records)
    if not records:
        raise StreamError(f"{path} has no lines")
    events, labels, domains = [], [], []
    for record in records:
        try:
            event = decode_event(record, spec)
            fields = parse(record.value)
            label = fields.get("label")
            labels.append(-1 if label is None else read_label(label))
        except BadRecord as error:
            line = data.count(b"\n", 0, record.offset) + 1
            raise StreamError(f"{path}:{line}: {error.message}") from None
        events.append(event)
        domains.append(fields.get("domain"))
    inputs = np.frombuffer(b"".join([event.inputs for event in events]), spec.dtype.newbyteorder("<"))
    domain, names = (None, ()) if all(name is None for name in domains) else _number(domains)
    groups = [event.group for event in events]
    return Recorded(
        x=inputs.reshape(len(events), *spec.shape),
        t=np.array([event.time for event in events]),
        ids=[event.id for event in events],
        y=None if max(labels) < 0 else np.array(labels, dtype=np.int64),
        group=None if all(group is None for group in groups) else groups,
        domain=domain,
        domains=names,
    )


class NpzReader:
    """Gives the rows of a recorded ``.npz`` as data records in the binary form; an offset is a row number.

    Args:
        partition: Stream and number of the partition.
        path: The file.
    """

    bounded = True
    torn = 0

    def __init__(self, partition: Partition, path: Path) -> None:
        self.partition = partition
        self.position = 0
        self._path = path
        self._recorded: Recorded | None = None

    @property
    def ended(self) -> bool:
        """Whether every row has been taken."""
        return self._recorded is not None and self.position >= len(self._recorded)

    def open(self, position: int) -> None:
        """Begin at a row.

        Raises:
            StreamError: The file is not a recorded stream, or has fewer rows.
        """
        found = recorded(self._path)
        if position > len(found):
            raise StreamError(f"{self._path} has {len(found)} rows, reading should go on at row {position}")
        self._recorded, self.position = found, position

    def take(self, max_records: int) -> list[Record]:
        """Return the next rows."""
        data = self._recorded
        if data is None:
            return []
        start = self.position
        rows = slice(start, min(start + min(max_records, _ROWS), len(data)))
        groups = data.group[rows] if data.group is not None else None
        values = encode_events(data.ids[rows], data.x[rows], data.t[rows].tolist(), groups)
        self.position = rows.stop
        stream, number = self.partition
        return [
            Record(stream, number, row, row + 1, math.nan, None, value) for row, value in enumerate(values, start=start)
        ]

    def lag(self) -> int:
        """Rows not yet taken."""
        return 0 if self._recorded is None else len(self._recorded) - self.position

    def refresh(self) -> None:
        """Nothing is remembered of the file: a row number is enough."""

    def close(self) -> None:
        """Let go of the arrays."""
        self._recorded = None
