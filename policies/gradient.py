"""What methods share that answer a batch and adapt to it by the gradient of the same forward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from policies.interfaces import Adaptation, Batch, Context, Outcome, State, StepKind, Weights
from policies.memory import fastest
from policies.norm import BlendedBatchNorm, Blending, NormSelection, only_require_grad
from policies.optimizers import SGD, Adam, load_optimizer_state, optimizer_state

EMPTY = "empty"
"""No row was worth a step; momentum must not move weights then."""

_log = logging.getLogger(__name__)


class GradientParams(NormSelection):
    """Which parameters adapt, and by which optimizer.

    Attributes:
        optimizer: ``adam`` (betas 0.9 and 0.999) or ``sgd`` (momentum 0.9).
        lr: Learning rate; 1e-3 suits Adam and batches of 200, 2.5e-4 SGD and batches of 64.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = Field(default=1e-3, ge=0)

    def built(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over ``parameters``."""
        if self.optimizer == "adam":
            return Adam(parameters, lr=self.lr)
        return SGD(parameters, lr=self.lr, momentum=0.9)


class GradientAdaptation(Adaptation):
    """Base of methods whose answer and gradient come from one forward, over normalisation layers' parameters.

    A method gives `_loss`; it may also change what is answered (`_answer`) and what follows an applied step
    (`_stepped`). BatchNorm layers normalise with the statistics of the batch (BN-1) while the method answers or adapts.

    Rows without finite logits never reach `_loss`. Batches answered between two calls of `update` make one step, on all
    their rows. After a restart, or once labelled learning has moved weights, waiting batches go through the model
    again.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    params: GradientParams

    def __init__(self, params: GradientParams, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._named = params.parameters(context.model)
        self.adapted = frozenset(self._named)
        self._blending = Blending(context.model, share=1.0, unbiased=False, store=False, kind=self._layers())
        self._optimizer = params.built(list(self._named.values()))
        self._waiting: list[Tensor] = []
        self._graphs: list[Tensor] = []
        values = sum(p.numel() for p in self._named.values())
        _log.info("%s adapts %d values in %d parameters", self.name, values, len(self._named))
        self.gauges |= {"adapted_values": values, "rows_rejected": 0, "loss": 0.0}

    def _adapt(self, batch: Batch) -> Tensor:
        inputs = fastest(batch.inputs)
        logits = self._forward(inputs)
        self._waiting.append(inputs)
        self._graphs.append(logits)
        return self._answer(logits.detach())

    def _layers(self) -> type[BlendedBatchNorm]:
        """What stands in for BatchNorm layers."""
        return BlendedBatchNorm

    def _answer(self, logits: Tensor) -> Tensor:
        """What to answer, given the model's logits ``(B, K)``."""
        return logits

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        """The loss of rows ``inputs (n, *shape)`` with finite ``logits (n, K)``; None where no row is worth a step."""
        raise NotImplementedError

    def _stepped(self) -> None:
        """What follows an applied step, without gradients."""

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Batch statistics, and gradients of the adapted parameters alone."""
        with torch.enable_grad(), self._blending.active(), only_require_grad(self.context.model, self.adapted):
            yield

    def _forward(self, inputs: Tensor) -> Tensor:
        """Logits with gradients."""
        with self._gradients():
            logits: Tensor = self.context.model(inputs)
        return logits

    def update(self) -> Outcome | None:
        """Step on the rows answered since the last call."""
        if not self._waiting:
            return None
        if len(self._graphs) < len(self._waiting):
            # The forward that answered is stale: weights have moved since, or this is a restart.
            self._graphs = [self._forward(inputs) for inputs in self._waiting]
        inputs, logits = _joined(self._waiting), _joined(self._graphs)
        self._forget()
        finite = logits.detach().isfinite().all(1)
        if not bool(finite.all()):
            self.gauges["rows_rejected"] += int((~finite).sum())
            inputs, logits = inputs[finite], logits[finite]
        with torch.enable_grad():
            loss = self._loss(inputs, logits) if len(logits) else None
        if loss is None:
            return Outcome(applied=False, reason=EMPTY)
        outcome = self.context.stepper.step(self.context.model, self._optimizer, loss, StepKind.ADAPTATION)
        self.gauges["loss"] = float(loss.detach())
        if outcome.applied:
            with torch.no_grad():
                self._stepped()
        return outcome

    def _forget(self) -> None:
        self._waiting, self._graphs = [], []

    def learned(self, before: Weights, after: Weights) -> None:
        """Drop the graphs of waiting batches: they belong to weights that are no more."""
        self._graphs = []

    def reset(self) -> None:
        """Return to the source model's weights; clear the optimizer and what waits."""
        super().reset()
        self._optimizer.state.clear()
        self._forget()

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._forget()
        self._blending.undo()

    def state_dict(self) -> State:
        """The optimizer's moments and the waiting inputs."""
        return {"optimizer": optimizer_state(self._optimizer, self._named), "waiting": list(self._waiting)}

    def load_state_dict(self, state: State) -> None:
        """Take over a state; waiting inputs go through the model again at the next update."""
        load_optimizer_state(self._optimizer, self._named, state["optimizer"])
        self._waiting = [fastest(inputs.to(self.context.device)) for inputs in state["waiting"]]
        self._graphs = []


def _joined(parts: list[Tensor]) -> Tensor:
    """The rows of all parts; no copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Anchor:
    """Where adapted parameters may be pulled back to: the source model's values, moved along by labelled learning.

    Args:
        context: Of the method; the source model gives the values.
        names: Of the parameters.
    """

    def __init__(self, context: Context, names: frozenset[str]) -> None:
        source = dict(context.source.named_parameters())
        self._source = {name: source[name].detach() for name in sorted(names)}
        self.values: dict[str, Tensor] = {name: value.clone() for name, value in self._source.items()}

    @torch.no_grad()
    def learned(self, before: Weights, after: Weights) -> None:
        """Move as a labelled step moved the live parameters."""
        for name in self.values.keys() & after.keys():
            self.values[name].add_(after[name] - before[name])

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put ``parameters`` back to the anchor."""
        for name, value in self.values.items():
            parameters[name].copy_(value)

    def reset(self) -> None:
        """Return to the source model's values."""
        if self.values:
            torch._foreach_copy_(list(self.values.values()), list(self._source.values()))

    def state_dict(self) -> State:
        """The values by name, not copied."""
        return dict(self.values)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a copy of the values; a name that the state lacks keeps the source model's."""
        self.reset()
        for name in self.values.keys() & state.keys():
            self.values[name].copy_(state[name])


class Anchored(Adaptation):
    """Mixed into a method that has an `Anchor`: it follows labelled learning, is reset and kept with the method."""

    _anchor: Anchor

    def learned(self, before: Weights, after: Weights) -> None:
        """Move the anchor as the live weights were moved."""
        super().learned(before, after)
        self._anchor.learned(before, after)

    def reset(self) -> None:
        """Return to the source model."""
        super().reset()
        self._anchor.reset()

    def state_dict(self) -> State:
        """The anchor beside what the method holds."""
        return super().state_dict() | {"anchor": self._anchor.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._anchor.load_state_dict(state["anchor"])
