"""The last resort: where live weights are rolled back again and again, the release answers, as it is."""

from __future__ import annotations

import copy
from collections import deque

import torch
from torch import Tensor, nn

from engine.host import ModelHost
from policies.interfaces import Action, load_weights


class Freeze:
    """Counts rollbacks, and holds the model that answers once there were too many.

    Args:
        host: Whose release that is.
        limit: Rollbacks among the last ``2 * limit`` attempts at a release, since the last release; 0 for never.
    """

    def __init__(self, host: ModelHost, limit: int) -> None:
        self._host, self._limit = host, limit
        self._rolled_back: deque[bool] = deque(maxlen=2 * limit)
        self._model: nn.Module | None = None

    @property
    def on(self) -> bool:
        """Whether nothing adapts and nothing learns until the policy changes."""
        return self._model is not None

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

    def answer(self, inputs: Tensor) -> Tensor:
        """Logits ``(B, K)`` of the release for inputs ``(B, ...)``, while it is on."""
        assert self._model is not None
        with torch.no_grad():
            logits: Tensor = self._model(inputs)
        return logits

    def thaw(self) -> None:
        """Begin anew, under another policy."""
        self.load_state_dict([])

    def _look(self) -> None:
        if not self._limit or self.rollbacks < self._limit:
            self._model = None
        elif self._model is None:
            self._model = copy.deepcopy(self._host.scratch)
            load_weights(self._model, self._host.release)

    def state_dict(self) -> list[bool]:
        """Of the last attempts, which were rollbacks."""
        return list(self._rolled_back)

    def load_state_dict(self, state: list[bool]) -> None:
        """Take over a state, once the host has the release."""
        self._rolled_back.clear()
        self._rolled_back.extend(state)
        self._look()
