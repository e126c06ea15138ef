"""Small models, streams and states for tests of every kind of method."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from policies.interfaces import Adaptation, Batch, Context, LabelledBatch, MethodParams, Outcome, Weights
from policies.registry import find
from policies.stepping import SafeStepper

CLASSES = 4
FEATURES = 6
IMAGE = (3, 8, 8)
TOKENS = 11


def conv_bn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, CLASSES),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def mlp_layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, CLASSES))


def mlp_bn1d() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


def mlp_group_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def conv() -> nn.Module:
    """Without any normalisation layer."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


class Transformer(nn.Module):
    """One encoder layer over tokens, whose outputs are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.embed(tokens)).mean(1))
        return logits


class Tagger(nn.Module):
    """Classifies every position of a sequence; the mean is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES // 2)
        self.head = nn.Linear(FEATURES // 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x.unflatten(1, (2, -1)))).mean(1)
        return logits


class Heads(nn.Module):
    """A trunk with three heads, of which it uses the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.stack([head(features) for head in self.heads]).mean(0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv_bn": conv_bn,
    "mlp": mlp,
    "mlp_layer_norm": mlp_layer_norm,
    "mlp_bn1d": mlp_bn1d,
}
"""What every method is tested on."""

OTHERS: dict[str, Callable[[], nn.Module]] = {
    "mlp_heads": Heads,
    "mlp_group_norm": mlp_group_norm,
    "conv": conv,
    "transformer": Transformer,
    "tagger": Tagger,
}
"""Model kinds beside these: several heads, GroupNorm, no normalisation, sequences, a classifier of every position."""


def source_model(name: str) -> nn.Module:
    """A model of the given kind whose statistics have seen data."""
    torch.manual_seed(3)
    model = (MODELS | OTHERS)[name]().train()
    with torch.no_grad():
        for _ in range(4):
            model(draw(name, 32))
    return model.eval()


def draw(name: str, rows: int) -> Tensor:
    """Rows for the model of that name: images in [0, 1], tokens, or normal features."""
    if name == "transformer":
        return torch.randint(TOKENS, (rows, 5))
    return torch.rand(rows, *IMAGE) if name.startswith("conv") else torch.randn(rows, FEATURES)


def context_for(source: nn.Module, seed: int = 11, classes: int = CLASSES) -> Context:
    """A context with a live copy of ``source``."""
    live = copy.deepcopy(source)
    frozen = copy.deepcopy(source).requires_grad_(False)
    return Context(model=live, source=frozen, num_classes=classes, seed=seed, stepper=SafeStepper())


def build(kind: str, name: str, params: dict[str, Any], source: nn.Module, seed: int = 11) -> Any:
    """A method on a fresh live copy of ``source``."""
    method = find(kind, name)
    checked: MethodParams = method.Params(**params)
    return method(checked, context_for(source, seed))


def batch_of(inputs: Tensor, first: int = 0) -> Batch:
    """A batch whose ids and times start at ``first``."""
    rows = range(first, first + len(inputs))
    times = torch.tensor([float(row) for row in rows], dtype=torch.float64)
    return Batch(
        ids=tuple(f"e{row}" for row in rows),
        inputs=inputs,
        times=times,
        groups=(None,) * len(inputs),
        now=float(first + len(inputs)),
    )


def labelled_of(inputs: Tensor, labels: Tensor, first: int = 0) -> LabelledBatch:
    """A labelled batch whose feedback came a second after each event."""
    head = batch_of(inputs, first)
    return LabelledBatch(
        ids=head.ids,
        inputs=inputs,
        times=head.times,
        groups=head.groups,
        now=head.now + 1,
        labels=labels,
        feedback_times=head.times + 1,
        predicted=torch.full((len(inputs),), -1),
    )


def stream(name: str, batches: int, rows: int = 16, seed: int = 5) -> Iterator[Batch]:
    """Batches whose distribution drifts."""
    torch.manual_seed(seed)
    for number in range(batches):
        yield batch_of(draw(name, rows) * (1 + 0.02 * number), number * rows)


def drive(method: Adaptation, batches: Sequence[Batch] | Iterator[Batch]) -> list[Tensor]:
    """Answer and adapt to every batch; the logits."""
    answers = []
    for batch in batches:
        answers.append(method.adapt(batch))
        method.update()
    return answers


def applied(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.applied


def weights_of(model: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_weights(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """A state by path: tensors as dtype, shape and bytes, the rest as JSON text. Fails for anything else."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return {path: (str(plain.dtype), tuple(plain.shape), plain.numpy().tobytes())}
    if isinstance(value, dict):
        assert all(isinstance(key, str) and "/" not in key for key in value), f"keys of {path or 'the state'}"
        return {p: v for key, item in value.items() for p, v in flat(item, f"{path}/{key}").items()} or {path: "{}"}
    if isinstance(value, list | tuple):
        return {p: v for i, item in enumerate(value) for p, v in flat(item, f"{path}/{i}").items()} or {path: "[]"}
    return {path: json.dumps(value, allow_nan=False)}


def carried(value: Any) -> Any:
    """A state as it comes back from disk: tensors contiguous and copied, the rest through JSON."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().clone()
    if isinstance(value, dict):
        return {key: carried(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [carried(item) for item in value]
    return json.loads(json.dumps(value))


def size_of(state: Any) -> int:
    """Bytes of a state."""
    return sum(len(v[2]) if isinstance(v, tuple) else len(v) for v in flat(state).values())
