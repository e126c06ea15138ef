"""The demonstration: prepare, run the daemon, show."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file

from engine.daemon import Daemon
from engine.demo import stream as streams
from engine.demo.model import build, train
from engine.errors import UsageError
from engine.launch import run_policy
from engine.logs import configure_logs
from engine.policy import Log
from engine.policyfile import load

POLICY = """\
# What `adaptd demo` runs: every part of a policy at work on embedded file streams.
version: 1
state: ./state
model:
  factory: "engine.demo.model:build"
  allowed_prefixes: [engine.demo]
  weights: ./model.safetensors
  threads: 1
  inputs: {shape: [1, 8, 8], dtype: uint8, scale: 0.00392156862745098}
streams:
  data: {file: ./events.jsonl}
  feedback: {file: ./feedback.jsonl}
  predictions: {file: ./predictions.jsonl}
  dead_letters: {file: ./dead-letters.jsonl}
batching: {max_size: 64}
join: {window: 60s, max_bytes: 64MB}
adaptation: {method: rotta, layers: [batch], nu: 0.01}
reweighting: [{method: age, half_life: 10s}]
learning: {optimizer: adam, lr: 0.0002, batch_size: 4}
safeguards:
  - {method: replay, capacity: 2000, batch: 64, weight: 2}
  - {method: collapse}
  - {method: finite}
interpolation: {method: linear}
gate: {method: flips, budget: 0.05}
audit: {share: 0.15, window: 300}
release: {every: 300}
checkpoint: {every: 2s, keep: 3}
metrics: {port: 0}
log: {level: warning}
"""

Classes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demonstration found.

    Attributes:
        stream: What was sent.
        frozen: ``(N,)`` classes of the model that never changes.
        adapted: ``(N,)`` classes that the daemon answered.
        step: ``(N,)`` updates applied when each was answered.
        release: ``(N,)`` release in force when each was answered.
        confidence: ``(N,)`` probability of the class answered.
        seconds: Seconds that the daemon ran.
        duplicates: Answers beyond the one for each event.
        answered: Events answered in these seconds; the others were by an earlier run.
    """

    stream: streams.Stream
    frozen: Classes
    adapted: Classes
    step: Classes
    release: Classes
    confidence: NDArray[np.float64]
    seconds: float
    duplicates: int
    answered: int

    def phases(self) -> list[dict[str, Any]]:
        """Accuracy of both by phase, in order."""
        rows = []
        for number, name in enumerate(streams.PHASES):
            inside = self.stream.domain == number
            y = self.stream.y[inside]
            frozen = float((self.frozen[inside] == y).mean())
            adapted = float((self.adapted[inside] == y).mean())
            rows.append({"phase": name, "events": int(inside.sum()), "frozen": frozen, "adapted": adapted})
        return rows

    def summary(self) -> dict[str, Any]:
        """The figures as JSON values."""
        clean = np.isin(self.stream.domain, [i for i, name in enumerate(streams.PHASES) if name == "clean"])
        right, was = self.adapted == self.stream.y, self.frozen == self.stream.y
        return {
            "events": len(right),
            "seconds": self.seconds,
            "answered_now": self.answered,
            "events_per_second": self.answered / self.seconds if self.answered else None,
            "answers_beyond_one": self.duplicates,
            "accuracy": float(right.mean()),
            "frozen_accuracy": float(was.mean()),
            "drifted": {"adapted": float(right[~clean].mean()), "frozen": float(was[~clean].mean())},
            "clean": {"adapted": float(right[clean].mean()), "frozen": float(was[clean].mean())},
            "negative_flip_rate": float((was & ~right).mean()),
            "positive_flip_rate": float((~was & right).mean()),
            "updates": int(self.step.max()),
            "releases": int(self.release.max()),
            "phases": self.phases(),
        }


def demonstrate(directory: Path, *, events: int, seed: int, as_json: bool) -> None:
    """Prepare the streams if they are not there, run the daemon to their end, and show what came of it.

    Running it again in the same directory goes on where it was ended, by whatever means.

    Raises:
        UsageError: The demo's extra is not installed, or the directory holds another demonstration.
    """
    console = Console(stderr=True, quiet=as_json)
    stream = _prepare(directory, events, seed, console)
    loaded = load(str(directory / "policy.yaml"), (), os.environ)
    configure_logs(Log(level="warning"))
    started = time.monotonic()
    with _bar(console, events) as progress:
        before: list[int] = []
        daemon = run_policy(loaded, watch=_watcher(progress, events, before))
    answered = daemon.core.counts["events"] - before[0]
    outcome = _collect(directory, stream, time.monotonic() - started, answered)
    from engine.demo.report import write_report

    page = directory / "report.html"
    write_report(page, outcome)
    if as_json:
        Console(soft_wrap=True).print_json(json.dumps({**outcome.summary(), "report": str(page)}))
    else:
        _show(outcome, page)


