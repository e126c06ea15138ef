"""Passes of auto through the live model: with the statistics in force, with others, with gradients, and steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import softmax_entropy
from policies.auto_params import AutoParams
from policies.gradient import Anchor
from policies.interfaces import Context, Outcome, State, StepKind, Weights
from policies.memory import fastest
from policies.moments import StreamStatistics
from policies.norm import only_require_grad
from policies.optimizers import load_optimizer_state, optimizer_state


class Passes:
    """Forwards of the live model, inputs ``(B, *shape)`` to logits ``(B, K)``, and steps that lower their entropy.

    Args:
        context: Of the method.
        params: Which parameters to step, and how.
        statistics: Of the live model's BatchNorm layers.

    Attributes:
        named: Parameters to step, by name.
        stepped: Whether any step was made since they had the anchor's values.
    """

    def __init__(self, context: Context, params: AutoParams, statistics: StreamStatistics) -> None:
        self._context, self._statistics = context, statistics
        self.named = params.selected(context.model)
        self._names = frozenset(self.named)
        self._optimizer = params.built(list(self.named.values())) if self.named else None
        self._anchor = Anchor(context, self._names)
        self.forget()

    def forget(self) -> None:
        """Nothing waits and no step was made."""
        self.stepped = False
        self._waiting: tuple[Tensor, float] | None = None
        self._graph: Tensor | None = None

    @property
    def waiting(self) -> bool:
        """Whether a batch waits for its step."""
        return self._waiting is not None

    @torch.no_grad()
    def plain(self, inputs: Tensor, share: float, *, measure: bool = False) -> Tensor:
        """Without gradients, with the batch's share of the statistics; moments are measured where told."""
        with self._statistics.measuring(measure):
            return self._normalised(inputs, share)

    @torch.no_grad()
    def with_statistics(self, inputs: Tensor, *, source: bool, measure: bool = False) -> Tensor:
        """With the source model's statistics where those of the stream are in force, or the other way round."""
        self._statistics.write(source=source)
        try:
            return self.plain(inputs, 0.0, measure=measure)
        finally:
            self._statistics.write(source=not source)

    @contextmanager
    @torch.no_grad()
    def before_steps(self) -> Iterator[None]:
        """Forwards inside the context have the weights of before any step."""
        self._graph = None  # Weights or statistics change in place; a step that is due repeats its forward.
        if not self.stepped:
            yield
            return
        live = [parameter.clone() for parameter in self.named.values()]
        self._anchor.restore(self.named)
        try:
            yield
        finally:
            torch._foreach_copy_(list(self.named.values()), live)

    def for_step(self, inputs: Tensor, share: float) -> Tensor:
        """As `plain`, of a batch that waits for its step from now on; measured."""
        self._waiting = (inputs, share)
        self._graph = self._differentiable(inputs, share, measure=True)
        return self._graph

    def step(self) -> Outcome:
        """One step that lowers the entropy of the batch that waits."""
        assert self._waiting is not None
        assert self._optimizer is not None
        logits = self._graph
        if logits is None:  # Weights have moved since it was answered, or this is a restart.
            logits = self._differentiable(*self._waiting, measure=False)
        self._waiting = self._graph = None
        finite = logits.detach().isfinite().all(1)
        with torch.enable_grad():
            entropy = softmax_entropy(logits if bool(finite.all()) else logits[finite]).entropy
            loss = entropy.mean() if len(entropy) else entropy.sum()
        outcome = self._context.stepper.step(self._context.model, self._optimizer, loss, StepKind.ADAPTATION)
        self.stepped |= outcome.applied
        return outcome

    def undo_steps(self) -> None:
        """Return to the weights of before any step."""
        self.forget()
        self._anchor.restore(self.named)
        if self._optimizer is not None:
            self._optimizer.state.clear()

    def learned(self, before: Weights, after: Weights) -> None:
        """Drop the graph of the batch that waits, and move the weights of before any step along."""
        self._graph = None
        self._anchor.learned(before, after)

    def reset(self) -> None:
        """Forget all; the live model has the source model's weights."""
        self.forget()
        self._anchor.reset()
        if self._optimizer is not None:
            self._optimizer.state.clear()

    def _differentiable(self, inputs: Tensor, share: float, *, measure: bool) -> Tensor:
        with (
            torch.enable_grad(),
            only_require_grad(self._context.model, self._names),
            self._statistics.measuring(measure),
        ):
            return self._normalised(inputs, share)

    def _normalised(self, inputs: Tensor, share: float) -> Tensor:
        """Logits with the batch's share of the statistics."""
        if not share:
            logits: Tensor = self._context.model(inputs)
            return logits
        self._statistics.blending.set_share(share)
        with self._statistics.blending.active():
            blended: Tensor = self._context.model(inputs)
        return blended

    def state_dict(self) -> State:
        """The weights of before any step, the optimizer's moments, and the inputs of the batch that waits."""
        return {
            "optimizer": {} if self._optimizer is None else optimizer_state(self._optimizer, self.named),
            "waiting": None if self._waiting is None else dict(zip(("inputs", "share"), self._waiting, strict=True)),
            "anchor": self._anchor.state_dict(),
        }

    def load_state_dict(self, state: State, stepped: bool) -> None:
        """Take over a copy of a state; a batch that waits goes through the model again at its step."""
        self.forget()
        self.stepped = stepped
        if self._optimizer is not None:
            load_optimizer_state(self._optimizer, self.named, state["optimizer"])
        self._anchor.load_state_dict(state["anchor"])
        if (waiting := state["waiting"]) is not None:
            self._waiting = (fastest(waiting["inputs"].to(self._context.device)), float(waiting["share"]))
