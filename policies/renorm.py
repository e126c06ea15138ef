"""Test-time batch renormalisation: values of running statistics, gradients of the batch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.interfaces import State
from policies.norm import BlendedBatchNorm, all_finite


class RenormBatchNorm(BlendedBatchNorm):
    """BatchNorm whose values follow running statistics of the stream and whose gradients are those of the batch.

    Reference: Zhao et al., "DELTA: degradation-free fully test-time adaptation" (ICLR 2023), TBR.

    With the batch's ``mu_B, sd_B``, running ``mu_r, sd_r`` (those of the first batch at first), ``r = sd_B / sd_r`` and
    ``d = (mu_B - mu_r) / sd_r``, both without gradient, inside `Blending.active`:

        y = ((x - mu_B) / sd_B * r + d) * gamma + beta

    Forwards only note what they saw; `settle` moves ``mu_r`` and ``sd_r`` by it, a batch at a time. Outside
    `Blending.active`, and where there is one value per channel, the stored statistics are used.
    """

    def reset(self) -> None:
        """Forget the running statistics."""
        self.running: tuple[Tensor, Tensor] | None = None
        self.noted: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` channel by channel."""
        if not self.blending or x.numel() <= x.shape[1]:
            return super().forward(x)
        with torch.no_grad():
            mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
            deviation = (var + self.eps).sqrt()
            self.noted.append((mean, deviation))
            weight = torch.ones_like(mean) if self.weight is None else self.weight
            bias = torch.zeros_like(mean) if self.bias is None else self.bias
        if self.running is None:
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
        held_mean, held_deviation = self.running
        scale = weight * (deviation / held_deviation)
        shift = torch.addcmul(bias, weight, (mean - held_mean) / held_deviation)
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=self.eps)

    def settle(self, momentum: float) -> None:
        """Move the running statistics by what was noted; each keeps the share ``momentum`` of itself."""
        for mean, deviation in self.noted:
            if self.running is None:
                self.running = mean, deviation
            else:
                held_mean, held_deviation = self.running
                self.running = torch.lerp(mean, held_mean, momentum), torch.lerp(deviation, held_deviation, momentum)
        self.noted = []


class Renorms:
    """All `RenormBatchNorm` layers of a model.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: list[RenormBatchNorm]) -> None:
        self._layers = layers
        self.reset()

    def reset(self) -> None:
        """Forget the running statistics."""
        for layer in self._layers:
            layer.reset()

    def drop(self) -> None:
        """Forget what forwards noted since the last `settle`."""
        for layer in self._layers:
            layer.noted = []

    def settle(self, momentum: float) -> None:
        """Move the running statistics by what forwards noted; not at all if any of it is not finite."""
        if all_finite([tensor for layer in self._layers for noted in layer.noted for tensor in noted]):
            for layer in self._layers:
                layer.settle(momentum)
        self.drop()

    def state_dict(self) -> State:
        """The running statistics by number of the layer, not copied."""
        pairs = {str(number): layer.running for number, layer in enumerate(self._layers)}
        return {key: list(pair) for key, pair in pairs.items() if pair is not None}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of the running statistics."""
        self.reset()
        for number, layer in enumerate(self._layers):
            held: list[Tensor] | None = state.get(str(number))
            if held is not None:
                device = layer.running_mean.device
                layer.running = held[0].to(device, copy=True), held[1].to(device, copy=True)
