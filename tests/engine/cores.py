"""Small cores for tests."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from engine.audit import Audit
from engine.core import Core
from engine.coretypes import CoreSettings
from engine.host import Inputs, ModelHost
from engine.learner import Learner
from engine.methods import Choice, Methods
from policies.interfaces import MethodParams
from policies.registry import find
from streams.base import Record
from streams.codec import Event, Feedback
from streams.join import JoinStore

FEATURES = 4
CLASSES = 3


def tiny_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def choice(kind: str, name: str, **params: object) -> Choice:
    built: MethodParams = find(kind, name).Params(**params)
    return Choice(kind, name, built)


def make_core(
    *choices: Choice,
    background: bool = False,
    batch_size: int = 8,
    audit_share: float = 0.25,
    release_every: int = 0,
    lr: float = 0.05,
    model: nn.Module | None = None,
    learn: bool = True,
) -> Core:
    host = ModelHost(model or tiny_model(), Inputs((FEATURES,), np.dtype("float32")), torch.device("cpu"))
    picked = list(choices)
    if not any(c.kind == "adaptation" for c in picked):
        picked.append(choice("adaptation", "none"))
    methods = Methods.build(picked, host, seed=0)
    audit = Audit(500, host.inputs, host.device)
    names = [name for name, _ in host.learner.named_parameters()]
    optimizer = torch.optim.Adam(host.learner.parameters(), lr=lr)
    learner = Learner(host, methods, audit, optimizer=optimizer, names=names, enabled=learn)
    joins = JoinStore(window=1e6, max_bytes=1 << 24, max_disk_bytes=0, directory=None)
    settings = CoreSettings(
        batch_size=batch_size,
        max_delay=1e9,
        audit_share=audit_share,
        release_every=release_every,
        store_inputs=True,
        background=background,
    )
    return Core(settings, host, methods, learner, audit, joins)


Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def rows(start: int, count: int) -> Array:
    rng = np.random.default_rng(1)
    return rng.normal(size=(start + count, FEATURES)).astype(np.float32)[start:]


def label_of(row: Array) -> int:
    return int(np.argmax(row[:CLASSES]))


def events(start: int, count: int) -> list[Event]:
    return [
        Event(f"e{i}", x.tobytes(), float(i), None, Record("data", 0, i, i + 1, float(i), None, b""))
        for i, x in enumerate(rows(start, count), start)
    ]


def feedback(start: int, count: int) -> list[Feedback]:
    return [
        Feedback(f"e{i}", label_of(x), None, float(i), None, Record("feedback", 0, i, i + 1, float(i), None, b""))
        for i, x in enumerate(rows(start, count), start)
    ]


def drive(core: Core, batches: Sequence[int], size: int = 16) -> list[Array]:
    """Answer these batches of events, each followed by its feedback; the probabilities answered."""
    out = []
    for number in batches:
        out.append(core.answer(events(number * size, size)).probabilities)
        core.follow()
        core.feedback(feedback(number * size, size))
    return out
