"""One optimizer step with every safeguard in force, all or nothing.

A step that is not finite, or that a safeguard vetoes, leaves weights and optimizer state bit for bit as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from policies.interfaces import Outcome, Safeguard, StepKind

EMPTY = "empty"
"""No gradient reaches any parameter of the optimizer: nothing was selected, and momentum must not move weights."""

NONFINITE_LOSS = "nonfinite_loss"
NONFINITE_GRADIENT = "nonfinite_gradient"
NONFINITE_WEIGHTS = "nonfinite_weights"
"""The step itself overflowed, in the weights or in what the optimizer remembers; it was undone."""


class SafeStepper:
    """Takes optimizer steps under safeguards.

    Only parameters of the optimizer are changed, and of these only the ones that the loss reaches: they alone have a
    ``grad`` while `Safeguard.filter_gradients` and `Safeguard.after_step` run. Gradients of the whole model are
    cleared before and after, so two optimizers over one model never see each other's.

    Cost beside forward and backward: one copy of the stepped weights and of their optimizer state, two reductions over
    them, two host round trips.

    Args:
        safeguards: In the order of the policy: penalties are summed and hooks run in it.
        clip_norm: Largest L2 norm of the gradient of a labelled step, after all safeguards; a longer one is scaled down
            (Pascanu et al., ICML 2013). None for any.
    """

    def __init__(self, safeguards: Sequence[Safeguard] = (), clip_norm: float | None = None) -> None:
        self.safeguards: tuple[Safeguard, ...] = tuple(safeguards)
        self.clip_norm = clip_norm

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, kind: StepKind) -> Outcome:
        """Add penalties, go backward, let safeguards filter or veto, step; or leave everything as it was.

        Args:
            model: What the loss was computed with.
            optimizer: Holds parameters of ``model``; takes its step without a closure.
            loss: A scalar.
            kind: Which of the two kinds of update this is.

        Returns:
            Whether the step was applied, else why not: ``empty``, ``nonfinite_loss``, ``nonfinite_gradient``,
            ``nonfinite_weights``, or the reason of the safeguard that vetoed.
        """
        try:
            reason = self._prepare(model, optimizer, loss, kind)
            return Outcome(False, reason) if reason else self._apply(model, optimizer, kind)
        finally:
            model.zero_grad(set_to_none=True)

    def _prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, kind: StepKind) -> str:
        """Compute the gradients to step with; a reason not to, or an empty string."""
        model.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not loss.requires_grad or not parameters:
            return EMPTY
        total = self._penalised(model, loss, kind)
        torch.autograd.backward(total, inputs=parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        peak, loss_finite = _peaks(gradients, total)
        if not loss_finite:
            return NONFINITE_LOSS
        if peak == 0:
            return EMPTY
        if not math.isfinite(peak):
            return NONFINITE_GRADIENT
        reason = next((why for guard in self.safeguards if (why := guard.filter_gradients(model, kind))), "")
        if self.clip_norm is not None and kind is StepKind.LEARNING and not reason:
            _clip(gradients, self.clip_norm)
        return reason

    def _penalised(self, model: nn.Module, loss: Tensor, kind: StepKind) -> Tensor:
        """The loss plus every safeguard's penalty."""
        for guard in self.safeguards:
            penalty = guard.penalty(model, kind)
            if penalty is not None:
                loss = loss + penalty
        return loss

    def _apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, kind: StepKind) -> Outcome:
        """Step, and undo it if anything that it wrote is not finite."""
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        weights = [p.detach().clone() for p in stepped]
        memory = [_copied(optimizer.state[p]) if p in optimizer.state else None for p in stepped]
        optimizer.step()
        lr = float(optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            for guard in self.safeguards:
                guard.after_step(model, kind, lr)
        written = [p.detach() for p in stepped] + list(_tensors(optimizer.state.get(p, {}) for p in stepped))
        if _finite(written):
            return Outcome(True)
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in stepped], weights)
        for parameter, held in zip(stepped, memory, strict=True):
            if held is None:
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = held
        return Outcome(False, NONFINITE_WEIGHTS)


@torch.no_grad()
def _clip(gradients: Sequence[Tensor], limit: float) -> None:
    """Scale gradients down to a joint norm of ``limit``; those within it stay bit for bit.

    The norm is taken of gradients brought to a largest magnitude of 1, so that no sum of squares overflows.
    """
    peak = _peak(gradients)
    norm = get_total_norm([gradient / peak for gradient in gradients]) * peak
    if float(norm) > limit:
        torch._foreach_mul_(list(gradients), limit / peak)
        torch._foreach_mul_(list(gradients), peak / norm)


def _copied(held: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer holds for a parameter, tensors copied."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in held.items()}


def _tensors(memories: Iterable[dict[str, Any]]) -> Iterable[Tensor]:
    """The floating tensors of what an optimizer holds."""
    for held in memories:
        for value in held.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield value


def _peak(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude of any value, NaN where one is; unlike a sum of squares it never overflows."""
    largest: Tensor = get_total_norm([tensor for tensor in tensors if tensor.numel()], norm_type=float("inf"))
    return largest


def _peaks(gradients: Sequence[Tensor], loss: Tensor) -> tuple[float, bool]:
    """The largest magnitude of any gradient, and whether the loss is finite; one round trip."""
    peak = _peak(gradients).to(loss.device)
    both = torch.stack([peak, loss.detach().to(peak.dtype)]).tolist()
    return both[0], math.isfinite(both[1])


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value of every tensor is finite; one round trip."""
    return bool(_peak(tensors).isfinite())
