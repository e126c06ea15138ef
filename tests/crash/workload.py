"""What the sweep runs: a few hundred small events with everything that a policy can do, and some that are wrong.

Written in plain JSON, so that nothing of the engine says what the verifier then expects.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

POLICY = """\
version: 1
state: ./state
model: {factory: "./model.py:build", threads: 1, inputs: {shape: [4], dtype: float32}}
streams:
  data: {file: ./events.jsonl}
  feedback: {file: ./feedback.jsonl}
  predictions: {file: ./predictions.jsonl}
  dead_letters: {file: ./dead-letters.jsonl}
batching: {max_size: 8, max_delay: 5ms}
join: {window: 1h, max_bytes: 32kB, max_disk_bytes: 100MB}
adaptation: {method: bn, mode: ema, momentum: 0.1}
reweighting: [{method: age, half_life: 5m}]
learning: {batch_size: 16, max_delay: 5s, lr: 0.05}
safeguards: [{method: finite}, {method: replay, capacity: 100, batch: 16}]
interpolation: {method: linear}
gate: {method: flips, budget: 0.05}
audit: {share: 0.2, window: 100}
release: {every: 60}
checkpoint: {every: 20ms}
metrics: {port: 0}
log: {format: json}
"""

ROTTA = POLICY.replace("{method: bn, mode: ema, momentum: 0.1}", "{method: rotta, layers: [batch], nu: 0.01}").replace(
    "{method: finite}", "{method: collapse}, {method: finite}, {method: ewc}"
)
"""Methods with more state: a memory bank, a moving average of the model, a Fisher matrix."""

KAFKA = (
    POLICY.replace(
        """\
  data: {file: ./events.jsonl}
  feedback: {file: ./feedback.jsonl}
  predictions: {file: ./predictions.jsonl}
  dead_letters: {file: ./dead-letters.jsonl}
""",
        """\
  kafka: {bootstrap_servers: "127.0.0.1:9092", group: sweep}
  data: {kafka: events}
  feedback: {kafka: feedback}
  predictions: {kafka: predictions}
  dead_letters: {kafka: dead-letters}
""",
    )
    .replace("every: 20ms", "every: 100ms")
    .replace("32kB", "64MB")
)

MODEL = """\
from torch import nn


def build():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
"""


@dataclass(frozen=True)
class Workload:
    """Lines of both streams.

    Attributes:
        events: Events, every 97th line no JSON at all.
        feedback: Labels, late, a few of them twice, a few for events that there are not, a few undecodable.
    """

    events: list[bytes]
    feedback: list[bytes]


def make(count: int, seed: int = 0) -> Workload:
    """Events one second apart; most get their label some seconds later."""
    rng = random.Random(seed)
    events, feedback = [], []
    for n in range(count):
        if n % 97 == 96:
            events.append(b"event %d is damaged {" % n)
        x = [round(rng.gauss(n / count, 1.0), 4) for _ in range(4)]
        events.append(json.dumps({"id": f"e{n}", "inputs": x, "time": 1e9 + n}).encode())
        if rng.random() < 0.7:
            label = max(range(3), key=lambda k: x[k])
            told = {"id": f"e{n}", "label": label, "time": 1e9 + n + rng.uniform(0.1, 60.0)}
            feedback.append(told)
            if n % 31 == 0:
                feedback.append({**told, "time": float(str(told["time"])) + 1.0})
        if n % 53 == 0:
            feedback.append({"id": f"nobody{n}", "label": 0, "time": 1e9 + n})
    feedback.sort(key=lambda told: float(str(told["time"])))
    lines = [json.dumps(told).encode() for told in feedback]
    lines.insert(len(lines) // 2, b'{"id": "half a rec')
    return Workload(events, lines)


def write(directory: Path, workload: Workload, policy: str = POLICY) -> None:
    """Write policy, model and streams into a folder."""
    (directory / "policy.yaml").write_text(policy)
    (directory / "model.py").write_text(MODEL)
    (directory / "events.jsonl").write_bytes(b"".join(line + b"\n" for line in workload.events))
    (directory / "feedback.jsonl").write_bytes(b"".join(line + b"\n" for line in workload.feedback))


def write_kafka(directory: Path) -> None:
    """Write the policy and the model of a sweep over Kafka into a folder."""
    (directory / "policy.yaml").write_text(KAFKA)
    (directory / "model.py").write_text(MODEL)
