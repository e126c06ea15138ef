"""FOA's activation shift: features moved back to where those of the source were."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from policies.features import HeadAdaptation, HeadParams
from policies.interfaces import Batch, Context, PolicyError, State


class FOA(HeadAdaptation):
    """Adds to the features what their running mean lacks to the source's; forward passes alone, weights untouched.

    Reference: Niu et al., "Test-time model adaptation with only forward passes" (ICML 2024), its activation shift
    alone.

    Equations, with the source's mean feature ``mu_s (d,)``, the running one ``mu`` and the classifier's weight ``W``:

        h <- h + strength (mu_s - mu),   so z <- z + strength W (mu_s - mu);   then mu <- (1 - momentum) mu + momentum
        mean_i h_i

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``; features are flattened to ``(B, d)``.

    State: both means ``(d,)`` and how many rows they saw.

    Deviations: left out are the prompts and their search (28 forwards a batch of 64): they go into a vision
    transformer's sequence, which other models have not, and the spread of features is only a term of that search's
    fitness. ``mu_s`` is the buffer ``feature_mean (d,)`` of the source model where it has one; else the mean over the
    first ``reference_rows`` rows of the stream, before which nothing is shifted. ``momentum`` is meant for ``window``
    rows, whatever the batches: one of ``B`` rows moves ``mu`` by ``1 - (1 - momentum)^(B / window)``; over the first
    ``window`` rows ``mu`` is the plain mean and nothing is shifted, as in the original over the first batch. What
    labelled learning does to the mean feature is undone as drift is. Rows without finite logits or features do not
    count, nor those with features 30 times as long as is usual in their batch.

    Cost: one forward and ``O(B d + d K)``.

    Raises:
        PolicyError: If the classifier is not linear with K outputs, or ``feature_mean`` does not fit it.
    """

    name = "foa"

    class Params(HeadParams):
        """Parameters of FOA.

        Attributes:
            strength: Share of the difference that is added.
            momentum: Share of ``window`` rows in the running mean.
            window: Rows that ``momentum`` is meant for.
            reference_rows: Rows of the stream that stand for the source, where the model has no ``feature_mean``.
        """

        strength: float = Field(default=1.0, ge=0)
        momentum: float = Field(default=0.1, gt=0, le=1)
        window: int = Field(default=64, ge=1)
        reference_rows: int = Field(default=512, ge=1)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        given = getattr(context.source, "feature_mean", None)
        width = self._head.in_features
        if given is not None and given.shape != (width,):
            self._features.remove()
            raise PolicyError(
                f"adaptation 'foa': the model's feature_mean is {tuple(given.shape)} where the classifier takes "
                f"{width} features; give it that shape, or choose 'lame' or 'none'"
            )
        self._given: Tensor | None = given
        self._forget()

    def _forget(self) -> None:
        width, device = self._head.in_features, self.context.device
        self._source = torch.zeros(width, dtype=torch.float64, device=device)
        self._running = torch.zeros_like(self._source)
        self._rows = 0
        self._reference = 0
        if self._given is not None:
            self._source.copy_(self._given)
            self._reference = self.params.reference_rows
        self.gauges |= {"shift": 0.0, "reference_rows": self._reference}

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        logits: Tensor = self.context.model(batch.inputs)
        features = self._features.of(batch.inputs, len(logits))
        answer = logits
        if self._rows >= self.params.window and self._reference >= self.params.reference_rows:
            shift = self.params.strength * (self._source - self._running)
            self.gauges["shift"] = float(shift.norm())
            answer = logits + self._head.weight @ shift.to(self._head.weight.dtype)
        usable = logits.isfinite().all(1) & features.isfinite().all(1)
        self._see(_usual(features[usable].double()))
        return answer

    def _see(self, features: Tensor) -> None:
        """Move the means by features ``(n, d)``."""
        count = len(features)
        if count == 0:
            return
        mean = features.mean(0)
        if self._reference < self.params.reference_rows:
            self._reference += count
            self._source.lerp_(mean, count / self._reference)
            self.gauges["reference_rows"] = self._reference
        plain = self._rows < self.params.window
        self._rows += count
        share = count / self._rows if plain else 1 - (1 - self.params.momentum) ** (count / self.params.window)
        self._running.lerp_(mean, share)

    def state_dict(self) -> State:
        """Both means and their rows."""
        return {"source": self._source, "running": self._running, "rows": self._rows, "reference": self._reference}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self._source.copy_(state["source"])
        self._running.copy_(state["running"])
        self._rows, self._reference = int(state["rows"]), int(state["reference"])
        self.gauges["reference_rows"] = self._reference


def _usual(features: Tensor) -> Tensor:
    """The rows of ``(n, d)`` that are not 30 times as long as most: one of these in the mean would outweigh all."""
    lengths = features.norm(dim=1)
    return features[lengths <= 30 * lengths.median()] if len(features) else features
