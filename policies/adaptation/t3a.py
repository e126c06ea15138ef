"""T3A: class templates of the classifier adjusted by sure features of the stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.features import HeadAdaptation, HeadParams
from policies.interfaces import Batch, Context, State


class T3A(HeadAdaptation):
    """Classifies by the mean direction of each class's surest features; weights stay untouched.

    Reference: Iwasawa & Matsuo, "Test-time classifier adjustment module for model-agnostic domain generalization"
    (NeurIPS 2021).

    Equations, for features ``h (B, d)`` and a linear classifier ``W (K, d), b``: each row of ``W`` is a template of the
    class that the classifier gives it. Every feature joins the supports of the class of its logits ``W h + b`` with
    their entropy; of each class the ``supports`` of least entropy stay. Then

        c_k = normalise(sum of s / ||s|| over templates and supports s of class k),   z_k = <h, c_k>

    Shapes: inputs ``(B, *shape)`` to scores ``(B, K)``, which are not calibrated; features are flattened.

    State: supports ``(n, d)`` with class and entropy, ``n <= supports * K``.

    Deviations: templates never leave, so that sure but wrong features cannot drive a class out; they are the live
    classifier's and follow labelled learning, and do not count among the ``supports``. Keeping all supports for ever is
    not offered. Equally sure supports: the older stays. Rows without finite logits or features join nothing.

    Cost: one forward and a sort.

    Raises:
        PolicyError: If the classifier is not linear with K outputs.
    """

    name = "t3a"

    class Params(HeadParams):
        """Parameters of T3A.

        Attributes:
            supports: How many to keep of each class.
        """

        supports: int = Field(default=20, ge=1)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._forget()

    def _forget(self) -> None:
        weight = self._head.weight.detach()
        self._supports = weight.new_zeros(0, weight.shape[1])
        self._classes = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self._entropies = weight.new_zeros(0)
        self.gauges["supports"] = 0

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        logits: Tensor = self.context.model(batch.inputs)
        features = self._features.of(batch.inputs, len(logits)).to(self._supports.dtype)
        entropy, _, label = softmax_entropy(logits)
        # A feature of length 0 has no direction.
        usable = logits.isfinite().all(1) & features.isfinite().all(1) & (features != 0).any(1)
        self._join(features[usable], label[usable], entropy[usable].to(self._entropies.dtype))
        return features @ self._centres().T

    def _join(self, features: Tensor, labels: Tensor, entropies: Tensor) -> None:
        """Add rows; keep the surest of each class."""
        entropies, labels = torch.cat([self._entropies, entropies]), torch.cat([self._classes, labels])
        kept = surest(labels, entropies, self.params.supports, self.context.num_classes)
        self._supports = torch.cat([self._supports, F.normalize(features, dim=1)])[kept]
        self._classes, self._entropies = labels[kept], entropies[kept]
        self.gauges["supports"] = len(kept)

    def _centres(self) -> Tensor:
        """Unit centres ``(K, d)``."""
        templates = self._head.weight
        classes = self._head(templates).argmax(1)
        centres = torch.zeros_like(templates).index_add_(0, classes, F.normalize(templates, dim=1))
        return F.normalize(centres.index_add_(0, self._classes, self._supports), dim=1)

    def state_dict(self) -> State:
        """The supports, their classes and entropies."""
        return {"supports": self._supports, "classes": self._classes, "entropies": self._entropies}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        device = self.context.device
        self._supports = state["supports"].to(device, copy=True)
        self._classes = state["classes"].to(device, copy=True)
        self._entropies = state["entropies"].to(device, copy=True)
        self.gauges["supports"] = len(self._supports)


def surest(labels: Tensor, entropies: Tensor, count: int, num_classes: int) -> Tensor:
    """Indices, in rising order, of the ``count`` rows of least entropy of each class; of equal ones the earlier."""
    order = entropies.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by class, then by entropy, then by place
    sizes = torch.bincount(labels, minlength=num_classes)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(order), device=order.device) - starts[labels[order]]
    return order[rank < count].sort().values
