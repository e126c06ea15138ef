"""BatchNorm statistics from the stream: BN-1, alpha-BN, prior strength and EMA-BN."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from policies.interfaces import Adaptation, Batch, Context, MethodParams, PolicyError
from policies.norm import Blending, all_finite


class BatchNormAdaptation(Adaptation):
    """Blends the stored BatchNorm statistics with those of each batch; no gradients.

    Reference: Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation"
    (NeurIPS 2020); Nado et al., "Evaluating prediction-time batch normalization" (2020).

    Equations, per channel, with ``n`` values in the batch, ``mu_B`` and unbiased ``v_B``:

        mu = (1 - a) mu_s + a mu_B,   v = (1 - a) v_s + a v_B,   y = gamma (x - mu) / sqrt(v + eps) + beta

    - ``mode: alpha``: ``a = alpha``. With ``alpha: 1`` (BN-1) the variance is the biased one, as in a forward of
      BatchNorm in training mode.
    - ``mode: prior``: ``a = B / (prior_strength + B)`` for ``B`` rows.
    - ``mode: ema``: ``a = momentum``, and the blend becomes the stored statistics.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``.
    State: none of its own; ``ema`` moves the live model's statistics.
    Deviations: ``ema`` takes one forward where others take two: each layer measures activations that the layers
    before it normalised with their updated statistics. A batch whose statistics are not finite moves nothing.
    A layer that sees one value per channel uses the stored statistics.
    Cost: one forward.

    Raises:
        PolicyError: If the model has no BatchNorm layer with running statistics.
    """

    name = "bn"

    class Params(MethodParams):
        """Parameters of BatchNorm adaptation.

        Attributes:
            mode: How the batch's share follows from the parameters below.
            alpha: The batch's share in mode ``alpha``, in [0, 1].
            prior_strength: How many rows the stored statistics are worth in mode ``prior``.
            momentum: The batch's share in mode ``ema``, in (0, 1].
        """

        mode: Literal["alpha", "prior", "ema"] = "alpha"
        alpha: float = Field(default=0.1, ge=0, le=1)
        prior_strength: float = Field(default=16, ge=0)
        momentum: float = Field(default=0.1, gt=0, le=1)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._blending = Blending(
            context.model,
            share=params.momentum if params.mode == "ema" else params.alpha,
            unbiased=params.mode != "alpha" or params.alpha < 1,
            store=params.mode == "ema",
        )
        if not len(self._blending):
            raise PolicyError(
                "adaptation 'bn' does nothing for this model: it has no BatchNorm layer with running statistics; "
                "choose 'tent', 'lame' or 'none'"
            )
        self.gauges |= {"layers": len(self._blending), "batches_rejected": 0}

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        if self.params.mode == "prior":
            self._blending.set_share(len(batch) / (self.params.prior_strength + len(batch)))
        before = [t.clone() for t in self._blending.statistics()] if self.params.mode == "ema" else []
        with self._blending.active():
            logits: Tensor = self.context.model(batch.inputs)
        if before and not all_finite(self._blending.statistics()):
            for tensor, old in zip(self._blending.statistics(), before, strict=True):
                tensor.copy_(old)
            self.gauges["batches_rejected"] += 1
        return logits

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._blending.undo()
