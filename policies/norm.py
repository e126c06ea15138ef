"""Normalisation layers: which of their parameters to adapt, and BatchNorm whose statistics follow the stream."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from policies.interfaces import MethodParams, PolicyError

NormType = Literal["batch", "layer", "group", "instance"]


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression."""


class NormSelection(MethodParams):
    """Which affine parameters adapt.

    Attributes:
        layers: Types of normalisation layer; ``layer`` includes RMSNorm.
        include: Regular expression that a layer's name must match somewhere; empty takes all.
        exclude: Regular expression that a layer's name must not match anywhere; empty excludes none.
    """

    layers: tuple[NormType, ...] = Field(default=("batch", "layer", "group"), min_length=1)
    include: Pattern = ""
    exclude: Pattern = ""

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The selected ``weight`` and ``bias`` parameters by their names in ``model.state_dict()``.

        Raises:
            PolicyError: If nothing is selected.
        """
        found: dict[str, nn.Parameter] = {}
        for name, module in model.named_modules():
            if _norm_type(module) in self.layers and self._takes(name):
                found |= {f"{name}.{key}" if name else key: p for key, p in module.named_parameters(recurse=False)}
        if not found:
            raise PolicyError(
                f"the model has no affine parameters in layers of type {', '.join(self.layers)}"
                f"{' that match include and exclude' if self.include or self.exclude else ''}: "
                "choose other layers, or a method that needs none ('lame' or 'none')"
            )
        return found

    def _takes(self, name: str) -> bool:
        return bool(re.search(self.include, name)) and not (self.exclude and re.search(self.exclude, name))


def _norm_type(module: nn.Module) -> NormType | None:
    """The type of a normalisation layer; None for any other module."""
    if isinstance(module, _BatchNorm | BlendedBatchNorm):
        return "batch"
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "layer"
    if isinstance(module, nn.GroupNorm):
        return "group"
    return "instance" if isinstance(module, _InstanceNorm) else None


@contextmanager
def only_require_grad(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Let only the named parameters require gradients inside the context, so that no other gradient is computed."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """BatchNorm of ``(B, C, ...)`` with given statistics, without gradients.

    As one scaling and shift it takes half the time of `torch.nn.functional.batch_norm` on a CPU; where ``x`` is less
    precise than the statistics, the latter alone keeps their precision.
    """
    if x.device.type != "cpu" or x.dtype != mean.dtype:
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scale = weight * torch.rsqrt(var + eps)
    return torch.addcmul(torch.addcmul(bias, mean, scale, value=-1).view(shape), x, scale.view(shape))


class _BlendedNorm(torch.autograd.Function):
    """BatchNorm with blended statistics; gradients reach the input through the batch's share of them.

    With ``n`` values per channel, ``c = n / (n - 1)`` (or 1 for biased variance), ``s = 1 / sqrt(v_t + eps)``:

        mu_t = (1 - a) mu + a mu_B,   v_t = (1 - a) v + a c v_B,   y = gamma (x - mu_t) s + beta
        dbeta = sum g,   dgamma = sum g (x - mu_t) s
        dx = g gamma s - (a / n) gamma s dbeta - (a c / n) gamma s^2 dgamma (x - mu_B)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, layer: BlendedBatchNorm
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        batch_mean, batch_var = torch.batch_norm_update_stats(x, None, None, 0.0)
        correction = count / (count - 1) if layer.unbiased else 1.0
        mean_t = torch.lerp(mean, batch_mean.to(mean.dtype), layer.share)
        var_t = torch.lerp(var, batch_var.to(var.dtype) * correction, layer.share)
        y = _normalise(x, weight, bias, mean_t, var_t, layer.eps)
        ctx.save_for_backward(x, weight, mean_t, var_t, batch_mean)
        ctx.scales = (layer.share / count, layer.share * correction / count, layer.eps)
        ctx.mark_non_differentiable(mean_t, var_t)
        return y, mean_t, var_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean_t, var_t, batch_mean = ctx.saved_tensors
        mean_scale, var_scale, eps = ctx.scales
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean_t, var_t, None, None, False, eps, [needs_x, True, True]
        )
        if needs_x:
            inverse = torch.rsqrt(var_t + eps)
            slope = -var_scale * weight * grad_weight * inverse * inverse
            offset = -mean_scale * weight * grad_bias * inverse - slope * batch_mean
            shape = (1, -1) + (1,) * (x.dim() - 2)
            grad_x.addcmul_(x, slope.view(shape).to(x.dtype)).add_(offset.view(shape).to(x.dtype))
        return grad_x if needs_x else None, grad_weight, grad_bias, None, None, None


