"""Tensors as safetensors, streamed: never a second copy of a whole file in memory.

The format: eight bytes little-endian length of the header, the header (a JSON object: name to dtype, shape and range
of bytes), then the bytes of all tensors without gaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.errors import BadCheckpointError, StateError
from engine.checkpoint.strict import dumps, loads

HEADER_LIMIT = 100_000_000
"""Bytes of the largest header; the safetensors library has the same limit."""

_ALIGNMENT = 8
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` of any strided layout and device. Equal tensors give equal bytes.

    Raises:
        StateError: A dtype or layout has no place in the format, or the header would be too long.
        OSError: From ``file``.
    """
    # The widest elements come first, so that every tensor starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict[str, Any]] = {}
    begin = 0
    for name in order:
        tensor = tensors[name]
        check_tensor(tensor, name)
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    raw = dumps(header).rstrip(b"\n")
    raw += b" " * (-len(raw) % _ALIGNMENT)
    if len(raw) > HEADER_LIMIT:
        raise StateError(f"{len(order)} tensors are too many for one file; stack them into fewer")
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name in order:
        file.write(_bytes_of(tensors[name].detach().cpu().contiguous()))


def check_tensor(tensor: Tensor, name: str) -> None:
    """Refuse what the format cannot hold.

    Raises:
        StateError: The dtype or the layout is not among those of the format.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise StateError(f"{name}: a checkpoint keeps dense tensors only, this one is {tensor.layout}")
    if tensor.device.type == "meta":
        raise StateError(f"{name}: a tensor on the meta device has no values to keep")
    if tensor.dtype not in _NAMES or name == _METADATA:
        raise StateError(f"{name}: a checkpoint cannot keep this name or {tensor.dtype}")


def read_tensors(file: BinaryIO) -> dict[str, Tensor]:
    """Read all tensors into memory of their own, on the CPU. Nothing is allocated before all sizes agree.

    Raises:
        BadCheckpointError: The bytes are not one complete safetensors file.
        OSError: From ``file``.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(HEADER_LIMIT, size - 8):
        raise BadCheckpointError("tensors: the header is longer than allowed or than the file")
    try:
        entries = _entries(loads(file.read(length)), size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadCheckpointError(f"tensors: the header is malformed: {error}") from error
    return {entry.name: _read(file, entry) for entry in entries}


def _entries(header: Any, size: int) -> list[_Entry]:
    entries = sorted(_entry(name, value) for name, value in header.items() if name != _METADATA)
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise ValueError(f"{entry.name} does not begin where the tensor before it ends")
        position = entry.end
    if position != size:
        raise ValueError(f"it describes {position} bytes and {size} follow")
    return entries


def _entry(name: str, value: Any) -> _Entry:
    dtype, shape, (begin, end) = _DTYPES[value["dtype"]], tuple(value["shape"]), value["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has an impossible size")
    # Torch multiplies sizes before it looks for zeros, hence the second bound.
    if math.prod(shape) * dtype.itemsize != end - begin or math.prod(max(n, 1) for n in shape) >= 1 << 62:
        raise ValueError(f"{name} has {end - begin} bytes, which does not fit its shape")
    return _Entry(begin, end, name, dtype, shape)


def _read(file: BinaryIO, entry: _Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    rest = _bytes_of(tensor)
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise BadCheckpointError(f"tensors: the file ends inside {entry.name}")
        rest = rest[count:]
    return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
