"""ROID: a weighted likelihood ratio, consistency under augmentation, and weights kept near the source's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import lerp_, softmax_entropy
from policies.augment import Augmentation, augment
from policies.gradient import Anchor, Anchored, GradientAdaptation, GradientParams
from policies.interfaces import Context, State


class ROID(Anchored, GradientAdaptation):
    """Adapts to certain and diverse rows, keeps near the source weights, and corrects answers by the batch's classes.

    Reference: Marsden et al., "Universal test-time adaptation through weight ensembling, diversity weighting, and prior
    correction" (WACV 2024).

    Equations, per batch, with a running mean ``m`` of probabilities (uniform at first):

    - diversity ``d_i = 1 - cos(m, p_i)`` and certainty ``c_i = -H_i``, each scaled to [0, 1] over the batch;
      ``w_i = exp(d_i c_i / temperature)``, 0 where ``d_i < mean d``; ``m <- 0.9 m + 0.1 mean p``;
    - ``SLR_i = -sum_k p_k ln(p_k / (1 - p_k) + 1e-5)`` with ``p`` at most 0.99;
    - ``L = (1 / B) sum_i w_i (SLR_i + SCE(z~_i, z_i))`` with ``z~`` the logits of a mildly augmented view and
      ``SCE(a, b) = (CE(b, a) + CE(a, b)) / 2``, gradients through both;
    - after the step ``phi <- (1 - pull) phi + pull phi_s``;
    - the answer is ``ln p_i + prior_weight ln pi`` with ``pi = (pbar + g) / (1 + g K)``, ``pbar = mean_i p_i`` and
      ``g = max(1 / B, 1 / K) / max_k pbar_k``.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step with the prior's logarithm added.

    State: ``m (K,)``, the anchor ``phi_s``, the generator, the optimizer's moments, and the inputs of batches answered
    but not yet adapted to.

    Deviations: as of `policies.adaptation.tent.Tent`. The prior multiplies probabilities, not logits, whose sign would
    turn its effect around. A ``prior_weight`` of 1 is the equation of the paper; more leans further to the classes of
    the batch. Where all rows are equally diverse, or equally certain, that factor is 1 for all (one row, for
    instance). ``phi_s`` moves along with labelled learning. The view: see `policies.augment.strong_image` at half
    strength.

    Cost: one forward on the batch, one on the rows of positive weight, and a backward through both.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "roid"

    class Params(GradientParams):
        """Parameters of ROID.

        Attributes:
            temperature: Of the weights; lower means sharper.
            pull: Share of the source weights taken on after each step.
            prior_correction: Whether to correct answers by the classes of the batch.
            prior_weight: Power of the prior that does so.
            consistency: Whether to learn from augmented views too.
            augmentation: How the view is made, see `policies.augment.augment`.
            strength: Of the augmentation ``image``.
            image_noise: Standard deviation of the pixel noise of ``image``.
            noise: Standard deviation of ``noise`` in units of each feature's own.
        """

        temperature: float = Field(default=1 / 3, gt=0)
        pull: float = Field(default=0.01, ge=0, le=1)
        prior_correction: bool = True
        prior_weight: float = Field(default=1.0, ge=0)
        consistency: bool = True
        augmentation: Augmentation = "auto"
        strength: float = Field(default=0.5, ge=0, le=1)
        image_noise: float = Field(default=0.005, ge=0)
        noise: float = Field(default=0.05, ge=0)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._anchor = Anchor(context, self.adapted)
        self._generator = torch.Generator(context.device).manual_seed(context.seed)
        self._mean = torch.full((context.num_classes,), 1 / context.num_classes, device=context.device)
        self.gauges["kept_ratio"] = 0.0

    def _answer(self, logits: Tensor) -> Tensor:
        return corrected(logits, self.params.prior_weight) if self.params.prior_correction else logits

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        probabilities = logits.softmax(1)
        with torch.no_grad():
            entropy = softmax_entropy(logits).entropy
            weights = diversity_weights(self._mean, probabilities, entropy, self.params.temperature)
            self._mean = torch.lerp(self._mean, probabilities.mean(0), 0.1)
            keep = weights.nonzero().flatten()
        self.gauges["kept_ratio"] = len(keep) / len(logits)
        losses = likelihood_ratio(probabilities[keep])
        if self.params.consistency:
            losses = losses + symmetric_cross_entropy(self._forward(self._view(inputs[keep])), logits[keep])
        finite = losses.detach().isfinite()
        return (weights[keep] * torch.where(finite, losses, 0)).sum() / len(logits)

    def _view(self, inputs: Tensor) -> Tensor:
        """A mildly augmented copy."""
        return augment(
            self.params.augmentation,
            inputs,
            self._generator,
            image_noise=self.params.image_noise,
            noise=self.params.noise,
            strength=self.params.strength,
        )

    def _stepped(self) -> None:
        names = list(self._named)
        lerp_([self._named[n].data for n in names], [self._anchor.values[n] for n in names], self.params.pull)

    def reset(self) -> None:
        """Return to the source model and forget everything."""
        super().reset()
        self._generator.manual_seed(self.context.seed)
        self._mean = torch.full_like(self._mean, 1 / len(self._mean))

    def state_dict(self) -> State:
        """Anchor, running mean and generator beside what every gradient method holds."""
        return super().state_dict() | {"mean": self._mean, "generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"].cpu())
        self._mean = state["mean"].to(self.context.device, copy=True)


def diversity_weights(mean: Tensor, probabilities: Tensor, entropy: Tensor, temperature: float) -> Tensor:
    """Weights ``(n,)`` of ROID for ``probabilities (n, K)`` with their ``entropy (n,)``; 0 for rows left out."""
    diversity = _scaled(1 - F.cosine_similarity(probabilities, mean[None].to(probabilities.dtype)))
    certainty = _scaled(-entropy)
    weights = torch.exp(diversity * certainty / temperature)
    return weights * (diversity >= diversity.mean())


def _scaled(scores: Tensor) -> Tensor:
    """Scores ``(n,)`` moved and scaled to [0, 1]; 1 for all where they are all the same."""
    low, high = scores.aminmax()
    wide = high - low > 1e-6
    return torch.where(wide, (scores - low) / torch.where(wide, high - low, 1), torch.ones_like(scores))


def likelihood_ratio(probabilities: Tensor) -> Tensor:
    """Soft likelihood ratio loss ``(n,)`` of ``probabilities (n, K)``."""
    clipped = probabilities.clamp(max=0.99)
    return -(clipped * torch.log(clipped / (1 - clipped) + 1e-5)).sum(1)


def symmetric_cross_entropy(one: Tensor, two: Tensor) -> Tensor:
    """Mean ``(n,)`` of the cross-entropies of two sets of logits ``(n, K)`` with each other as the target."""
    ln_one, ln_two = one.log_softmax(1), two.log_softmax(1)
    return -0.5 * (ln_two.exp() * ln_one + ln_one.exp() * ln_two).sum(1)


def corrected(logits: Tensor, weight: float = 1.0) -> Tensor:
    """Logits ``(n, K)`` with ``weight`` times the logarithm of the smoothed mean probability added.

    Rows that are not finite stay as they are and leave others alone.
    """
    finite = logits.isfinite().all(1, keepdim=True)
    probabilities = torch.where(finite, logits, 0).softmax(1) * finite
    rows = finite.sum().clamp(min=1)
    mean = probabilities.sum(0) / rows
    classes = logits.shape[1]
    smooth = (1 / rows).clamp(min=1 / classes) / mean.max().clamp(min=1 / classes)
    return logits + weight * torch.log((mean + smooth) / (1 + smooth * classes))
