"""What `adaptd init` writes: a policy that runs as it stands, its model, and a small stream to try both on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final

from engine.errors import StorageError, UsageError

EVENTS: Final = 512
CLASSES: Final = 3
FEATURES: Final = 4
START: Final = 1_700_000_000.0
"""Time of the first event, in seconds since the epoch; events are a second apart."""

LABEL_EVERY: Final = 2
LABEL_DELAY: Final = 30.0


def init(directory: Path) -> list[Path]:
    """Write ``policy.yaml``, ``model.py`` and a sample stream.

    Returns:
        The files written.

    Raises:
        UsageError: One of the files exists; nothing is written then.
        StorageError: The directory cannot be written.
    """
    contents = {
        "policy.yaml": _template("policy.yaml"),
        "model.py": _template("model.py"),
        "events.jsonl": "".join(_lines(feedback=False)),
        "feedback.jsonl": "".join(_lines(feedback=True)),
    }
    there = [name for name in contents if (directory / name).exists()]
    if there:
        raise UsageError(f"{directory / there[0]} exists and is left as it is; choose another directory")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            with (directory / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise StorageError(f"{directory} cannot be written: {error.strerror}") from error
    return [directory / name for name in contents]


def _template(name: str) -> str:
    return files("engine.templates").joinpath(f"{name}.tmpl").read_text(encoding="utf-8")


def _lines(*, feedback: bool) -> Iterator[str]:
    """The sample stream: three classes around three corners, all of them drifting; or its late labels."""
    draw = random.Random(0)  # noqa: S311 - a sample, not a secret
    for number in range(EVENTS):
        label = draw.randrange(CLASSES)
        drift = number / EVENTS
        inputs = [round(draw.gauss(2.0 * (place == label) + drift, 0.5), 4) for place in range(FEATURES)]
        time = START + number
        if not feedback:
            yield json.dumps({"id": f"event-{number}", "inputs": inputs, "time": time}) + "\n"
        elif number % LABEL_EVERY == 0:
            yield json.dumps({"id": f"event-{number}", "label": label, "time": time + LABEL_DELAY}) + "\n"
