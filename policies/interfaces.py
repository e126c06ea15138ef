"""The five kinds of method, and what each is given and gives.

Shapes: ``B`` rows of a batch, ``K`` classes, ``N`` rows of labelled feedback. Times are seconds since the epoch as
``float64`` tensors on the CPU; everything else lives on the model's device.

A method is a subclass of one of `Adaptation`, `Reweighting`, `Safeguard`, `Interpolation`, `Gate`. It declares its
parameters as a nested `Params` model, is built with ``Method(params, context)``, and keeps everything that a restart
needs in `state_dict`. Public calls hold the guards (empty batches, rows that are not finite); a method fills in the
hooks behind them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Value = Tensor | int | float | str | bool | None | Sequence["Value"] | Mapping[str, "Value"]
"""What a state may hold: tensors, JSON values, and nestings of both with string keys."""

State = dict[str, Any]
"""A nesting of `Value`: tensors go to safetensors, the rest to JSON, bit for bit."""

Weights = dict[str, Tensor]
"""Parameters and buffers by the names of ``model.state_dict()``."""


class PolicyError(ValueError):
    """A method cannot run with this model or these parameters; the message says why and what to choose instead."""


class MethodParams(BaseModel):
    """Base of every method's parameters: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """Events stacked into tensors.

    Attributes:
        ids: Event ids, ``B`` of them.
        inputs: ``(B, *shape)`` as the model takes them, on the model's device. Methods must not change it in place.
        times: ``(B,)`` float64 event times in seconds, on the CPU.
        groups: Tenant or domain of each row where the event names one.
        now: The engine's event-time watermark in seconds; the only clock a method ever sees.
    """

    ids: tuple[str, ...]
    inputs: Tensor
    times: Tensor
    groups: tuple[str | None, ...]
    now: float

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, keep: Tensor) -> Self:
        """The rows at the indices ``keep`` ``(n,)`` int64 on the CPU."""
        chosen = keep.tolist()
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            inputs=self.inputs[keep.to(self.inputs.device)],
            times=self.times[keep],
            groups=tuple(self.groups[i] for i in chosen),
        )


@dataclass(frozen=True, slots=True)
class LabelledBatch(Batch):
    """Events joined with their feedback.

    Attributes:
        labels: ``(N,)`` int64 on the model's device.
        feedback_times: ``(N,)`` float64 seconds, on the CPU.
        predicted: ``(N,)`` int64 on the CPU: the class that was answered; -1 where no answer is known.
    """

    labels: Tensor
    feedback_times: Tensor
    predicted: Tensor

    def rows(self, keep: Tensor) -> Self:
        """The rows at the indices ``keep`` ``(n,)`` int64 on the CPU."""
        return replace(
            Batch.rows(self, keep),
            labels=self.labels[keep.to(self.labels.device)],
            feedback_times=self.feedback_times[keep],
            predicted=self.predicted[keep],
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one update: ``applied``, or skipped for a reason from a small fixed set of words."""

    applied: bool
    reason: str = ""


class StepKind(enum.StrEnum):
    """Which of the two kinds of update a step belongs to."""

    ADAPTATION = "adaptation"
    LEARNING = "learning"


class Stepper(Protocol):
    """Takes one optimizer step with every safeguard in force. The engine provides it; see `policies.stepping`."""

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, kind: StepKind) -> Outcome:
        """Add penalties, go backward, let safeguards filter or veto, step; or leave everything as it was."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every method is built with.

    Attributes:
        model: The live model, in eval mode. Adaptation may replace its layers in ways that keep all names of its
            ``state_dict`` and that `Adaptation.detach` undoes.
        source: The source model, frozen, in eval mode. Never changed by anyone.
        num_classes: ``K``.
        seed: Seed of this method's own generator; differs from method to method.
        stepper: Takes optimizer steps under the policy's safeguards.
    """

    model: nn.Module
    source: nn.Module
    num_classes: int
    seed: int
    stepper: Stepper

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        first = next(self.model.parameters(), None)
        return torch.device("cpu") if first is None else first.device


