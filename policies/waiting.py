"""Rows that were answered and are adapted to later."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from policies.memory import fastest


class Waiting:
    """Inputs with what was answered to them, batch by batch, until an update takes them."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Tensor, answered: Tensor) -> None:
        """Add a batch ``inputs (B, *shape)`` with its logits ``(B, K)``."""
        self._batches.append((inputs, answered))

    def take(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every batch, which then waits no more."""
        batches, self._batches = self._batches, []
        yield from batches

    def clear(self) -> None:
        """Forget what waits."""
        self._batches = []

    def state(self) -> list[dict[str, Tensor]]:
        """What waits, not copied."""
        return [{"inputs": inputs, "answered": answered} for inputs, answered in self._batches]

    def load(self, state: list[dict[str, Tensor]], device: torch.device) -> None:
        """Take over what `state` gave."""
        self._batches = [(fastest(row["inputs"].to(device)), row["answered"].to(device)) for row in state]
