"""Elastic weight consolidation with a streaming Fisher estimate."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from policies.interfaces import Context, LabelledBatch, MethodParams, Safeguard, State, StepKind, Weights


class EWC(Safeguard):
    """Pulls weights towards the last release, the harder the more the model's answers depend on them.

    Reference: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (2017), eq. 3; one decayed
    Fisher as in Schwarz et al., "Progress & Compress" (2018).

    Equations, with the anchor ``a``, the step size ``eta`` and ``lambda = strength``:

        F <- rho F + (1 - rho) mean_i (d/dtheta log p(y_i | x_i))^2,   used as F / (1 - rho^t), then F / mean(F)
        explicit:  loss + lambda / 2 * sum F (theta - a)^2
        proximal:  after the step, theta <- (theta + c a) / (1 + c),  c = eta lambda F

    - ``labels: sampled``: ``y_i`` drawn from the model's own answer, an unbiased estimate of the Fisher.
    - ``labels: exact``: all ``K`` classes, weighted by the model's probabilities; ``K`` times the cost.
    - ``labels: observed``: the feedback's label (the empirical Fisher; biased where the model errs).

    Shapes: as the parameters.
    State: anchor and Fisher by parameter name, how many updates and batches, and the generator that draws labels. Rows
    held for an update last from `observe` to the step that follows, and no longer.
    Deviations: the Fisher follows the stream and is estimated at the weights of a labelled step by an eval forward of
    the source's architecture; the anchor moves with the release. Gradients are taken row by row, since the square of a
    mean gradient is not the Fisher. A reset forgets the Fisher (it was taken where the model went wrong) and keeps the
    anchor. Only parameters that are stepped are pulled.
    Cost: ``rows`` forwards and backwards of one row every ``every`` labelled batches; a step is elementwise.
    """

    name = "ewc"

    class Params(MethodParams):
        """Parameters of elastic weight consolidation.

        Attributes:
            strength: ``lambda``.
            proximal: Pull after the step, which is stable for any ``strength``; else add the penalty to the loss.
            decay: ``rho``.
            normalise: Scale the Fisher to mean 1, so that ``strength`` means the same for every model.
            labels: How labels for the Fisher are found.
            rows: Rows of a labelled batch that an update takes, the first ones.
            every: Labelled batches from one update to the next.
        """

        strength: float = Field(default=1.0, ge=0)
        proximal: bool = True
        decay: float = Field(default=0.99, ge=0, lt=1)
        normalise: bool = True
        labels: Literal["sampled", "exact", "observed"] = "sampled"
        rows: int = Field(default=8, ge=1)
        every: int = Field(default=4, ge=1)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._probe = copy.deepcopy(context.source).requires_grad_(False)
        sources = {name: p.detach() for name, p in context.source.named_parameters() if p.is_floating_point()}
        self._anchor = {name: tensor.clone() for name, tensor in sources.items()}
        self._fisher = {name: torch.zeros_like(tensor) for name, tensor in sources.items()}
        self._updates = 0
        self._batches = 0
        self._pending: tuple[Tensor, Tensor] | None = None
        self._generator = torch.Generator().manual_seed(context.seed)
        self.gauges["fisher_updates"] = 0

    def observe(self, batch: LabelledBatch) -> None:
        """Hold rows for the Fisher when an update is due; the step that follows brings the weights to take it at."""
        self._pending = None
        if len(batch) == 0:
            return
        due = self._batches % self.params.every == 0
        self._batches += 1
        if not due:
            return
        usable = batch.inputs[: self.params.rows].flatten(1).isfinite().all(1).nonzero().flatten()
        if len(usable):
            self._pending = batch.inputs[usable], batch.labels[usable]

    def _update(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        """Fold the mean squared gradient of the rows into the Fisher; leave it where that is not finite."""
        leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if name in self._fisher}
        buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
        squares = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
        for row in range(len(inputs)):
            with torch.enable_grad():
                logits = functional_call(self._probe, {**leaves, **buffers}, (inputs[row : row + 1],))
            for share, label in self._labels(logits.detach()[0], labels[row]):
                loss = F.cross_entropy(logits, label[None])
                gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, materialize_grads=True)
                for square, gradient in zip(squares.values(), gradients, strict=True):
                    square.addcmul_(gradient, gradient * (share / len(inputs)))
        if not bool(torch.stack([square.isfinite().all() for square in squares.values()]).all()):
            return
        for name, square in squares.items():
            self._fisher[name].lerp_(square, 1 - self.params.decay)
        self._updates += 1
        self.gauges["fisher_updates"] = self._updates

    def _labels(self, logits: Tensor, observed: Tensor) -> list[tuple[float, Tensor]]:
        """The labels to differentiate for, each with its share."""
        if self.params.labels == "observed":
            return [(1.0, observed)]
        chances = torch.softmax(logits.cpu().double(), 0).nan_to_num(nan=0.0)
        classes = torch.arange(len(chances), device=logits.device)
        if self.params.labels == "exact":
            return list(zip(chances.tolist(), classes, strict=True))
        # The draw is made on the CPU in float64, so that every device draws the same label.
        drawn = int((chances.cumsum(0) < torch.rand((), dtype=torch.float64, generator=self._generator)).sum())
        return [(1.0, classes[min(drawn, len(classes) - 1)])]

    def _stiffness(self) -> dict[str, Tensor]:
        """``lambda F`` by parameter name; empty before the first update, or where the Fisher is zero throughout."""
        if self._updates == 0 or self.params.strength == 0:
            return {}
        scale = torch.tensor(1 - self.params.decay**self._updates, dtype=torch.float64)
        if self.params.normalise:
            total = torch.stack([fisher.sum() for fisher in self._fisher.values()]).sum()
            scale = total / sum(fisher.numel() for fisher in self._fisher.values())
        factor = torch.where(scale > 0, self.params.strength / scale, torch.zeros_like(scale)).to(self.context.device)
        return {name: fisher * factor.to(fisher.dtype) for name, fisher in self._fisher.items()}

    def penalty(self, model: nn.Module, kind: StepKind) -> Tensor | None:
        """Half the stiffness-weighted squared distance to the anchor; None in proximal form.

        A labelled step updates the Fisher first, at the weights of ``model``.
        """
        if kind is StepKind.LEARNING and self._pending is not None:
            (inputs, labels), self._pending = self._pending, None
            self._update(model, inputs, labels)
        stiffness = {} if self.params.proximal else self._stiffness()
        if not stiffness:
            return None
        terms = [
            (stiffness[name] * (p - self._anchor[name]).square()).sum()
            for name, p in model.named_parameters()
            if name in stiffness and p.requires_grad
        ]
        return torch.stack(terms).sum() / 2 if terms else None

    @torch.no_grad()
    def after_step(self, model: nn.Module, kind: StepKind, lr: float) -> None:
        """Pull what was stepped, in proximal form."""
        stiffness = self._stiffness() if self.params.proximal else {}
        for name, parameter in model.named_parameters():
            if name in stiffness and parameter.grad is not None:
                pull = stiffness[name] * lr
                parameter.lerp_(self._anchor[name], pull / (1 + pull))

    @torch.no_grad()
    def released(self, release: Weights) -> None:
        """Move the anchor to the release."""
        for name, anchor in self._anchor.items():
            anchor.copy_(release[name])

    def reset(self) -> None:
        """Forget the Fisher, which was taken at weights that are gone."""
        for fisher in self._fisher.values():
            fisher.zero_()
        self._updates = 0
        self.gauges["fisher_updates"] = 0

    def state_dict(self) -> State:
        """Anchor, Fisher, counts, and the generator."""
        return {
            "anchor": dict(self._anchor),
            "fisher": dict(self._fisher),
            "updates": self._updates,
            "batches": self._batches,
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Take over anchor, Fisher, counts and generator."""
        for name, anchor in self._anchor.items():
            anchor.copy_(state["anchor"][name])
            self._fisher[name].copy_(state["fisher"][name])
        self._updates, self._batches = int(state["updates"]), int(state["batches"])
        self._generator.set_state(state["generator"].cpu())
        self.gauges["fisher_updates"] = self._updates
