"""What methods share that adapt on a bank of past inputs, every so many of them."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels import softmax_entropy
from policies.interfaces import Adaptation, Batch, Context, MethodParams, Outcome, State, StepKind
from policies.memory import KeptInputs
from policies.norm import Blending, NormSelection, all_finite, only_require_grad
from policies.optimizers import Adam, load_optimizer_state, optimizer_state

_log = logging.getLogger(__name__)

NONFINITE_STATISTICS = "nonfinite_statistics"
"""Statistics of BatchNorm would have become infinite or NaN; they were put back."""


class BankedAdaptation(Adaptation):
    """Base of methods that answer as they are, keep some inputs in a bank, and step on it every ``interval`` inputs.

    A method sets `_optimizer` and `_stepped_model` and gives `_loss`, `_statistics` and `_stepped`. A step that is not
    applied leaves the statistics as they were; one that is not finite also empties the bank. Rows without finite logits
    are not offered to the bank.

    Args:
        params: Of the method.
        context: Of the method.
        bank: Empty.
        interval: Inputs between two steps.
    """

    _optimizer: torch.optim.Optimizer
    _stepped_model: nn.Module

    def __init__(self, params: MethodParams, context: Context, bank: KeptInputs[Any], interval: int) -> None:
        super().__init__(params, context)
        self._bank = bank
        self._interval = interval
        self._seen = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self.gauges |= {"bank_rows": 0, "bank_classes": 0, "bank_emptied": 0, "rows_rejected": 0, "loss": 0.0}

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        logits: Tensor = self.context.model(batch.inputs)
        self._waiting.append((batch.inputs, self._judged(logits)))
        return logits

    def _judged(self, logits: Tensor) -> Tensor:
        """Pseudo-label and uncertainty ``(2, B)`` of each row; one tensor, so that `update` fetches it at once."""
        entropy, _, label = softmax_entropy(logits)
        return torch.stack([label.double(), entropy.double()])

    def _insert(self, inputs: Tensor, rows: list[tuple[int, float]]) -> None:
        """Offer rows ``inputs`` with their pseudo-labels and uncertainties to the bank."""
        self._bank.insert(inputs, rows)

    def _statistics(self) -> list[Tensor]:
        """Statistics of BatchNorm that `_loss` moves."""
        raise NotImplementedError

    def _loss(self) -> Tensor:
        """The loss on the bank, which holds at least one row."""
        raise NotImplementedError

    def _stepped(self) -> None:
        """What follows an applied step, without gradients."""

    def update(self) -> Outcome | None:
        """Offer the rows answered since the last call to the bank, one by one, and step whenever a step is due."""
        waiting, self._waiting = self._waiting, []
        outcome = None
        for inputs, judged in waiting:
            labels, uncertainties = judged.tolist()
            keep = [row for row, value in enumerate(uncertainties) if math.isfinite(value)]
            if len(keep) < len(labels):
                self.gauges["rows_rejected"] += len(labels) - len(keep)
                inputs = inputs[keep]
            rows = [(int(labels[row]), uncertainties[row]) for row in keep]
            outcome = self._offer(inputs, rows) or outcome
        self.gauges |= {"bank_rows": len(self._bank), "bank_classes": self._bank.timetable.classes()}
        return outcome

    def _offer(self, inputs: Tensor, rows: list[tuple[int, float]]) -> Outcome | None:
        """Offer ``inputs`` with their pseudo-labels and uncertainties; step in between where one is due."""
        outcome, start = None, 0
        while start < len(rows):
            stop = min(len(rows), start + self._interval - self._seen % self._interval)
            self._insert(inputs[start:stop], rows[start:stop])
            self._seen += stop - start
            start = stop
            if self._seen % self._interval == 0 and len(self._bank):
                outcome = self._step()
        return outcome

    def _step(self) -> Outcome:
        """Compute the loss, which moves statistics, and step; or put everything back."""
        statistics = self._statistics()
        before = [tensor.clone() for tensor in statistics]
        loss = self._loss()
        outcome = Outcome(applied=False, reason=NONFINITE_STATISTICS)
        if all_finite([*statistics, loss.detach()]):
            outcome = self.context.stepper.step(self._stepped_model, self._optimizer, loss, StepKind.ADAPTATION)
            self.gauges["loss"] = float(loss.detach())
        if outcome.applied:
            with torch.no_grad():
                self._stepped()
            return outcome
        for tensor, old in zip(statistics, before, strict=True):
            tensor.copy_(old)
        if outcome.reason.startswith("nonfinite"):
            # Whatever did it sits in the bank and would do it again.
            self._bank.clear()
            self.gauges["bank_emptied"] += 1
        return outcome

    def reset(self) -> None:
        """Return to the source model and forget everything."""
        super().reset()
        self._optimizer.state.clear()
        self._bank.clear()
        self._seen = 0
        self._waiting = []

    def state_dict(self) -> State:
        """The bank, the counter, and rows answered but not yet offered."""
        return {
            "bank": self._bank.state_dict(),
            "seen": self._seen,
            "waiting": [{"inputs": inputs, "judged": judged} for inputs, judged in self._waiting],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        device = self.context.device
        self._bank.load_state_dict(state["bank"], device)
        self._seen = state["seen"]
        self._waiting = [(row["inputs"].to(device), row["judged"].to(device)) for row in state["waiting"]]


class OneModelBanked(BankedAdaptation):
    """Base of those whose bank adapts the live model itself, by Adam over its normalisation layers.

    Args:
        params: Of the method.
        context: Of the method.
        bank: Empty.
        interval: Inputs between two steps.
        blending: The layers in the live model.
        lr: Adam's learning rate.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    def __init__(
        self,
        params: NormSelection,
        context: Context,
        bank: KeptInputs[Any],
        *,
        interval: int,
        blending: Blending,
        lr: float,
    ) -> None:
        super().__init__(params, context, bank, interval)
        self._blending = blending
        self._named = params.parameters(context.model)
        self.adapted = frozenset(self._named)
        self._optimizer = Adam(self._named.values(), lr=lr)
        self._stepped_model = context.model
        self.gauges["adapted_values"] = sum(p.numel() for p in self._named.values())
        _log.info("%s adapts %d values in %d parameters", self.name, self.gauges["adapted_values"], len(self._named))

    def _statistics(self) -> list[Tensor]:
        return self._blending.statistics()

    def _forward(self) -> Tensor:
        """Logits of the bank with gradients, as in training."""
        with torch.enable_grad(), self._blending.active(), only_require_grad(self.context.model, self.adapted):
            logits: Tensor = self.context.model(self._bank.inputs)
        return logits

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._blending.undo()

    def state_dict(self) -> State:
        """Adam's moments beside bank, counter and waiting rows."""
        return super().state_dict() | {"optimizer": optimizer_state(self._optimizer, self._named)}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        load_optimizer_state(self._optimizer, self._named, state["optimizer"])
