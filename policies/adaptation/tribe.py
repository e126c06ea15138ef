"""TRIBE: balanced BatchNorm, and three networks that keep each other honest."""

from __future__ import annotations

import copy
import logging
import math
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels import softmax_entropy
from policies.augment import ViewParams
from policies.balanced import BalancedBatchNorm, overall
from policies.interfaces import Adaptation, Batch, Context, Outcome, State, StepKind, Weights, load_weights
from policies.memory import fastest
from policies.norm import Blending, NormSelection, all_finite, only_require_grad
from policies.optimizers import Adam, load_optimizer_state, optimizer_state
from policies.teachers import follow
from policies.waiting import Waiting

_log = logging.getLogger(__name__)


class TRIBE(Adaptation):
    """Self-training on sure rows with statistics that count every class alike, held back by a frozen network.

    Reference: Su et al., "Towards real-world test-time adaptation: tri-net self-training with balanced normalization"
    (AAAI 2024).

    Equations: the live model answers with its stored statistics, which gives pseudo-labels ``y``. Then, all with
    `policies.balanced.BalancedBatchNorm` under ``y`` and statistics of their own: the live model on the inputs
    (``z``), the live model on a strongly augmented view (``z~``, the student) and a copy of the source (``z_s``, the
    anchor) on the inputs; with ``M = {i: H(answer_i) < margin ln K}``

        L = mean_{i in M} CE(y_i, z~_i) + anchor * mean_{i in M, k} (z_ik - z_s,ik)^2

    and one Adam step. The statistics of the first pass become the stored ones.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step.

    State: statistics of each class for three passes (``6 K C`` numbers for a layer of ``C`` channels), the anchor,
    Adam's moments, the generator, and inputs and answers not yet adapted to.

    Deviations: no class-independent share in the statistics. Without a sure row there is no step, but statistics move.
    Statistics that are not finite are put back. Rows without finite answers are left out. The anchor's weights move
    along with labelled learning. Every batch answered since the last `update` makes a step of its own. Without
    BatchNorm layers the loss alone remains.

    Cost: four forwards, one backward through two of them. Memory: a second model.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "tribe"

    class Params(NormSelection, ViewParams):
        """Parameters of TRIBE.

        Attributes:
            eta: Share of one row in the statistics of its class; ``max(0.0005 K, 0.01)`` is a good guess.
            margin: Entropy in units of ``ln K`` below which a row is sure: 0.05 suits 10 classes, 0.2 a hundred, 0.4 a
                thousand.
            anchor: Weight of the distance to the anchor's logits.
            lr: Adam's learning rate.
        """

        eta: float = Field(default=0.01, gt=0, le=1)
        margin: float = Field(default=0.05, gt=0, le=1)
        anchor: float = Field(default=0.5, ge=0)
        lr: float = Field(default=1e-3, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._named = params.parameters(context.model)
        self.adapted = frozenset(self._named)
        self._anchor_model = copy.deepcopy(context.source).requires_grad_(False)
        self._live, self._anchor = self._balanced(context.model), self._balanced(self._anchor_model)
        self._optimizer = Adam(self._named.values(), lr=params.lr)
        self._generator = torch.Generator(context.device).manual_seed(context.seed)
        self._limit = params.margin * math.log(context.num_classes)
        self._waiting = Waiting()
        self._forget()
        values = sum(p.numel() for p in self._named.values())
        _log.info("tribe adapts %d values in %d parameters", values, len(self._named))
        self.gauges |= {"adapted_values": values, "kept_ratio": 0.0, "loss": 0.0, "rows_rejected": 0}

    def _balanced(self, model: nn.Module) -> Blending:
        """Put balanced layers into a model."""
        blending = Blending(model, share=0.0, unbiased=False, store=False, kind=BalancedBatchNorm)
        for layer in _layers(blending):
            layer.eta = self.params.eta
        return blending

    def _forget(self) -> None:
        fresh = [layer.fresh(self.context.num_classes) for layer in _layers(self._live)]
        self._local = {which: [tensor.clone() for tensor in fresh] for which in ("live", "student", "anchor")}
        self._waiting.clear()

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        inputs = fastest(batch.inputs)
        logits: Tensor = self.context.model(inputs)
        self._waiting.add(inputs, logits)
        return logits

    def update(self) -> Outcome | None:
        """Step on every batch answered since the last call."""
        outcome = None
        for inputs, answered in self._waiting.take():
            finite = answered.isfinite().all(1)
            kept = int(finite.sum())
            self.gauges["rows_rejected"] += len(answered) - kept
            if kept:
                outcome = self._step(
                    *((inputs, answered) if kept == len(answered) else (inputs[finite], answered[finite]))
                )
        return outcome

    def _step(self, inputs: Tensor, answered: Tensor) -> Outcome:
        """Move the statistics and step; statistics that are not finite are put back."""
        held = [tensor for tensors in self._local.values() for tensor in tensors]
        before = [tensor.clone() for tensor in held]
        loss = self._loss(inputs, answered)
        if not all_finite(held):
            for tensor, old in zip(held, before, strict=True):
                tensor.copy_(old)
            return Outcome(applied=False, reason="nonfinite_statistics")
        for layer, local in zip(self._live.layers, self._local["live"], strict=True):
            mean, var = overall(local)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
        if loss is None:
            return Outcome(applied=False, reason="empty")
        outcome = self.context.stepper.step(self.context.model, self._optimizer, loss, StepKind.ADAPTATION)
        self.gauges["loss"] = float(loss.detach())
        return outcome

    def _loss(self, inputs: Tensor, answered: Tensor) -> Tensor | None:
        """The loss, or None where no row is sure; all three passes move their statistics."""
        entropy, _, labels = softmax_entropy(answered)
        sure = entropy < self._limit
        kept = int(sure.sum())
        self.gauges["kept_ratio"] = kept / len(inputs)
        view = self.params.view(inputs, self._generator)
        with torch.set_grad_enabled(kept > 0), only_require_grad(self.context.model, self.adapted):
            live = self._pass(self.context.model, self._live, "live", inputs, labels)
            student = self._pass(self.context.model, self._live, "student", view, labels)
            with torch.no_grad():
                anchor = self._pass(self._anchor_model, self._anchor, "anchor", inputs, labels)
            if kept == 0:
                return None
            distance = (live[sure] - anchor[sure]).square().mean()
            return F.cross_entropy(student[sure], labels[sure]) + self.params.anchor * distance

    def _pass(self, model: nn.Module, blending: Blending, which: str, inputs: Tensor, labels: Tensor) -> Tensor:
        """Logits of a forward that uses and moves the statistics of one of the three networks."""
        for layer, local in zip(_layers(blending), self._local[which], strict=True):
            layer.local, layer.labels = local, labels
        with blending.active():
            logits: Tensor = model(inputs)
        return logits

    def learned(self, before: Weights, after: Weights) -> None:
        """Move the anchor as the live weights were moved."""
        follow(self._anchor_model, self.adapted, before, after)

    def reset(self) -> None:
        """Return to the source model and forget everything."""
        super().reset()
        load_weights(self._anchor_model, self.context.source.state_dict())
        self._optimizer.state.clear()
        self._generator.manual_seed(self.context.seed)
        self._forget()

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._live.undo()

    def state_dict(self) -> State:
        """Statistics, anchor, optimizer, generator, and what waits."""
        return {
            "local": {which: list(tensors) for which, tensors in self._local.items()},
            "anchor": self._anchor_model.state_dict(),
            "optimizer": optimizer_state(self._optimizer, self._named),
            "generator": self._generator.get_state(),
            "waiting": self._waiting.state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        load_weights(self._anchor_model, state["anchor"])
        load_optimizer_state(self._optimizer, self._named, state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        for which, tensors in self._local.items():
            for tensor, held in zip(tensors, state["local"][which], strict=True):
                tensor.copy_(held)
        self._waiting.load(state["waiting"], self.context.device)


def _layers(blending: Blending) -> list[BalancedBatchNorm]:
    return cast("list[BalancedBatchNorm]", blending.layers)