class BlendedBatchNorm(nn.Module):
    """Stands in for a BatchNorm layer of one to three dimensions, with the same parameters and buffers.

    Outside `Blending.active` it normalises with the stored statistics, as BatchNorm in eval mode does: labelled
    learning and audits never depend on what else is in a batch. Inside, it normalises with
    ``(1 - share) * stored + share * batch`` and, with ``store``, keeps that blend as the new stored statistics.

    A batch with a single value per channel has no variance: then the stored statistics are used alone.

    Args:
        layer: The layer to stand in for; its parameters and buffers are shared, not copied.
        share: Share of the batch's statistics, in [0, 1].
        unbiased: Whether the batch's variance is the unbiased one, as in torch's running variance.
        store: Whether to keep the blend.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: _BatchNorm, *, share: float, unbiased: bool, store: bool) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = layer.num_features, layer.eps, layer.momentum
        self.share, self.unbiased, self.store = share, unbiased, store
        self.blending = False
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name in ("weight", "bias"):
            if name not in self._parameters:
                self.register_parameter(name, None)
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.train(layer.training)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"{self.num_features}, share={self.share}, unbiased={self.unbiased}, store={self.store}"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` channel by channel."""
        blending = self.blending and x.numel() > x.shape[1]
        if not blending and torch.is_grad_enabled():
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        weight = torch.ones_like(self.running_mean) if self.weight is None else self.weight
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        if not blending:
            return _normalise(x, weight, bias, self.running_mean, self.running_var, self.eps)
        if self.share == 1 and not self.unbiased and not self.store:
            # Nothing is blended: plain training-mode BatchNorm, whose backward is one fused pass.
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
        y, mean, var = _BlendedNorm.apply(x, weight, bias, self.running_mean, self.running_var, self)
        if self.store:
            # New tensors would be lost to whoever holds the buffers; a later forward never needs the old values.
            with torch.no_grad():
                self.running_mean.copy_(mean)
                self.running_var.copy_(var)
        normalised: Tensor = y
        return normalised


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a layer was found: every ``(parent, name)`` that refers to it."""

    found: _BatchNorm
    stand_in: BlendedBatchNorm
    parents: list[tuple[nn.Module, str]]


class Blending:
    """The `BlendedBatchNorm` layers of a model, put in on construction.

    BatchNorm layers without running statistics already use the batch's alone and stay as they are.

    Args:
        model: Changed in place; all names of its ``state_dict`` stay.
        share: See `BlendedBatchNorm`.
        unbiased: See `BlendedBatchNorm`.
        store: See `BlendedBatchNorm`.
        kind: What to put in: `BlendedBatchNorm` or a class derived from it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        share: float,
        unbiased: bool,
        store: bool,
        kind: type[BlendedBatchNorm] = BlendedBatchNorm,
    ) -> None:
        places: dict[int, _Place] = {}
        for path, layer in model.named_modules(remove_duplicate=False):
            if not path or not isinstance(layer, _BatchNorm) or layer.running_mean is None:
                continue
            if id(layer) not in places:
                stand_in = kind(layer, share=share, unbiased=unbiased, store=store)
                places[id(layer)] = _Place(layer, stand_in, [])
            parent, _, name = path.rpartition(".")
            places[id(layer)].parents.append((model.get_submodule(parent), name))
        self._places = list(places.values())
        for place in self._places:
            for parent, name in place.parents:
                setattr(parent, name, place.stand_in)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def layers(self) -> list[BlendedBatchNorm]:
        """The layers put in, in the order of the model."""
        return [place.stand_in for place in self._places]

    def set_share(self, share: float) -> None:
        """Change the batch's share in every layer."""
        for layer in self.layers:
            layer.share = share

    def statistics(self) -> list[Tensor]:
        """The stored means and variances of every layer, not copied."""
        return [tensor for layer in self.layers for tensor in (layer.running_mean, layer.running_var)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Blend statistics inside the context."""
        try:
            for layer in self.layers:
                layer.blending = True
            yield
        finally:
            for layer in self.layers:
                layer.blending = False

    @contextmanager
    def still(self) -> Iterator[None]:
        """Store nothing inside the context."""
        flags = [layer.store for layer in self.layers]
        try:
            for layer in self.layers:
                layer.store = False
            yield
        finally:
            for layer, flag in zip(self.layers, flags, strict=True):
                layer.store = flag

    def undo(self) -> None:
        """Put the layers that were found back, with the parameters and buffers as they are now."""
        for place in self._places:
            for name, parameter in place.stand_in.named_parameters(recurse=False):
                setattr(place.found, name, parameter)
            for name, buffer in place.stand_in.named_buffers(recurse=False):
                setattr(place.found, name, buffer)
            for parent, name in place.parents:
                setattr(parent, name, place.found)
        self._places.clear()


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every value of every tensor is finite; one device round trip."""
    return not tensors or bool(torch.cat([tensor.flatten() for tensor in tensors]).isfinite().all())


__all__ = [
    "BlendedBatchNorm",
    "Blending",
    "NormSelection",
    "NormType",
    "Pattern",
    "all_finite",
    "only_require_grad",
]
