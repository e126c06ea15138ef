"""Backtest: a recorded stream through the same core as fast as it goes.

Labels come ``label_delay`` events after their event, for a share of the events chosen by a hash of their id. Nothing
else of the labels, and nothing of the domains, ever reaches a method.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from engine.audit import held_out
from engine.build import spec_of
from engine.core import Core
from engine.errors import UsageError
from engine.launch import core_of
from engine.policyfile import LoadedPolicy
from policies.interfaces import StepKind
from streams.base import Record
from streams.codec import Event, Feedback
from streams.npz import Recorded, recorded

log = structlog.get_logger("adaptd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a backtest is run.

    Attributes:
        batch_size: Rows of a batch.
        label_delay: Events between an event and its label.
        feedback_share: Share of events whose label ever comes, in [0, 1].
        seed: Seed of that choice.
    """

    batch_size: int
    label_delay: int = 0
    feedback_share: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class Result:
    """What a backtest gives.

    Attributes:
        predicted: ``(N,)`` int64 classes that were answered.
        source: ``(N,)`` int64 classes that the source model gives.
        seconds: Seconds that the core took.
        plain_seconds: Seconds that the bare source model took over the same batches, in the same run, in turn.
    """

    predicted: NDArray[np.int64]
    source: NDArray[np.int64]
    seconds: float
    plain_seconds: float


def run(core: Core, data: Recorded, options: Options, progress: Callable[[int], None] = lambda done: None) -> Result:
    """Drive ``core`` over ``data``; batches of the source model alone are timed in between."""
    total = len(data)
    predicted = np.empty(total, dtype=np.int64)
    source = np.empty(total, dtype=np.int64)
    due: deque[tuple[int, Feedback]] = deque()
    seconds = plain = 0.0
    for start in range(0, total, options.batch_size):
        rows = range(start, min(start + options.batch_size, total))
        events = [_event(data, row) for row in rows]
        clock = time.perf_counter()
        predicted[rows.start : rows.stop] = core.answer(events).labels
        core.follow()
        if data.y is not None:
            due.extend(_labels(data, rows, options))
            ready = [due.popleft()[1] for _ in range(_count_due(due, rows.stop))]
            if ready:
                core.feedback(ready)
        done = time.perf_counter()
        source[rows.start : rows.stop] = _plain(core, events)
        seconds, plain = seconds + done - clock, plain + time.perf_counter() - done
        progress(rows.stop)
    clock = time.perf_counter()
    core.finish()
    return Result(predicted, source, seconds + time.perf_counter() - clock, plain)


def _event(data: Recorded, row: int) -> Event:
    inputs = np.ascontiguousarray(data.x[row]).tobytes()
    moment = float(data.t[row])
    group = data.group[row] if data.group is not None else None
    return Event(data.ids[row], inputs, moment, group, Record("data", 0, row, row + 1, moment, None, b""))


def _labels(data: Recorded, rows: range, options: Options) -> list[tuple[int, Feedback]]:
    """Labels of these rows that ever come, each with the number of events after which it does."""
    assert data.y is not None
    found = []
    for row in rows:
        if data.y[row] >= 0 and held_out(data.ids[row], options.feedback_share, salt=f"feedback{options.seed}"):
            due = row + options.label_delay
            moment = max(float(data.t[min(due, len(data) - 1)]), float(data.t[row]))
            record = Record("feedback", 0, row, row + 1, moment, None, b"")
            found.append((due, Feedback(data.ids[row], int(data.y[row]), None, moment, None, record)))
    return found


def _count_due(due: deque[tuple[int, Feedback]], seen: int) -> int:
    """How many labels, in order, are due once ``seen`` events have been answered."""
    count = 0
    for when, _ in due:
        if when >= seen:
            break
        count += 1
    return count


def _plain(core: Core, events: list[Event]) -> NDArray[np.int64]:
    """Classes of the source model, by a bare forward."""
    host = core.host
    inputs = host.inputs.stack([event.inputs for event in events], host.device)
    with torch.inference_mode():
        classes: NDArray[np.int64] = host.source(inputs).argmax(1).cpu().numpy()
    return classes


