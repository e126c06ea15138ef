"""Linear interpolation between the release and the live weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kernels import lerp_
from policies.interfaces import AuditWindow, Context, Interpolation, MethodParams, Proposal, Weights, load_weights

CHUNK = 256
"""Rows of one forward while statistics are taken afresh."""


class Linear(Interpolation):
    """Proposes weights on the line from the live weights to the release (BCWI).

    Reference: Schumann et al., "Backward compatibility during data updates by weight interpolation" (EACL 2024).

    Equations, for every floating tensor and every ``alpha``, the share of the **old** weights:

        theta(alpha) = alpha theta_release + (1 - alpha) theta_live

    ``alpha = 0`` is the live weights and ``alpha = 1`` the release, bit for bit. Between them BatchNorm's running
    statistics are taken afresh (``batchnorm: reestimate``): the variance of mixed activations is less than the mixed
    variances. A private copy of the source's architecture with the mixed weights forgets its statistics and averages
    those of the newest ``rows`` inputs of the audit window, without their labels.

    Shapes: as the model's ``state_dict``.
    State: none.
    Deviations: sums are taken in float32 at least, and cast once. Tensors that are not floating come from the live
    weights. Tied tensors are mixed once and stay tied. Candidates are made one at a time. A window of fewer than
    ``min_rows`` interpolates statistics like weights.
    Cost: one pass over the weights a candidate; with BatchNorm one forward over ``rows`` inputs as well.
    """

    name = "linear"

    class Params(MethodParams):
        """Parameters of linear interpolation.

        Attributes:
            alphas: Shares of the old weights to propose, increasing.
            batchnorm: What becomes of running statistics.
            rows: Most inputs to take statistics from.
            min_rows: Least inputs to take statistics from.
        """

        alphas: tuple[float, ...] = Field(default=tuple(i / 10 for i in range(11)), min_length=1, max_length=101)
        batchnorm: Literal["reestimate", "interpolate"] = "reestimate"
        rows: int = Field(default=1024, ge=2)
        min_rows: int = Field(default=64, ge=2)

        @field_validator("alphas")
        @classmethod
        def _increasing_shares(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
            if list(alphas) != sorted(set(alphas)) or not 0 <= alphas[0] <= alphas[-1] <= 1:
                raise ValueError("alphas are shares of the old weights: numbers from 0 to 1, increasing, none twice")
            return alphas

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._probe: nn.Module | None = None

    def propose(self, release: Weights, live: Weights, audit: AuditWindow) -> Iterator[Proposal]:
        """Yield a candidate for every alpha; each is made when it is asked for, and owns its tensors."""
        for alpha in self.params.alphas:
            weights = mix(release, live, alpha)
            if 0 < alpha < 1:
                self._reestimate(weights, audit)
            yield Proposal(alpha, weights)

    def _reestimate(self, weights: Weights, audit: AuditWindow) -> None:
        """Take BatchNorm's running statistics afresh, in ``weights`` itself."""
        inputs = audit.inputs[-self.params.rows :]
        layers = _norms(self.context.source)
        if self.params.batchnorm == "interpolate" or not layers or len(inputs) < self.params.min_rows:
            return
        if self._probe is None:
            self._probe = copy.deepcopy(self.context.source)
        load_weights(self._probe, weights)
        measure(self._probe, inputs)
        for prefix in layers:
            for key in ("running_mean", "running_var"):
                name = f"{prefix}.{key}" if prefix else key
                weights[name].copy_(self._probe.get_buffer(name))


@torch.no_grad()
def mix(release: Weights, live: Weights, alpha: float) -> Weights:
    """``alpha`` times the release plus the rest of the live weights, in new tensors.

    Args:
        release: By the same names as ``live``.
        live: What tensors that are not floating are taken from, unless ``alpha`` is 1.
        alpha: In [0, 1]; both ends are bit for bit.
    """
    made: dict[tuple[int, int, torch.Size], Tensor] = {}
    mixed: Weights = {}
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, new in live.items():
        old = release[name]
        same = (new.data_ptr(), old.data_ptr(), new.shape)
        if same not in made or new.numel() == 0:
            made[same] = _start(old if alpha == 1 else new, widen=0 < alpha < 1)
            if 0 < alpha < 1 and new.is_floating_point():
                targets.append(made[same])
                sources.append(old.to(made[same]))
        mixed[name] = made[same]
    if targets:
        lerp_(targets, sources, alpha)
    return {name: tensor.to(live[name].dtype) for name, tensor in mixed.items()}


def _start(tensor: Tensor, *, widen: bool) -> Tensor:
    """A copy to work on, in float32 at least where the sum is taken."""
    copied = tensor.detach().clone()
    return copied.float() if widen and tensor.dtype in {torch.float16, torch.bfloat16} else copied


def _norms(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers that keep running statistics."""
    found = model.named_modules()
    return [name for name, module in found if isinstance(module, _BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def measure(model: nn.Module, inputs: Tensor) -> None:
    """Replace BatchNorm's running statistics by the average over chunks of ``inputs`` ``(N, *shape)``.

    Only BatchNorm layers leave eval mode, so dropout stays off; afterwards all of them are as they were.
    """
    layers = [module for name in _norms(model) if isinstance(module := model.get_submodule(name), _BatchNorm)]
    before = [(layer.momentum, layer.training) for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.training = True
    for chunk in inputs.chunk(-(-len(inputs) // CHUNK)):
        model(chunk)
    for layer, (momentum, training) in zip(layers, before, strict=True):
        layer.momentum, layer.training = momentum, training