class Method:
    """A named algorithm with validated parameters and a complete state.

    `gauges` holds numbers worth watching, by a fixed small set of names; the engine exports them.
    """

    kind: ClassVar[str]
    name: ClassVar[str]

    class Params(MethodParams):
        """No parameters."""

    def __init__(self, params: MethodParams, context: Context) -> None:
        self.context = context
        self.gauges: dict[str, float] = {}

    def state_dict(self) -> State:
        """Everything that a restart needs beyond parameters and the live weights. Tensors are not copied."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take over a state that `state_dict` gave, bit for bit."""


class Adaptation(Method):
    """Test-time adaptation: answers a batch and, where the method can, adapts with the same forward pass."""

    kind = "adaptation"

    adapted: frozenset[str] = frozenset()
    """Names of the parameters of the live model that `update` may change."""

    def adapt(self, batch: Batch) -> Tensor:
        """Answer a batch: ``(B, K)`` logits, finite, in row order.

        Rows whose inputs are not finite get all-zero logits (uniform probabilities) and are not adapted to.
        """
        if len(batch) == 0:
            return torch.zeros(0, self.context.num_classes, device=batch.inputs.device)
        if not batch.inputs.is_floating_point() or math.isfinite(batch.inputs.sum()):  # one pass tells of all
            return self._finite(self._adapt(batch))
        keep = batch.inputs.flatten(1).isfinite().all(1).nonzero().flatten()
        logits = torch.zeros(len(batch), self.context.num_classes, device=batch.inputs.device)
        if len(keep):
            logits[keep] = self._finite(self._adapt(batch.rows(keep.cpu()))).to(logits.dtype)
        return logits

    @staticmethod
    def _finite(logits: Tensor) -> Tensor:
        """Zero the rows that the model could not answer with finite numbers."""
        logits = logits.detach()
        if math.isfinite(logits.sum()):
            return logits
        return torch.where(logits.isfinite().all(1, keepdim=True), logits, torch.zeros_like(logits))

    def _adapt(self, batch: Batch) -> Tensor:
        """Answer a batch of at least one row, all of them finite."""
        raise NotImplementedError

    def update(self) -> Outcome | None:
        """Do what follows from the batches given since the last call, after their answers have gone out.

        Returns:
            The outcome of the optimizer step, or None when no step was due.
        """
        return None

    def learned(self, before: Weights, after: Weights) -> None:
        """Hear that a labelled step moved live parameters from ``before`` to ``after`` (changed names alone)."""

    def labelled(self, ids: Sequence[str], labels: Sequence[int], groups: Sequence[str | None]) -> None:
        """Hear events' usable labels as they join, held-out ones too; a job may be running, so only take note."""

    def reset(self) -> None:
        """Return the live model to the source model's weights and forget everything."""
        load_weights(self.context.model, self.context.source.state_dict())

    def detach(self) -> None:
        """Undo every structural change of the live model; weights stay as they are."""


class Reweighting(Method):
    """Gives each labelled row a weight. The engine multiplies the weights of all methods and normalises them."""

    kind = "reweighting"

    def weigh(self, batch: LabelledBatch, losses: Tensor) -> Tensor:
        """Weights ``(N,)``, non-negative, finite, detached, of mean 1, for per-row losses ``(N,)``."""
        if len(batch) == 0:
            return losses.detach().new_zeros(0)
        losses = losses.detach()
        finite = losses.isfinite()
        if bool(finite.all()):
            return self._weigh(batch, losses)
        keep = finite.nonzero().flatten()
        weights = torch.zeros_like(losses)
        if len(keep):
            weights[keep] = self._weigh(batch.rows(keep.cpu()), losses[keep])
        return weights

    def _weigh(self, batch: LabelledBatch, losses: Tensor) -> Tensor:
        """Weights of at least one row, all losses finite."""
        raise NotImplementedError


class Verdict(enum.StrEnum):
    """What a safeguard says of the live model after a batch."""

    KEEP = "keep"
    RESET = "reset"
    """Return to the source model and forget what adaptation and the optimizer hold."""


