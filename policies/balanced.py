"""BatchNorm whose statistics count every class alike, however skewed a batch is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.iabn import row_statistics
from policies.norm import BlendedBatchNorm


class BalancedBatchNorm(BlendedBatchNorm):
    """BatchNorm with statistics of each class, of which every class has the same share in what normalises.

    Reference: Su et al., "Towards real-world test-time adaptation: tri-net self-training with balanced normalization"
    (AAAI 2024), without the class-independent share of an update.

    Inside `Blending.active`, with ``n_k`` rows of class ``k`` in the batch, ``a_i`` the mean of row ``i`` over
    positions and ``u_i`` its biased variance, per channel: ``m_k = min(eta, 1 / n_k)`` and

        D_k = m_k sum_{i of k} (a_i - mu_k),   S_k = sum_{i of k} (u_i + (a_i - mu_k)^2)
        v_k <- v_k + m_k (S_k - n_k v_k) - D_k^2,   mu_k <- mu_k + D_k
        mu = mean_k mu_k,   v = mean_k v_k + var_k mu_k      (unbiased over classes, as the original has it)

    and the batch is normalised with ``mu, v``, through which no gradient flows. Outside, the stored statistics are
    used. Set `eta`, `labels` ``(B,)`` and `local` ``(2, K, C)``, which is changed in place, before.
    """

    eta: float
    labels: Tensor
    local: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` channel by channel."""
        if not self.blending:
            return super().forward(x)
        with torch.no_grad():
            move(self.local, x, self.labels, self.eta)
            mean, var = overall(self.local)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    def fresh(self, classes: int) -> Tensor:
        """Means and variances ``(2, K, C)`` that are the stored ones for every class."""
        return torch.stack([self.running_mean, self.running_var])[:, None].repeat(1, classes, 1).detach()


@torch.no_grad()
def move(local: Tensor, x: Tensor, labels: Tensor, eta: float) -> None:
    """Move statistics ``local (2, K, C)`` in place by a batch ``x (B, C, ...)`` of classes ``labels (B,)``."""
    means, variances = local
    centre, spread = row_statistics(x.to(local.dtype))
    counts = torch.bincount(labels, minlength=local.shape[1]).to(local.dtype)[:, None]
    step = (1 / counts.clamp(min=1)).clamp(max=eta)
    offset = centre - means[labels]
    shift = step * torch.zeros_like(means).index_add_(0, labels, offset)
    squares = torch.zeros_like(variances).index_add_(0, labels, spread + offset.square())
    variances.add_(step * (squares - counts * variances) - shift.square()).clamp_(min=0)
    means.add_(shift)


def overall(local: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``(C,)`` of all classes together, each with the same share."""
    means, variances = local
    between = means.var(0) if len(means) > 1 else torch.zeros_like(means[0])
    return means.mean(0), variances.mean(0) + between
