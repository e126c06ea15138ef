"""Policy files for tests."""

from pathlib import Path

BASE = """\
version: 1
model:
  factory: "./model.py:build"
  inputs: {shape: [4]}
"""
"""The least that is a policy: four lines, so that what a test adds begins on line 5."""

KAFKA = """\
version: 1
state: ./state
model:
  factory: "./model.py:build"
  inputs: {shape: [3, 32, 32], dtype: uint8, scale: 0.00392156862745098, layout: hwc}
streams:
  kafka: {bootstrap_servers: "127.0.0.1:9092", group: digits}
  data: {kafka: events}
  feedback: {kafka: feedback}
  predictions: {kafka: predictions}
  dead_letters: {kafka: dead-letters}
delivery: at_least_once
batching: {max_size: 64, max_delay: 20ms}
join: {window: 24h, max_bytes: 256MB}
adaptation: {method: rotta}
reweighting: [{method: age, half_life: 1h}]
safeguards: [{method: replay, capacity: 5000}]
interpolation: {method: linear}
gate: {method: flips, budget: 0.01}
metrics: {port: 9464}
"""


def write(directory: Path, text: str, name: str = "policy.yaml") -> Path:
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return file
