"""One daemon whose model's thread also runs the bare model, batch for batch: a ratio that a busy machine hardly moves.

    python -m benchmarks.interleaved POLICY

After every batch that the daemon answers, ``model(x)`` runs over the same inputs in inference mode, on the same thread,
and the processor's time of that is counted apart. What else the process takes, reading, answering, joining, writing,
is the daemon's. Prints seconds of the processor: ``bare`` and ``daemon``, from the first batch to the last.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.core import Core
from engine.coretypes import Answers
from engine.launch import run_policy
from engine.logs import configure_logs
from engine.policyfile import load
from streams.codec import Event


class Meter:
    """Wraps `Core.answer`; the clock starts with the second batch, when everything is warm."""

    def __init__(self) -> None:
        self.bare = 0.0
        self.apart = 0.0
        self.events = 0
        self.started = self.ended = 0.0
        self._answer = Core.answer

    def answer(self, core: Core, events: Sequence[Event]) -> Answers:
        """Answer as the daemon does, then answer again without it."""
        answers = self._answer(core, events)
        entered = time.thread_time()
        inputs = core.host.inputs.stack([event.inputs for event in events], core.host.device)
        began = time.thread_time()
        plain(core, inputs)
        ended = time.thread_time()
        if self.started:
            self.bare += ended - began
            self.apart += ended - entered
            self.events += len(events)
        else:
            self.started = time.process_time()
        self.ended = time.process_time()
        return answers


def plain(core: Core, inputs: Tensor) -> None:
    with torch.inference_mode():
        core.host.source(inputs)


def main() -> None:
    loaded = load(sys.argv[1], [], os.environ)
    configure_logs(loaded.policy.log)
    meter = Meter()

    def answer(core: Core, events: Sequence[Event]) -> Answers:
        return meter.answer(core, events)

    Core.answer = answer  # type: ignore[method-assign, assignment]
    run_policy(loaded)
    daemon = meter.ended - meter.started - meter.apart
    json.dump({"events": meter.events, "bare": meter.bare, "daemon": daemon}, sys.stdout)


if __name__ == "__main__":
    main()
