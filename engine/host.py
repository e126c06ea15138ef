"""The model host: source model, live model and the learner's copy, on one device.

The source model never changes. The live model answers and is what adaptation changes, on one thread. Labelled
learning works on a copy of its own, and what it learned is taken over between two batches by exchanging tensor
references, so that an answer never sees half an update.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from torch import Tensor, nn

from engine.errors import PolicyFileError
from policies.interfaces import Weights, load_weights

log = structlog.get_logger("adaptd")

SUM_ERROR = 1e-4
"""Largest difference from 1 of a sum that is taken for one of probabilities."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """How the inputs of records become what the model takes.

    Attributes:
        shape: Shape of one row as the model takes it, for instance ``(3, 32, 32)``.
        dtype: Type of the values in records.
        scale: Factor applied after conversion to float32.
        offset: Added after scaling.
        channels_last: Whether records hold ``(H, W, C)`` where the model takes ``(C, H, W)``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    scale: float = 1.0
    offset: float = 0.0
    channels_last: bool = False

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Shape of one row in records."""
        return (*self.shape[1:], self.shape[0]) if self.channels_last else self.shape

    def stack(self, rows: Iterable[bytes], device: torch.device) -> Tensor:
        """Join rows of little-endian bytes into ``(B, *shape)`` float32; int64 stays int64 where the scale is 1."""
        flat = np.frombuffer(bytearray().join(rows), self.dtype)
        x = torch.from_numpy(flat.reshape(-1, *self.record_shape))
        return self.convert(x if device.type == "cpu" else x.to(device))

    def convert(self, x: Tensor) -> Tensor:
        """Turn ``(B, *record_shape)`` as records hold it into ``(B, *shape)`` as the model takes it."""
        if self.channels_last:
            x = x.movedim(-1, 1)
        if self.dtype == np.int64 and self.scale == 1.0 and self.offset == 0.0:
            return x.contiguous()
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        if self.scale != 1.0:
            x = x.mul_(self.scale)
        return x.add_(self.offset) if self.offset else x


class ModelHost:
    """Holds the models of one daemon.

    Args:
        model: What the factory built, with its weights.
        inputs: The form of the inputs.
        device: Where to compute.

    Attributes:
        source: The source model, frozen, in eval mode.
        live: The live model, in eval mode; what answers.
        learner: The copy that labelled learning works on.
        scratch: A copy that candidates are judged on.
        release: Weights of the current release.
        num_classes: ``K``.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, device: torch.device) -> None:
        self.inputs = inputs
        self.device = device
        self.source = model.to(device).eval()
        self.live = copy.deepcopy(self.source)
        self.learner = copy.deepcopy(self.source)
        self.scratch = copy.deepcopy(self.source).requires_grad_(False)
        self.source.requires_grad_(False)
        self.release: Weights = clone(self.source.state_dict())
        self.num_classes = self._probe()

    def _probe(self) -> int:
        """Answer one row of zeros to learn the number of classes, and to refuse a model that does not fit early."""
        row = self.inputs.stack([bytes(math.prod(self.inputs.shape) * self.inputs.dtype.itemsize)], self.device)
        try:
            with torch.inference_mode():
                logits = self.source(row)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise PolicyFileError(
                f"model.inputs: the model cannot take a row of shape {list(self.inputs.shape)}:"
                f" {str(error).splitlines()[0]}"
            ) from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise PolicyFileError(
                f"model.factory: the model must give logits of shape (B, K); for one row it gave {found}"
            )
        if logits.shape[1] < 2:
            raise PolicyFileError(
                f"model.factory: the model gives {logits.shape[1]} output; give two logits or more, one for each class"
                " (of a single one, x, torch.cat([torch.zeros_like(x), x], 1) makes two)"
            )
        if bool((logits >= 0).all()) and abs(float(logits.sum()) - 1) < SUM_ERROR:
            text = (
                "what the model gives looks like probabilities; leave out its last softmax, since logits are expected"
            )
            log.warning("probabilities_for_logits", text=text)
        return int(logits.shape[1])

    def predict(self, model: nn.Module, inputs: Tensor, chunk: int = 256) -> Tensor:
        """Classes ``(N,)`` int64 on the CPU that ``model`` predicts for ``inputs`` ``(N, *shape)``."""
        if not len(inputs):
            return torch.zeros(0, dtype=torch.int64)
        with torch.inference_mode():
            return torch.cat([model(part).argmax(1).cpu() for part in inputs.split(chunk)]).clone()

    def predict_with(self, weights: Weights, inputs: Tensor) -> Tensor:
        """`predict` with other weights in the scratch model."""
        load_weights(self.scratch, weights)
        return self.predict(self.scratch, inputs)


def clone(weights: Weights) -> Weights:
    """Copies that share nothing with the originals."""
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def choose_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda[:n]`` names.

    Raises:
        PolicyFileError: If the device is not there.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise PolicyFileError(f"model.device: {name} is not on this machine; use 'auto' or 'cpu'")
    return device


def trainable(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of the floating parameters that match any of the patterns ``include`` and none of ``exclude``."""

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(re.search(pattern, name) for pattern in patterns)

    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and matches(name, include) and not matches(name, exclude)
    ]
