from __future__ import annotations

import enum
import io
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoint import BadCheckpointError, StateError, flatten, read_tensors, snapshot, unflatten, write_tensors
from engine.checkpoint.strict import dumps, loads

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.bool,
    torch.int64,
    torch.uint8,
    torch.uint16,
]


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    tensors, tree = flatten(state)
    file = io.BytesIO()
    write_tensors(file, tensors)
    return unflatten(read_tensors(file), loads(dumps(tree)))


def same(one: Any, two: Any) -> bool:
    """Equal bit for bit, types and key order included; tuples count as lists."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and one.shape == two.shape and bits(one) == bits(two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, float):
        return isinstance(two, float) and struct.pack(">d", one) == struct.pack(">d", two)
    return type(one) is type(two) and one == two


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


SCALARS = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text()
KEYS = st.text(max_size=4) | st.sampled_from(
    ["$", "$tensor", "$float", "$$tensor", "__metadata__", "a/b", "~", "\ud800"]
)
VALUES = st.recursive(
    SCALARS | tensors(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_state_comes_back_bit_for_bit(state: dict[str, Any]) -> None:
    assert same(state, through_disk(state))


def test_an_optimizer_and_random_states_come_back_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    state = {
        "random": list(random.Random(1).getstate()[1]),
        "torch": generator.get_state(),
        "numpy": torch.from_numpy(np.random.default_rng(1).integers(0, 9, 5)),
        "limits": (float("inf"), -math.inf, math.nan, -0.0, 5e-324, 0.1),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "every other": torch.arange(12).reshape(3, 4)[:, ::2].t(),
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    back = through_disk(state)
    expected = {**state, "parameter": torch.ones(2)}
    assert same(expected, back)
    assert not back["parameter"].requires_grad


def test_the_copy_shares_no_memory_with_the_state_and_tied_tensors_part() -> None:
    weight = torch.zeros(3)
    tensors, _ = flatten({"a": weight, "b": weight})
    weight += 1
    tensors["a"] += 5
    assert tensors["b"].tolist() == [0, 0, 0]


def test_a_flat_state_keeps_its_keys_as_tensor_names_for_other_programs() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    tensors, _ = flatten(model.state_dict())
    assert list(tensors) == list(model.state_dict())
    file = io.BytesIO()
    write_tensors(file, tensors)
    read = safetensors.torch.load(file.getvalue())
    model.load_state_dict(read)
    assert read.keys() == tensors.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_safetensors_library_reads_what_is_written_and_the_other_way_round(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "odd": torch.arange(35).to(dtype).reshape(5, 7),
        "byte": torch.ones(3, dtype=torch.uint8),
        "ü": torch.ones(1),
    }
    with (tmp_path / "ours").open("wb") as file:
        write_tensors(file, tensors)
    theirs = safetensors.torch.load_file(tmp_path / "ours")
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with (tmp_path / "theirs").open("rb") as file:
        ours = read_tensors(file)
    for read in (theirs, ours):
        assert same({name: tensors[name] for name in sorted(tensors)}, {name: read[name] for name in sorted(read)})


def test_equal_tensors_give_equal_bytes_whatever_their_order() -> None:
    one, two = io.BytesIO(), io.BytesIO()
    tensors = {"b": torch.ones(2), "a": torch.zeros(1, dtype=torch.int64)}
    write_tensors(one, tensors)
    write_tensors(two, dict(reversed(tensors.items())))
    assert one.getvalue() == two.getvalue()


class Colour(enum.IntEnum):
    RED = 3


class Word(enum.StrEnum):
    YES = "yes"


def test_subclasses_of_scalars_become_what_they_stand_for() -> None:
    back = through_disk({"a": Colour.RED, "b": Word.YES, "c": np.float64(0.1), Word.YES: True})
    assert same(back, {"a": 3, "b": "yes", "c": 0.1, "yes": True})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state": {0: 1}}, r"state: key 0 is not a string"),
        ({0: 1}, r"the state: key 0 is not a string"),
        ({"a": {"b": {1, 2}}}, r"a/b: a checkpoint cannot keep a set"),
        ({"a": [b"x"]}, r"a/0: a checkpoint cannot keep a bytes"),
        ({"a": np.float32(1)}, r"a: a checkpoint cannot keep a float32"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, r"a: .*complex64"),
        ({"a": torch.ones(2, 2).to_sparse()}, r"a: .*dense"),
        ({"a": torch.ones(2, device="meta")}, r"a: .*meta"),
        ([1], r"a state is a dict, not list"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_place(state: Any, message: str) -> None:
    with pytest.raises(StateError, match=message):
        flatten(state)


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(StateError, match="nested more than 64 levels"):
        flatten(state)


def test_a_snapshot_names_the_state_that_cannot_be_kept() -> None:
    with pytest.raises(StateError, match="state 'optimizer': a: a checkpoint cannot keep a set"):
        snapshot({"model": {}, "optimizer": {"a": set()}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"$tensor": "other"}}, "other"),
        ({}, "'x' belongs nowhere"),
        ({"a": {"$tensor": "x"}, "b": {"$tensor": "x"}}, "x"),
        ({"a": {"$tensor": "x"}, "b": {"$float": "12"}}, "8 bytes"),
        ({"a": {"$tensor": "x"}, "b": {"$float": 1.0}}, "fromhex"),
        ({"a": {"$tensor": ["x"]}}, "unhashable|list"),
        ({"a": {"$tensor": "x"}, "b": {"$new": 1}}, "unknown mark '\\$new'"),
        ([{"$tensor": "x"}], "not a dict"),
    ],
)
def test_a_json_value_that_does_not_fit_its_tensors_is_refused(tree: Any, message: str) -> None:
    with pytest.raises(BadCheckpointError, match=message):
        unflatten({"x": torch.ones(1)}, tree)


def test_a_json_value_nested_without_end_is_refused() -> None:
    tree: Any = 1
    for _ in range(100):
        tree = [tree]
    with pytest.raises(BadCheckpointError, match="64 levels"):
        unflatten({}, {"a": tree})


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> io.BytesIO:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return io.BytesIO((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "file",
    [
        io.BytesIO(b""),
        io.BytesIO(b"1234567"),
        safetensors_file({}, length=100 << 30),
        safetensors_file({}, length=1 << 63),
        safetensors_file(b"not json"),
        safetensors_file(b"[" * 100_000),
        safetensors_file([]),
        safetensors_file({"a": 1}),
        safetensors_file({"a": {}}),
        safetensors_file(b'{"a":1,"a":2}'),
        safetensors_file({"a": entry("PICKLE")}, bytes(4)),
        safetensors_file({"a": entry()}, bytes(3)),
        safetensors_file({"a": entry()}, bytes(5)),
        safetensors_file({"a": entry(shape=[2])}, bytes(4)),
        safetensors_file({"a": entry(shape=[1 << 40], offsets=[0, 1 << 42])}),
        safetensors_file({"a": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])}),
        safetensors_file({"a": entry(shape=[-1], offsets=[0, -4])}),
        safetensors_file({"a": entry(shape=[1.0])}, bytes(4)),
        safetensors_file({"a": entry(shape=[True])}, bytes(4)),
        safetensors_file({"a": entry(shape="1")}, bytes(4)),
        safetensors_file({"a": entry(offsets=[4, 8])}, bytes(8)),
        safetensors_file({"a": entry(), "b": entry()}, bytes(4)),
        safetensors_file({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
        safetensors_file({"a": entry(offsets=[0, 4, 8])}, bytes(4)),
    ],
    ids=range(24),
)
def test_a_malformed_tensor_file_is_refused_before_anything_is_allocated(file: io.BytesIO) -> None:
    with pytest.raises(BadCheckpointError, match="tensors: "):
        read_tensors(file)


def test_a_tensor_file_cut_anywhere_is_refused() -> None:
    file = io.BytesIO()
    write_tensors(file, {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bool)})
    for length in range(len(file.getvalue())):
        with pytest.raises(BadCheckpointError, match="tensors: "):
            read_tensors(io.BytesIO(file.getvalue()[:length]))


@pytest.mark.parametrize(
    "raw",
    [b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b'{"a":1,"a":1}', b"\xff", b"[" * 100_000, b"", b"1 2", b"{'a':1}"],
)
def test_json_that_is_not_strict_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        loads(raw)


@pytest.mark.parametrize("value", [math.nan, [math.inf]])
def test_json_is_never_written_with_numbers_that_json_does_not_have(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_survives_json_in_every_bit(value: float) -> None:
    assert struct.pack(">d", loads(dumps(value))) == struct.pack(">d", value)
