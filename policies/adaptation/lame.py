"""LAME: Laplacian adjusted maximum likelihood, a correction of the outputs alone."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from policies.features import Features
from policies.interfaces import Adaptation, Batch, Context, MethodParams

Affinity = Literal["knn", "rbf", "linear"]


class LAME(Adaptation):
    """Makes rows with similar features agree on their class; weights stay untouched.

    Reference: Boudiaf et al., "Parameter-free online test-time adaptation" (CVPR 2022).

    Equations, for probabilities ``q (B, K)`` and features ``X (B, d)`` of unit length with distances ``D``:

    - ``knn``: ``W_ij = 1`` if ``j`` is among the ``k`` nearest other rows of ``i``;
    - ``rbf``: ``W_ij = exp(-D_ij^2 / (2 s^2))`` with ``s`` the mean distance to the ``k``-th nearest row, self counted;
    - ``linear``: ``W = X X^T``.

    With ``u = -ln(q + 1e-10)`` start at ``Y = softmax(-u)`` and repeat ``Y <- softmax(-u + strength * W Y)`` at most
    ``max_iterations`` times, until ``E = sum(u Y - strength (W Y) Y + Y ln Y)`` moves by less than 1e-8 of itself. The
    answer is the logits whose softmax is ``Y``. knn affinities are not positive semi-definite, so nothing promises
    that E falls: the cap ends the loop, and ``cap_hits`` counts it.

    Features: the input of the module named ``layer``; by default that of the last `torch.nn.Linear` (one with K
    outputs, if there is one); in a model without any, what its method ``features`` returns.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``; features are flattened to ``(B, d)``.

    State: none.

    Deviations: one row is answered as it is; where all k-th distances are 0, ``rbf`` takes its limit (1 for equal
    rows, 0 for others); ``knn`` never counts a row as its own neighbour, even among duplicates. The loop runs in
    float64. Rows without finite logits or features take no part.

    Cost: one forward, ``O(B^2 d + iterations * B^2 K)``.

    Raises:
        PolicyError: If the model offers no features.
    """

    name = "lame"

    class Params(MethodParams):
        """Parameters of LAME.

        Attributes:
            affinity: How alike two rows are.
            neighbours: ``k`` of ``knn`` and ``rbf``.
            strength: Weight of agreement (lambda).
            symmetric: Whether to use ``(W + W^T) / 2``.
            max_iterations: Cap of the loop.
            layer: Name of the module whose input is the features; empty finds the classifier by itself.
        """

        affinity: Affinity = "rbf"
        neighbours: int = Field(default=5, ge=1)
        strength: float = Field(default=1.0, ge=0)
        symmetric: bool = False
        max_iterations: int = Field(default=100, ge=1)
        layer: str = ""

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._features = Features(context.model, params.layer, context.num_classes, self.name)
        self.gauges |= {"iterations": 0, "cap_hits": 0}

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        logits: Tensor = self.context.model(batch.inputs)
        features = self._features.of(batch.inputs, len(logits)).detach()
        finite = logits.isfinite().all(1) & features.isfinite().all(1)
        if bool(finite.all()):
            return self._correct(logits, features)
        logits = logits.clone()
        if bool(finite.any()):
            logits[finite] = self._correct(logits[finite], features[finite])
        return logits

    def _correct(self, logits: Tensor, features: Tensor) -> Tensor:
        """Logits ``(n, K)`` of the adjusted assignments."""
        if len(logits) == 1:
            return logits
        weights = affinity(self.params.affinity, features, self.params.neighbours)
        if self.params.symmetric:
            weights = (weights + weights.T) / 2
        adjusted, iterations, converged = adjust(
            logits.double().softmax(1), weights, self.params.strength, self.params.max_iterations
        )
        self.gauges["iterations"] = iterations
        self.gauges["cap_hits"] += not converged
        return adjusted.to(logits.dtype)

    def detach(self) -> None:
        """Remove the hook."""
        self._features.remove()


def affinity(kind: Affinity, features: Tensor, neighbours: int) -> Tensor:
    """Affinities ``(n, n)`` float64 of ``features (n, d)``, which are scaled to unit length first."""
    rows = nn.functional.normalize(features.double(), dim=1)
    if kind == "linear":
        return rows @ rows.T
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    # A model may answer equal rows of one batch with a few roundings' difference: they count as equal.
    distance[distance <= 8 * torch.finfo(features.dtype).eps] = 0
    if kind == "rbf":
        width = distance.kthvalue(min(neighbours, len(rows)), dim=1).values.mean()
        if width == 0:
            return (distance == 0).double()
        return torch.exp(-distance.square() / (2 * width * width))
    nearest = distance.fill_diagonal_(math.inf).topk(min(neighbours, len(rows) - 1), largest=False).indices
    return torch.zeros_like(distance).scatter_(1, nearest, 1.0)


def adjust(probabilities: Tensor, weights: Tensor, strength: float, max_iterations: int) -> tuple[Tensor, int, bool]:
    """Run LAME's fixed-point loop.

    Args:
        probabilities: ``q (n, K)``.
        weights: ``W (n, n)``.
        strength: Weight of agreement.
        max_iterations: Cap of the loop.

    Returns:
        ``ln Y (n, K)``, the iterations taken, and whether the loop ended by itself.
    """
    unary = -torch.log(probabilities + 1e-10)
    agreement = strength * (weights @ (-unary).softmax(1))
    energy = math.inf
    for iteration in range(1, max_iterations + 1):
        log_y = (agreement - unary).log_softmax(1)
        y = log_y.exp()
        agreement = strength * (weights @ y)
        before, energy = energy, float((y * (unary - agreement + log_y)).sum())
        if iteration > 1 and abs(energy - before) <= 1e-8 * abs(before):
            return log_y, iteration, True
    return log_y, max_iterations, False