def _prepare(directory: Path, events: int, seed: int, console: Console) -> streams.Stream:
    """Train the model and write the streams, unless that was done before."""
    try:
        digits = streams.load_digits()
    except ImportError as error:
        text = "the demonstration needs its extra: pip install 'adaptd[demo]', or in a checkout '.[demo]'"
        raise UsageError(text) from error
    stream = streams.make_stream(digits, events, seed=seed)
    told = directory / "demo.json"
    if told.exists():
        if json.loads(told.read_text()) != {"events": events, "seed": seed}:
            raise UsageError(f"{directory} holds a demonstration with other options; choose another --dir")
        return stream
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--dir {directory}: {error.strerror}; name a directory that can be made") from error
    with _doing(console, "training a small CNN on clean digits"):
        with _one_thread():
            model = train(torch.from_numpy(digits.train_x)[:, None], torch.from_numpy(digits.train_y))
        save_file(model.state_dict(), directory / "model.safetensors")
    with _doing(console, f"writing {events} events"):
        _write_streams(directory, stream)
    (directory / "policy.yaml").write_text(POLICY)
    scratch = directory / "demo.json.part"
    scratch.write_text(json.dumps({"events": events, "seed": seed}))
    scratch.rename(told)  # last: what is there is whole
    return stream


def _doing(console: Console, text: str) -> AbstractContextManager[object]:
    """Say what is being done: with a spinner on a terminal, in a line elsewhere."""
    if console.is_terminal:
        return console.status(text)
    console.print(text, highlight=False, soft_wrap=True)
    return nullcontext()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for a model this small, threads wait for one another longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_streams(directory: Path, stream: streams.Stream) -> None:
    with (directory / "events.jsonl").open("w") as file:
        for row, (x, t) in enumerate(zip(stream.x, stream.t.tolist(), strict=True)):
            inputs = json.dumps(x[None].tolist(), separators=(",", ":"))
            file.write(f'{{"id":"digit-{row}","inputs":{inputs},"time":{t!r}}}\n')
    known = np.flatnonzero(np.isfinite(stream.label_at))
    with (directory / "feedback.jsonl").open("w") as file:
        for row in known[np.argsort(stream.label_at[known], kind="stable")].tolist():
            line = {"id": f"digit-{row}", "label": int(stream.y[row]), "time": float(stream.label_at[row])}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def _bar(console: Console, events: int) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task("streaming", total=events, note="")
    return progress


def _watcher(progress: Progress, events: int, before: list[int]) -> Callable[[Daemon], Any]:
    """What shows how far the daemon is: a bar on a terminal, ten lines elsewhere.

    Args:
        progress: The bar.
        events: How many there are.
        before: Is given the number of events that were answered before.
    """

    async def watch(daemon: Daemon) -> None:
        before.append(daemon.core.counts["events"])
        told = before[0]
        while True:
            core = daemon.core
            note = f"updates {core.step}  release {core.release}  labels {core.counts['labels']}"
            accuracy = core.audit.accuracies()
            if accuracy:
                note += f"  audit: frozen {accuracy['source']:.0%}, live {accuracy['live']:.0%}"
            done = core.counts["events"]
            progress.update(progress.task_ids[0], completed=done, note=note)
            if not progress.console.is_terminal and done >= told + events // 10:
                told = done
                progress.console.print(f"{done} of {events} events  {note}", highlight=False, soft_wrap=True)
            await anyio.sleep(0.2)

    return watch


def _collect(directory: Path, stream: streams.Stream, seconds: float, answered: int) -> Outcome:
    """Read the answers back, one for each event, and compare with the model that never changed."""
    total = len(stream.y)
    adapted, step, release = (np.full(total, -1, dtype=np.int64) for _ in range(3))
    confidence = np.zeros(total)
    lines = 0
    with (directory / "predictions.jsonl").open() as file:
        for line in file:
            answer = json.loads(line)
            row = int(answer["id"].removeprefix("digit-"))
            lines += 1
            adapted[row], confidence[row] = answer["label"], max(answer["probabilities"])
            step[row], release[row] = answer["model"]["step"], answer["model"]["release"]
    missing = int((adapted < 0).sum())
    if missing:
        raise UsageError(f"{missing} of {total} events have no answer yet; run the demonstration again to go on")
    model = build()
    model.load_state_dict(load_file(directory / "model.safetensors"))
    with torch.inference_mode():
        frozen = model.eval()(torch.from_numpy(stream.x).float()[:, None] / 255).argmax(1).numpy()
    return Outcome(stream, frozen, adapted, step, release, confidence, seconds, lines - total, answered)


def _show(outcome: Outcome, page: Path) -> None:
    table = Table()
    table.add_column("phase")
    for name in ("events", "frozen", "adapted", "gain"):
        table.add_column(name, justify="right")
    summary = outcome.summary()
    for row in summary["phases"]:
        table.add_row(*_cells(row["phase"], str(row["events"]), row["frozen"], row["adapted"]))
    table.add_section()
    for name in ("drifted", "clean"):
        table.add_row(*_cells(name, "", summary[name]["frozen"], summary[name]["adapted"]))
    console = Console(soft_wrap=True)
    now = "" if outcome.answered == summary["events"] else f" ({outcome.answered} of them now, the others before)"
    console.print(f"{summary['events']} events{now} in {outcome.seconds:.1f} s; labels for a fifth of them, and late")
    console.print(table)
    console.print(f"{summary['updates']} updates, {summary['releases']} releases; pictures: {page}")


def _cells(name: str, count: str, frozen: float, adapted: float) -> tuple[str, ...]:
    return name, count, f"{frozen:.1%}", f"{adapted:.1%}", f"{100 * (adapted - frozen):+.1f}"