class Safeguard(Method):
    """Keeps what is known. Every hook has a default that does nothing; a safeguard overrides those it needs."""

    kind = "safeguard"

    def observe(self, batch: LabelledBatch) -> None:
        """See labelled rows before they are learned from (rows of the audit window never come here)."""

    def penalty(self, model: nn.Module, kind: StepKind) -> Tensor | None:
        """A differentiable scalar to add to the loss of a step on ``model``, or None."""
        return None

    def filter_gradients(self, model: nn.Module, kind: StepKind) -> str | None:
        """Change the gradients of ``model`` in place; or veto the step by returning the reason."""
        return None

    def after_step(self, model: nn.Module, kind: StepKind, lr: float) -> None:
        """Change parameters of ``model`` after a step; only those that were stepped, which still have a ``grad``."""

    def verdict(self, batch: Batch, logits: Tensor) -> Verdict:
        """Judge the live model by the logits ``(B, K)`` just answered."""
        return Verdict.KEEP

    def released(self, release: Weights) -> None:
        """Hear that these weights are the release now: anchors move with it."""

    def reset(self) -> None:
        """Hear that the live model has returned to the source model."""


@dataclass(frozen=True, slots=True)
class AuditWindow:
    """The newest held-out feedback, which is never learned from.

    Attributes:
        inputs: ``(N, *shape)`` on the model's device.
        labels: ``(N,)`` int64 on the CPU.
        source: ``(N,)`` int64 on the CPU: classes that the source model predicts.
        live: ``(N,)`` int64 on the CPU: classes that the daemon answered at the time; -1 where that was rolled back.
        release: ``(N,)`` int64 on the CPU: classes that the current release predicts.
    """

    inputs: Tensor
    labels: Tensor
    source: Tensor
    live: Tensor
    release: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Candidate weights. ``alpha`` is the share of the **old** weights, in [0, 1] (the convention of BCWI)."""

    alpha: float
    weights: Weights


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proposal with the classes ``(N,)`` int64 that it predicts on the audit window."""

    alpha: float
    predicted: Tensor


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a gate decides on: the audit window and every candidate's predictions on it."""

    window: AuditWindow
    candidates: tuple[Candidate, ...]


class Action(enum.StrEnum):
    """What to do with the release."""

    PROMOTE = "promote"
    HOLD = "hold"
    ROLL_BACK = "roll_back"
    """Return the live weights to the release."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A gate's decision.

    Attributes:
        action: What to do.
        reason: A word or two from a fixed small set, for metrics and logs.
        chosen: Index of the candidate to promote; -1 otherwise.
        figures: The numbers it was decided on, by name.
    """

    action: Action
    reason: str
    chosen: int = -1
    figures: Mapping[str, float] = field(default_factory=dict)


class Interpolation(Method):
    """Combines the last release and the live weights into candidates for the next release."""

    kind = "interpolation"

    def propose(self, release: Weights, live: Weights, audit: AuditWindow) -> Iterator[Proposal]:
        """Yield candidates; neither ``release`` nor ``live`` is changed, and floating tensors alone are combined."""
        raise NotImplementedError


class Gate(Method):
    """Decides whether a candidate becomes the release."""

    kind = "gate"

    def decide(self, evidence: Evidence) -> Decision:
        """Decide on the evidence alone; the same evidence always gives the same decision."""
        raise NotImplementedError


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy ``weights`` into ``model`` in place, every name, without touching gradients.

    Raises:
        PolicyError: If the names or shapes differ.
    """
    own = model.state_dict(keep_vars=True)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise PolicyError(f"weights do not fit the model: {len(odd)} names differ, the first is {odd[0]!r}")
    with torch.no_grad():
        for name, tensor in own.items():
            new = weights[name]
            if tensor.shape != new.shape:
                raise PolicyError(f"{name} is {tuple(new.shape)} where the model has {tuple(tensor.shape)}")
            tensor.copy_(new)
