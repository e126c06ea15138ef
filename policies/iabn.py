"""BatchNorm whose running statistics follow training-mode forwards, and its instance-aware form."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.norm import BlendedBatchNorm


class TrackingBatchNorm(BlendedBatchNorm):
    """BatchNorm as in training, inside `Blending.active`: normalises with the batch, and moves the stored statistics.

    With ``store`` the stored statistics move by ``share`` towards the batch's (unbiased variance), as torch's own do.
    Where there is one value per channel, and outside, the stored statistics are used.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` channel by channel."""
        if not self.blending or x.numel() <= x.shape[1]:
            return super().forward(x)
        mean, var = (self.running_mean, self.running_var) if self.store else (None, None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=self.share, eps=self.eps)


class InstanceAwareBatchNorm(TrackingBatchNorm):
    """BatchNorm that corrects a row where its own statistics are too far off (IABN).

    Reference: Gong et al., "NOTE: robust continual test-time adaptation against temporal correlation" (NeurIPS 2022).

    With ``mu_b, v_b`` of the batch inside `Blending.active` and the stored ones outside, ``mu, s2`` (unbiased) of one
    row and channel over ``L`` positions, ``psi(x, l) = sign(x) max(|x| - l, 0)`` and ``k`` standard errors:

        mu' = mu_b + psi(mu - mu_b, k sqrt((v_b + eps) / L)),   v' = max(0, v_b + psi(s2 - v_b, k (v_b + eps) sqrt(2 /
        (L - 1)))) y = gamma (x - mu') / sqrt(v' + eps) + beta

    Rows of one position are not corrected.
    """

    k = 4.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` row by row and channel by channel."""
        places = math.prod(x.shape[2:])
        if places <= 1:
            return super().forward(x)
        mean, var = self._of_the_batch(x) if self.blending else (self.running_mean, self.running_var)
        own_mean, own_var = row_statistics(x)
        own_var = own_var * (places / (places - 1))
        mean_t = mean + shrunk(own_mean - mean, self.k * ((var + self.eps) / places).sqrt())
        var_t = (var + shrunk(own_var - var, self.k * (var + self.eps) * math.sqrt(2 / (places - 1)))).clamp(min=0)
        scale = torch.rsqrt(var_t + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean_t * scale
        shift = shift if self.bias is None else shift + self.bias
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x, scale.view(shape))

    def _of_the_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the batch, which also move the stored ones."""
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x, dims, correction=0)
        if self.store:
            count = x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.share)
                self.running_var.lerp_(var * (count / (count - 1)), self.share)
        return mean, var


def shrunk(values: Tensor, limits: Tensor) -> Tensor:
    """Values moved towards 0 by ``limits``, and 0 where they are within."""
    return values.sign() * (values.abs() - limits).clamp(min=0)


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(B, C)`` of every row and channel of ``(B, C, ...)`` over its positions."""
    if torch.is_grad_enabled():
        var, mean = torch.var_mean(x.flatten(2), dim=2, correction=0)
        return mean, var
    # The kernel of BatchNorm's statistics, with rows and channels as its channels, takes a third of the time.
    mean, var = torch.batch_norm_update_stats(x.reshape(1, x.shape[0] * x.shape[1], -1), None, None, 0.0)
    return mean.view(x.shape[:2]), var.view(x.shape[:2])
