"""Combinations that no single key can tell are impossible: each a sentence at the key to change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from string import ascii_letters
from typing import Final

from engine.policy import Policy, SourceEndpoint
from engine.problems import Problem

_SUFFIXES: Final = {
    "data": (".jsonl", ".rec", ".npz", ""),
    "feedback": (".jsonl", ".rec", ""),
    "predictions": (".jsonl", ".rec"),
    "dead_letters": (".jsonl",),
}
"""Endings of the names of files by stream; the empty one is a directory."""


def impossible(policy: Policy) -> Iterator[Problem]:
    """Everything in a valid policy that cannot work together."""
    for check in CHECKS:
        yield from check(policy)


def _endpoints(policy: Policy) -> Iterator[Problem]:
    if policy.streams is None:
        return
    for name, endpoint in policy.streams.endpoints():
        key = ("streams", name)
        if endpoint.kafka is None and endpoint.file is None:
            yield Problem(key, "names no stream; write {kafka: TOPIC} or {file: PATH}")
        elif endpoint.kafka is not None and endpoint.file is not None:
            yield Problem(key, "has both kafka and file; keep one of them")
        elif endpoint.kafka is not None and policy.streams.kafka is None:
            yield Problem(
                key, "is a Kafka topic, but nothing says where the cluster is; add streams.kafka with bootstrap_servers"
            )
        if isinstance(endpoint, SourceEndpoint) and endpoint.follow and endpoint.kafka is not None:
            yield Problem((*key, "follow"), "has no effect on a Kafka topic, which never ends; remove it")


def _files(policy: Policy) -> Iterator[Problem]:
    if policy.streams is None:
        return
    for name, endpoint in policy.streams.endpoints():
        if endpoint.file is not None and endpoint.file.suffix not in _SUFFIXES[name]:
            found, expected = endpoint.file.suffix or "nothing", _named(_SUFFIXES[name])
            yield Problem(("streams", name, "file"), f"the name ends in {found}; expected {expected}")
    data, predictions = policy.streams.data, policy.streams.predictions
    if data.follow and data.file is not None and data.file.suffix == ".npz":
        yield Problem(("streams", "data", "follow"), "a recorded .npz stream does not grow; remove follow")
    if predictions.format == "binary" and predictions.file is not None and predictions.file.suffix == ".jsonl":
        yield Problem(("streams", "predictions", "format"), "binary does not fit lines of .jsonl; name the file .rec")


def _named(suffixes: Sequence[str]) -> str:
    named = " or ".join(suffix for suffix in suffixes if suffix)
    return f"{named}, or a directory of such files" if "" in suffixes else named


def _loops(policy: Policy) -> Iterator[Problem]:
    """No stream is written to and read from, and none serves for two things."""
    seen: dict[tuple[str, str], str] = {}
    for name, endpoint in () if policy.streams is None else policy.streams.endpoints():
        first = seen.setdefault(endpoint.place, name)
        if first != name and endpoint.place != ("file", "None"):
            kind = "topic" if endpoint.kafka is not None else "file"
            yield Problem(("streams", name), f"is the same {kind} as streams.{first}; every stream needs its own")


def _order(policy: Policy) -> Iterator[Problem]:
    if policy.order != "time" or policy.streams is None or policy.bounded:
        return
    endless = next(
        name for name, end in policy.streams.endpoints() if isinstance(end, SourceEndpoint) and not end.bounded
    )
    yield Problem(
        ("order",),
        f"'time' merges files that are read to their end, and streams.{endless} has no end; write 'arrival', "
        "or leave the key out",
    )


def _delivery(policy: Policy) -> Iterator[Problem]:
    """Answers and offsets are in one transaction only where both are in Kafka."""
    if policy.delivery != "exactly_once" or policy.streams is None:
        return
    for name, endpoint in policy.streams.endpoints():
        if endpoint.file is not None:
            yield Problem(
                ("streams", name),
                "is a file, which no transaction holds; delivery: exactly_once needs a Kafka topic here, or write "
                "'at_least_once' and let readers deduplicate by id",
            )
    kafka = policy.streams.kafka
    if kafka is not None and kafka.group is None:
        yield Problem(
            ("delivery",), "'exactly_once' commits offsets together with answers; name the group in streams.kafka.group"
        )
    if kafka is not None and kafka.isolation_level != "read_committed":
        yield Problem(
            ("streams", "kafka", "isolation_level"),
            "reads what transactions may still take back; delivery: exactly_once needs read_committed, which is the "
            "default",
        )


def _feedback(policy: Policy) -> Iterator[Problem]:
    if policy.streams is None or policy.streams.feedback is not None:
        return
    if policy.learning.enabled:
        yield Problem(
            ("learning", "enabled"),
            "labels cannot be learned from without feedback; add streams.feedback or remove the key",
        )
    if policy.gate is not None:
        yield Problem(
            ("gate",),
            "decides on labelled rows, and there is no feedback; add streams.feedback or remove gate and interpolation",
        )


def _releases(policy: Policy) -> Iterator[Problem]:
    if policy.gate is not None and policy.interpolation is None:
        yield Problem(
            ("gate",), "has nothing to decide on; add interpolation, for instance {method: linear}, or remove gate"
        )
    if policy.interpolation is not None and policy.gate is None:
        yield Problem(
            ("interpolation",),
            "has nothing to decide on its weights; add gate, for instance {method: flips}, or remove interpolation",
        )
    if policy.gate is not None and policy.audit.share == 0:
        yield Problem(
            ("audit", "share"), "0 holds out no feedback, and the gate decides on nothing else; choose a share above 0"
        )
    if policy.gate is not None and policy.release.every == 0 and "every" in policy.release.model_fields_set:
        yield Problem(
            ("release", "every"),
            "0 never attempts a release, so the gate has no use; choose a number above 0 or remove gate",
        )


def _methods(policy: Policy) -> Iterator[Problem]:
    if policy.adaptation.method == "lame" and policy.batching.max_size == 1:
        yield Problem(
            ("batching", "max_size") if "max_size" in policy.batching.model_fields_set else ("adaptation",),
            "lame compares the rows of a batch with each other, and batches of 1 leave nothing to compare; "
            "choose a max_size of 16 or more, or another adaptation",
        )
    for key, methods in (("reweighting", policy.reweighting), ("safeguards", policy.safeguards)):
        for name, times in Counter(spec.method for spec in methods).items():
            if times > 1:
                last = max(index for index, spec in enumerate(methods) if spec.method == name)
                yield Problem((key, last), f"{name} is listed {times} times; keep one of them")


def _layout(policy: Policy) -> Iterator[Problem]:
    from streams.codec_types import MAX_BYTES

    inputs = policy.model.inputs
    if inputs.layout == "hwc" and len(inputs.shape) != 3:
        yield Problem(
            ("model", "inputs", "layout"),
            f"hwc is for shapes of three dimensions, and {list(inputs.shape)} has {len(inputs.shape)}; remove layout",
        )
    if inputs.scale == 0:
        yield Problem(("model", "inputs", "scale"), "0 makes all inputs the same; choose another factor")
    size = math.prod(inputs.shape) * int(inputs.dtype.lstrip(ascii_letters)) // 8
    if size > MAX_BYTES:
        yield Problem(
            ("model", "inputs", "shape"),
            f"one row takes {size:,} bytes, and a record may have {MAX_BYTES:,}; give the model smaller inputs",
        )


def _join(policy: Policy) -> Iterator[Problem]:
    if policy.join.mode == "inline" and "max_disk_bytes" in policy.join.model_fields_set:
        yield Problem(("join", "max_disk_bytes"), "has no effect with mode inline, which keeps no inputs; remove it")


CHECKS: Final[tuple[Callable[[Policy], Iterator[Problem]], ...]] = (
    _endpoints,
    _files,
    _loops,
    _order,
    _delivery,
    _feedback,
    _releases,
    _methods,
    _layout,
    _join,
)