def report(core: Core, data: Recorded, result: Result) -> dict[str, Any]:
    """The figures of a backtest as JSON values."""
    events = len(result.predicted)
    counts = core.counts
    out: dict[str, Any] = {
        "events": events,
        "events_per_second": events / result.seconds,
        "plain_events_per_second": events / result.plain_seconds,
        "relative_speed": result.plain_seconds / result.seconds,
        "updates": sum(counts[f"updates.{kind}"] for kind in StepKind),
        "updates_by_kind": {str(kind): counts[f"updates.{kind}"] for kind in StepKind},
        "skipped": {
            name.removeprefix("skipped."): n for name, n in sorted(counts.items()) if name.startswith("skipped.")
        },
        "resets": counts["resets"],
        "rollbacks": counts["rollbacks"],
        "frozen": core.freeze.on,
        "frozen_labels": counts["frozen_labels"],
        "labels": counts["labels"],
        "release": {"number": core.release, "alpha": core.alpha, "accuracy": core.audit.accuracies()},
        "decisions": {n.removeprefix("decisions."): c for n, c in sorted(counts.items()) if n.startswith("decisions.")},
        "agreement_with_source": float((result.predicted == result.source).mean()),
    }
    out |= {"accuracy": None, "source_accuracy": None, "accuracy_by_domain": {}}
    if data.y is not None and (known := _usable(core, data)).any():
        right, was = result.predicted == data.y, result.source == data.y
        out |= {
            "labelled": int(known.sum()),
            "unusable_labels": int((data.y >= 0).sum() - known.sum()),
            "accuracy": float(right[known].mean()),
            "source_accuracy": float(was[known].mean()),
            "negative_flip_rate": float((was & ~right)[known].mean()),
            "positive_flip_rate": float((~was & right)[known].mean()),
            "accuracy_by_domain": _by(_domains(data), right, known),
            "source_accuracy_by_domain": _by(_domains(data), was, known),
            "accuracy_by_group": _by(data.group, right, known),
            "source_accuracy_by_group": _by(data.group, was, known),
        }
    return out


def _usable(core: Core, data: Recorded) -> NDArray[np.bool_]:
    """Which rows have a label that is a class of the model."""
    assert data.y is not None
    usable: NDArray[np.bool_] = (data.y >= 0) & (data.y < core.host.num_classes)
    return usable


def _domains(data: Recorded) -> list[str] | None:
    if data.domain is None:
        return None
    return [data.domains[number] if data.domains else str(number) for number in data.domain.tolist()]


def _by(names: Sequence[str | None] | None, right: NDArray[np.bool_], known: NDArray[np.bool_]) -> dict[str, float]:
    """Mean of ``right`` over rows whose label is ``known``, by name, in order of appearance."""
    found: dict[str, list[bool]] = {}
    rows = zip(names or (), right.tolist(), known.tolist(), strict=False)
    for name, one, usable in rows:
        if usable and name is not None:
            found.setdefault(name, []).append(one)
    return {name: sum(each) / len(each) for name, each in found.items()}


def command(loaded: LoadedPolicy, path: Path, *, label_delay: int, feedback_share: float, seed: int) -> dict[str, Any]:
    """Run a policy over a recorded stream and report.

    Raises:
        PolicyFileError: The policy does not fit the stream.
        UsageError: Its labels are no classes of the model.
        StreamError: The stream cannot be read.
    """
    core = core_of(loaded, background=False, directory=None)
    data = recorded(path, spec_of(loaded.policy))
    _check_labels(core, data, path)
    options = Options(
        batch_size=loaded.policy.batching.max_size,
        label_delay=label_delay,
        feedback_share=feedback_share,
        seed=seed,
    )
    head = {"data": path.name, "policy": loaded.source, "policy_digest": loaded.digest, "seed": loaded.policy.seed}
    choice = {"feedback_seed": seed, "label_delay": label_delay, "feedback_share": feedback_share}
    result = run(core, data, options)
    if core.freeze.on:
        log.warning(
            "frozen", rollbacks=core.freeze.rollbacks, answers="release", labels_since=core.counts["frozen_labels"]
        )
    return head | choice | report(core, data, result)


def _check_labels(core: Core, data: Recorded, path: Path) -> None:
    """Refuse labels none of which is a class of the model, since an accuracy of 0 would say nothing; tell of too few.

    Raises:
        UsageError: There are labels, and none can be used.
    """
    if data.y is None or not (data.y >= 0).any():
        how = 'add an array "y" to an .npz, or "label" to the lines of a .jsonl'
        log.warning(
            "no_labels", text=f"{path} has no labels, so nothing is learned from any and no accuracy told; {how}"
        )
        return
    given, usable = int((data.y >= 0).sum()), int(_usable(core, data).sum())
    text = f"{path}: {given - usable} of {given} labels are no class of the model, which has {core.host.num_classes}"
    if not usable:
        raise UsageError(
            f"{text} (0 to {core.host.num_classes - 1}); number the classes of the stream as the model does"
        )
    if usable < given:
        log.warning("unusable_labels", text=f"{text}; they count for nothing")
