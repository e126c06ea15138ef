"""Streams that adaptation methods are measured on, each with the model that was trained before it.

``vision``: corrupted CIFAR-10 images and a ResNet-20, made by ``vision_stream.py`` in the benchmark's folder and kept
in the folder for temporary files. ``elec`` and ``weather``: the first third of a table trains a perceptron, the
rest is the stream. ``sequence``: waves of six shapes and a transformer; at test time they come distorted.
``sequence_heads``: the same, with a head for each of three sources.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.results import one_thread
from benchmarks.rotta import load_model
from benchmarks.tta_models import ManyHeads, SequenceNet, TableNet, trained

Array = NDArray[Any]

ALL_DOMAINS = "gaussian_noise shot_noise impulse_noise defocus_blur motion_blur zoom_blur fog brightness contrast"
FOUR_DOMAINS = "gaussian_noise motion_blur fog contrast"

_MAKE = """\
import json, sys
import numpy as np
import corruptions, vision_stream
corruptions.clean = lambda images, severity, rng: images
wanted = json.loads(sys.argv[2])
x, y, domain = vision_stream.build(**wanted)
np.savez(sys.argv[1], x=x, y=y, domain=domain)
"""


@dataclass(frozen=True)
class Spec:
    """A stream.

    Attributes:
        kind: ``vision``, ``elec``, ``weather``, ``sequence`` or ``sequence_heads``.
        iid: Whether classes come mixed rather than in runs.
        domains: Names of corruptions, one after another.
        severity: Of the corruptions, 1 to 5.
        gamma: Of the Dirichlet distribution that puts classes into runs; the lower the longer.
        per_class: Images of each class in each domain; rows of a table are a hundred times as many.
        visits: How often the same stream comes.
        mixed: Whether domains come interleaved at random instead of one after another.
        grouped: Whether events name their domain as their group.
        batch_size: Rows a batch.
        seed: Of everything drawn.
    """

    kind: str = "vision"
    iid: bool = False
    domains: str = f"{ALL_DOMAINS} jpeg_compression"
    severity: int = 5
    gamma: float = 0.1
    per_class: int = 10
    visits: int = 1
    mixed: bool = False
    grouped: bool = False
    batch_size: int = 64
    seed: int = 0

    def smaller(self, divisor: int) -> Spec:
        """The same stream with fewer images of each class."""
        return replace(self, per_class=max(1, self.per_class // divisor))


STREAMS: dict[str, Spec] = {
    "correlated": Spec(per_class=100),
    "iid": Spec(per_class=30, iid=True),
    "recurring3": Spec(per_class=5, visits=3),
    "recurring20": Spec(per_class=5, visits=20, domains=FOUR_DOMAINS),
    "mixed": Spec(mixed=True, iid=True),
    "groups": Spec(mixed=True, grouped=True),
    "single": Spec(per_class=3, batch_size=1),
    "single_iid": Spec(per_class=3, batch_size=1, iid=True),
    "severity1": Spec(severity=1),
    "severity3": Spec(severity=3),
    "severity3_iid": Spec(severity=3, iid=True),
    "clean": Spec(domains="clean", per_class=100),
    "clean_iid": Spec(domains="clean", per_class=100, iid=True),
    "gamma0.01": Spec(gamma=0.01),
    "gamma1": Spec(gamma=1.0),
    "gamma10": Spec(gamma=10.0),
    "elec": Spec(kind="elec", per_class=100),
    "weather": Spec(kind="weather", per_class=100),
    "sequence": Spec(kind="sequence", per_class=100),
    "sequence_iid": Spec(kind="sequence", per_class=100, iid=True),
    "sequence_heads": Spec(kind="sequence_heads", per_class=100),
}


def spec_of(text: str, seed: int, per_class: int | None, batch_size: int | None) -> Spec:
    """The stream that ``name`` or ``name:key=value,...`` stands for.

    Raises:
        ValueError: If there is no such stream or key; the message says which there are.
    """
    name, _, given = text.partition(":")
    if name not in STREAMS:
        raise ValueError(f"there is no stream {name!r}; choose from {', '.join(STREAMS)}")
    spec = replace(STREAMS[name], seed=seed)
    if batch_size is not None and spec.batch_size > 1:
        spec = replace(spec, batch_size=batch_size)
    if per_class is not None:
        spec = replace(spec, per_class=per_class)
    for item in filter(None, given.split(",")):
        key, _, value = item.partition("=")
        if key not in asdict(spec):
            raise ValueError(f"stream {text!r}: no {key!r}; choose from {', '.join(asdict(spec))}")
        spec = replace(spec, **{key: type(getattr(spec, key))(yaml.safe_load(value))})
    return spec


@dataclass(frozen=True)
class Stream:
    """What a spec stands for: labels and domains ``(N,)``, the source model, and its inputs ``(N, *shape)``: bytes of
    images ``(N, 3, 32, 32)``, or the floats of everything else.
    """

    inputs: Tensor
    labels: Tensor
    domains: Tensor
    source: nn.Module
    classes: int


@lru_cache(maxsize=64)
def load(spec: Spec, bench: Path) -> Stream:
    """A stream, ready to be answered; visits are not repeated in it."""
    if spec.kind == "vision":
        return _vision(spec, bench)
    if spec.kind.startswith("sequence"):
        return _sequence(spec)
    return _table(spec, bench)


def recorded(spec: Spec, bench: Path) -> Path:
    """The file of a stream of images; made where it is not kept yet."""
    wanted = {
        "domains": spec.domains.split(),
        "gamma": spec.gamma,
        "severity": spec.severity,
        "per_class": spec.per_class,
        "seed": spec.seed,
        "iid": spec.iid,
    }
    text = yaml.safe_dump(wanted, default_flow_style=True, width=10**6)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / "adaptd-benchmarks" / f"vision-{digest}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        made = path.with_name(f"new-{os.getpid()}-{path.name}")
        command = [sys.executable, "-c", _MAKE, str(made), json.dumps(wanted)]
        subprocess.run(command, cwd=bench, check=True, env=one_thread(), stdout=subprocess.DEVNULL)
        made.rename(path)
    return path


def _vision(spec: Spec, bench: Path) -> Stream:
    with np.load(recorded(spec, bench)) as archive:
        x, y, domain = archive["x"], archive["y"], archive["domain"]
    order = interleaved(domain, np.random.default_rng(spec.seed)) if spec.mixed else np.arange(len(y))
    images = torch.from_numpy(x[order]).permute(0, 3, 1, 2)
    return Stream(images, torch.from_numpy(y[order]), torch.from_numpy(domain[order]), load_model(bench), 10)


def interleaved(domain: Array, rng: np.random.Generator) -> Array:
    """Indices that mix domains ``(N,)`` at random and keep the order inside each."""
    turns = rng.permutation(domain)
    order = np.empty(len(domain), dtype=np.int64)
    order[np.argsort(turns, kind="stable")] = np.argsort(domain, kind="stable")
    return order


def runs(labels: Array, gamma: float, rng: np.random.Generator) -> Array:
    """Indices that put labels ``(N,)`` into runs: every class falls into as many slots as there are classes, in shares
    drawn from a Dirichlet distribution, and inside a slot classes come one after another.
    """
    classes = int(labels.max()) + 1
    shares = rng.dirichlet([gamma] * classes, classes)
    edges = shares.cumsum(1)[labels]
    slots = (rng.random(len(labels))[:, None] > edges[:, :-1]).sum(1)
    ranks = np.stack([rng.permutation(classes) for _ in range(classes)])
    return np.lexsort((rng.random(len(labels)), ranks[slots, labels], slots))


def _table(spec: Spec, bench: Path) -> Stream:
    with gzip.open(bench / "data" / f"{spec.kind}.csv.gz", "rt") as file:
        lines = list(csv.reader(file))[1:]
    table = torch.tensor([[float(value) for value in line] for line in lines])
    rows, labels = table[:, :-1].contiguous(), table[:, -1].long()
    known = len(rows) // 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = trained(TableNet(rows[:known], 2), rows[:known], labels[:known], 10, spec.seed)
    stream = slice(known, known + 100 * spec.per_class)
    return Stream(rows[stream], labels[stream], torch.zeros(len(labels[stream]), dtype=torch.int64), model, 2)


STEPS, CHANNELS, SHAPES = 24, 3, 6
_DISTORTIONS = ("clean", "noise", "gain", "offset", "held", "gaps")
_SOURCES = ("clean", "noise", "gain")


def waves(labels: Array, rng: np.random.Generator) -> Array:
    """Sequences ``(N, 24, 3)`` of waves whose shape is the label: sine, square, saw, triangle, pulse or chirp."""
    count = len(labels)
    speed = rng.uniform(1.5, 3.0, (count, 1, 1))
    phase = rng.random((count, 1, CHANNELS))
    time = np.linspace(0, 1, STEPS)[None, :, None]
    at = (speed * time + phase) % 1
    shapes = np.stack(
        [
            np.sin(2 * np.pi * at),
            np.where(at < 0.5, 1.0, -1.0),
            2 * at - 1,
            4 * np.abs(at - 0.5) - 1,
            np.where(at < 0.2, 1.0, -0.25),
            np.sin(2 * np.pi * (speed * time**2 * 2 + phase)),
        ]
    )
    clean = shapes[labels, np.arange(count)] * rng.uniform(0.7, 1.3, (count, 1, CHANNELS))
    return np.asarray(clean + rng.normal(scale=0.1, size=clean.shape), dtype=np.float32)


def _distorted(x: Array, how: str, rng: np.random.Generator) -> Array:
    if how == "noise":
        return x + rng.normal(scale=0.4, size=x.shape).astype(np.float32)
    if how == "gain":
        return x * np.float32(0.6)
    if how == "offset":
        return x + np.array([0.5, -0.5, 0.25], dtype=np.float32)
    if how == "held":
        return np.repeat(x[:, ::2], 2, axis=1)
    return x * (rng.random(x.shape[:2]) > 0.15)[..., None] if how == "gaps" else x


@lru_cache
def _sequence_model(seed: int) -> nn.Module:
    rng = np.random.default_rng((seed, 1))
    known = rng.integers(SHAPES, size=6000)
    rows = torch.from_numpy(waves(known, rng))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return trained(SequenceNet(STEPS, CHANNELS, SHAPES), rows, torch.from_numpy(known), 12, seed)


@lru_cache
def _many_headed_model(seed: int) -> nn.Module:
    """The transformer, trained on all sources, and a head for each that saw its rows alone."""
    rng = np.random.default_rng((seed, 2))
    known = rng.integers(SHAPES, size=(len(_SOURCES), 2000))
    rows = [torch.from_numpy(_distorted(waves(y, rng), how, rng)) for y, how in zip(known, _SOURCES, strict=True)]
    labels = torch.from_numpy(known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = SequenceNet(STEPS, CHANNELS, SHAPES)
        trained(body, torch.cat(rows), labels.flatten(), 12, seed)
        body.head = nn.Identity()
        model = ManyHeads(body, body.width, len(_SOURCES), SHAPES)
        for head, own, wanted in zip(model.heads, rows, labels, strict=True):
            with torch.inference_mode():
                features = body(own).clone()
            trained(head, features, wanted, 12, seed)
    return model.eval()


def _sequence(spec: Spec) -> Stream:
    rng = np.random.default_rng(spec.seed)
    model = _sequence_model(spec.seed) if spec.kind == "sequence" else _many_headed_model(spec.seed)
    parts, labels = [], []
    for how in _DISTORTIONS:
        drawn = np.repeat(np.arange(SHAPES), spec.per_class)
        order = rng.permutation(len(drawn)) if spec.iid else runs(drawn, spec.gamma, rng)
        labels.append(drawn[order])
        parts.append(_distorted(waves(labels[-1], rng), how, rng).astype(np.float32))
    domains = torch.arange(len(parts)).repeat_interleave(len(labels[0]))
    return Stream(
        torch.from_numpy(np.concatenate(parts)), torch.from_numpy(np.concatenate(labels)), domains, model, SHAPES
    )
