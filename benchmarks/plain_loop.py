"""What somebody would write without adaptd: read frames, decode, ``model(x)``, encode, write.

    python -m benchmarks.plain_loop --data DATA.rec --factory FILE.py:FUNCTION --output ANSWERS.rec ...

With ``--bare`` nothing but ``model(x)`` is in the loop: batches of float32 are made before the clock starts. Nothing is
joined, journaled, checkpointed, audited or measured. Memory is allocated as adaptd has it, unless told otherwise.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from engine.allocator import keep_freed_memory
from engine.host import Inputs
from streams.base import Record
from streams.codec import Event, InputSpec, decode_events, encode_predictions
from streams.framing import MAGIC, Origin, frame_of, split_frames

BLOCK_BYTES = 1 << 20


def build(factory: str) -> nn.Module:
    """The model that ``FILE.py:FUNCTION`` makes."""
    path, _, name = factory.rpartition(":")
    spec = importlib.util.spec_from_file_location("factory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[[], nn.Module] = getattr(module, name)
    return made().eval()


def records(path: Path) -> Iterator[list[Record]]:
    """The records of a file, a block at a time."""
    carry, at = b"", 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            buffer = carry + block
            found: list[Record] = []
            used = split_frames(buffer, Origin("data", 0, 0, at), found)
            at, carry = at + used, buffer[used:]
            yield found


def batches(path: Path, spec: InputSpec, size: int) -> Iterator[list[Event]]:
    """The events of a file in batches."""
    waiting: list[Event] = []
    for found in records(path):
        waiting += decode_events(found, spec)[0]
        whole = len(waiting) // size * size
        for start in range(0, whole, size):
            yield waiting[start : start + size]
        del waiting[:whole]
    if waiting:
        yield waiting


def serve(options: argparse.Namespace, model: nn.Module, spec: InputSpec, inputs: Inputs) -> tuple[int, float, float]:
    """The whole loop; events, seconds and seconds of the processor."""
    events = 0
    wall, spent = time.perf_counter(), time.process_time()
    with options.output.open("wb") as out, torch.inference_mode():
        out.write(MAGIC)
        for batch in batches(options.data, spec, options.batch_size):
            x = inputs.stack([event.inputs for event in batch], torch.device("cpu"))
            probabilities = model(x).softmax(1)
            messages = encode_predictions(
                [event.id for event in batch],
                probabilities.argmax(1).numpy(),
                probabilities.numpy(),
                [event.time for event in batch],
                records=[event.record for event in batch],
                release=0,
                step=0,
                form="binary",
            )
            out.write(b"".join([frame_of(message.value) for message in messages]))
            events += len(batch)
    return events, time.perf_counter() - wall, time.process_time() - spent


def bare(options: argparse.Namespace, model: nn.Module, spec: InputSpec, inputs: Inputs) -> tuple[int, float, float]:
    """``model(x)`` alone over the same batches, made beforehand."""
    made: list[Tensor] = [
        inputs.stack([event.inputs for event in batch], torch.device("cpu"))
        for batch in batches(options.data, spec, options.batch_size)
    ]
    wall, spent = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for x in made:
            model(x)
    return sum(map(len, made)), time.perf_counter() - wall, time.process_time() - spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--factory", required=True)
    parser.add_argument("--shape", type=int, nargs="+", required=True, help="of one row as the model takes it")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--hwc", action="store_true")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--default-allocator", action="store_true", help="without `engine.allocator`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.default_allocator:
        keep_freed_memory()
    inputs = Inputs(tuple(options.shape), np.dtype(options.dtype), options.scale, channels_last=options.hwc)
    model, spec = build(options.factory), InputSpec(inputs.record_shape, inputs.dtype)
    with torch.inference_mode():
        model(torch.zeros(options.batch_size, *inputs.shape))
    events, wall, spent = (bare if options.bare else serve)(options, model, spec, inputs)
    rss = psutil.Process().memory_info().rss
    json.dump({"events": events, "wall": wall, "cpu": spent, "rss": rss}, sys.stdout)


if __name__ == "__main__":
    main()
