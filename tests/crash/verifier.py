"""What must be true after any number of kills, worked out from the input files alone.

Nothing of the engine is imported: lines, checkpoints and joins are read here by what is documented of their form.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from tests.crash.workload import Workload

_FRAME = struct.Struct("<cIII")

Headers = Sequence[tuple[str, bytes]]


@dataclass(frozen=True)
class Truth:
    """What a run over a workload comes to, however often it was killed.

    Attributes:
        ids: Events to be answered.
        bad: Values of the records that nobody can decode.
        feedback: Feedback records that can be decoded.
        labels: Events that meet a label; every further label of the same event is a duplicate.
        duplicates: Labels beyond the first of an event.
    """

    ids: frozenset[str]
    bad: Counter[bytes]
    feedback: int
    labels: int
    duplicates: int


def truth_of(workload: Workload) -> Truth:
    """Read a workload as the daemon should have."""
    bad: Counter[bytes] = Counter()

    def decoded(lines: Sequence[bytes]) -> list[dict[str, Any]]:
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                bad[line] += 1
        return rows

    ids = [row["id"] for row in decoded(workload.events)]
    assert len(set(ids)) == len(ids)
    told = decoded(workload.feedback)
    meant = Counter(row["id"] for row in told if row["id"] in set(ids))
    return Truth(frozenset(ids), bad, len(told), len(meant), meant.total() - len(meant))


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint of a state directory, every byte of it compared with its manifest."""

    step: int
    files: Mapping[str, bytes]
    positions: Mapping[tuple[str, int], int]
    counts: Mapping[str, int]
    joins: Mapping[str, int]

    @classmethod
    def newest(cls, state: Path) -> Checkpoint:
        folder = max(state.glob("ckpt-*"))
        body, _, rest = (folder / "MANIFEST").read_bytes().partition(b"\n")
        assert _digest(body + b"\n") == rest.strip().decode(), f"{folder}: its manifest is damaged"
        listed = json.loads(body)["files"]
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MANIFEST"}
        assert files.keys() == listed.keys(), f"{folder}: its files are not those of its manifest"
        for name, data in files.items():
            assert blake3(data).hexdigest() == listed[name]["blake3"], f"{folder / name} is damaged"
        meta = json.loads(files["meta.json"])
        return cls(
            step=json.loads(body)["step"],
            files=files,
            positions={(stream, number): at for stream, number, at in meta["positions"]},
            counts=meta["states"]["policy"]["core"]["counts"],
            joins=_joins(files["join.bin"])["counts"],
        )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _joins(data: bytes) -> dict[str, Any]:
    """The scalars of the waiting joins: one JSON object in the frame of kind S."""
    at = data.index(b"\n") + 1
    while at < len(data):
        kind, size, _, _ = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        if kind == b"S":
            found: dict[str, Any] = json.loads(data[at : at + size])
            return found
        at += size
    raise AssertionError("join.bin has no scalars")


@dataclass
class Findings:
    """What was wrong and what was seen, in numbers.

    Attributes:
        missing: Events without an answer.
        lost: Records that the state does not have.
        applied_twice: Records, or labels, that the state has more than once.
        different: Answers of one id that are not equal, and files of the state that differ from an uninterrupted run.
        duplicates: Answers beyond the first of an id, equal to it.
        problems: All of it in words.
    """

    missing: int = 0
    lost: int = 0
    applied_twice: int = 0
    different: int = 0
    duplicates: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        """Count the findings of another run too."""
        for name in ("missing", "lost", "applied_twice", "different", "duplicates"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems += other.problems

    def say(self, kind: str, count: int, what: str) -> None:
        """Count something wrong."""
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            self.problems.append(f"{kind}: {what}")


def check_answers(found: Findings, truth: Truth, values: Iterable[bytes]) -> dict[str, bytes]:
    """Every event is answered, and an answer that comes again is equal to the first; give the answers by id."""
    answers: dict[str, bytes] = {}
    for value in values:
        name = json.loads(value)["id"]
        if name not in answers:
            answers[name] = value
        elif answers[name] == value:
            found.duplicates += 1
        else:
            found.say("different", 1, f"{name} was answered with {answers[name]!r} and {value!r}")
    missing = truth.ids - answers.keys()
    found.say("missing", len(missing), f"no answer to {sorted(missing)[:5]}")
    strange = answers.keys() - truth.ids
    found.say("different", len(strange), f"answers to {sorted(strange)[:5]}, which nobody sent")
    return answers


def check_headers(found: Findings, places: Mapping[str, str], answers: Iterable[tuple[Headers, bytes]]) -> None:
    """Every answer names the place of its record in its header, which readers tell repeats by, and repeats are equal.

    Args:
        found: Where to count.
        places: Where each event lies, as ``topic-partition-offset``.
        answers: Headers and values.
    """
    firsts: dict[str, tuple[Headers, bytes]] = {}  # by the id that a reader would compare
    for headers, value in answers:
        name = json.loads(value)["id"]
        ids = [told.decode() for key, told in headers if key == "adaptd-id"]
        if ids != [places.get(name)]:
            found.say("different", 1, f"{name} lies at {places.get(name)} and was answered under {ids}")
        for told in ids:
            first = firsts.setdefault(told, (headers, value))
            if first != (headers, value):
                found.say("different", 1, f"under {told} there are {first!r} and {(headers, value)!r}")


def check_letters(found: Findings, truth: Truth, values: Iterable[bytes]) -> None:
    """Every record that cannot be decoded lies among the dead letters."""
    missing = truth.bad - Counter(values)
    found.say("missing", missing.total(), f"no dead letter for {list(missing)[:5]}")


def check_state(found: Findings, truth: Truth, state: Path, ends: Mapping[tuple[str, int], int]) -> Checkpoint:
    """The final checkpoint has every record once: by its positions, its counts and its joins."""
    kept = Checkpoint.newest(state)
    for partition, end in ends.items():
        at = kept.positions.get(partition, 0)
        found.say("lost", int(at < end), f"{partition} was read to {at} of {end}")
        found.say("applied_twice", int(at > end), f"{partition} was read to {at} of {end}")
    numbers = {
        "events": (kept.counts.get("events", 0), len(truth.ids)),
        "feedback": (kept.counts.get("feedback", 0), truth.feedback),
        "labels": (kept.counts.get("labels", 0), truth.labels),
        "joins": (kept.joins["joined"], truth.labels),
        "duplicates": (kept.joins["duplicate"], truth.duplicates),
        "redelivered": (kept.joins["redelivered"], 0),
    }
    for name, (got, expected) in numbers.items():
        found.say("lost", max(expected - got, 0), f"{got} {name} of {expected} in the state")
        found.say("applied_twice", max(got - expected, 0), f"{got} {name} of {expected} in the state")
    return kept


def check_equal(found: Findings, kept: Checkpoint, whole: Checkpoint) -> None:
    """Two final checkpoints are the same, bit for bit."""
    found.say("different", int(kept.step != whole.step), f"{kept.step} journal entries, not {whole.step}")
    wrong = [name for name in whole.files if kept.files.get(name) != whole.files[name]]
    found.say("different", len(wrong), f"{wrong} differ from the uninterrupted run")
