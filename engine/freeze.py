"""The last resort: where live weights are rolled back again and again, the release answers, as it is."""

from __future__ import annotations

import copy
from collections import deque

from torch import Tensor

from engine.host import ModelHost
from policies.adaptation.none import NoAdaptation
from policies.interfaces import Action, Batch, Context, load_weights
from policies.stepping import SafeStepper


class Freeze:
    """Counts rollbacks, and holds the model that answers once there were too many.

    Args:
        host: Whose release that is.
        limit: Rollbacks among the last ``2 * limit`` attempts at a release, since the last release; 0 for never.
    """

    def __init__(self, host: ModelHost, limit: int) -> None:
        self._host, self._limit = host, limit
        self._rolled_back: deque[bool] = deque(maxlen=2 * limit)
        self._plain: NoAdaptation | None = None

    @property
    def on(self) -> bool:
        """Whether nothing adapts and nothing learns until the policy changes."""
        return self._plain is not None

    @property
    def rollbacks(self) -> int:
        """Rollbacks that count."""
        return sum(self._rolled_back)

    def see(self, action: Action) -> None:
        """Take in what a gate decided; a release makes up for all before it."""
        if action is Action.PROMOTE:
            self._rolled_back.clear()
        else:
            self._rolled_back.append(action is Action.ROLL_BACK)
        self._look()

    def answer(self, batch: Batch) -> Tensor:
        """Logits ``(B, K)`` of the release, while it is on; guarded as those of any method."""
        assert self._plain is not None
        return self._plain.adapt(batch)

    def thaw(self) -> None:
        """Begin anew, under another policy."""
        self.load_state_dict([])

    def _look(self) -> None:
        if not self._limit or self.rollbacks < self._limit:
            self._plain = None
        elif self._plain is None:
            host, model = self._host, copy.deepcopy(self._host.scratch)
            load_weights(model, host.release)
            context = Context(
                model=model, source=host.source, num_classes=host.num_classes, seed=0, stepper=SafeStepper(())
            )
            self._plain = NoAdaptation(NoAdaptation.Params(), context)

    def state_dict(self) -> list[bool]:
        """Of the last attempts, which were rollbacks."""
        return list(self._rolled_back)

    def load_state_dict(self, state: list[bool]) -> None:
        """Take over a state, once the host has the release."""
        self._rolled_back.clear()
        self._rolled_back.extend(state)
        self._look()
