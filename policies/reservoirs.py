"""Banks filled by chance: which past inputs to keep so that predicted classes stay balanced."""

from __future__ import annotations

import torch

from policies.interfaces import State


class Reservoir:
    """Prediction-balanced reservoir sampling (PBRS), or high-confidence uniform-class sampling (HUS).

    References: Gong et al., "NOTE: robust continual test-time adaptation against temporal correlation" (NeurIPS 2022);
    Gong et al., "SoTTA: robust test-time adaptation on noisy data streams" (NeurIPS 2023).

    An input of class ``c`` is kept while there is room. Then, if ``c`` is not among the classes that hold most, it
    takes the place of a random item of a random one of those. Otherwise it takes the place of a random item of ``c``:
    always (HUS), or (``fair``, PBRS) with probability ``m / n``, for ``m`` items held of ``n`` inputs of class ``c`` so
    far.

    Args:
        capacity: How many inputs to keep.
        fair: Whether every input of a class shall have the same chance to be kept.
        seed: Of the draws.
    """

    def __init__(self, capacity: int, *, fair: bool, seed: int) -> None:
        self.capacity = capacity
        self._fair = fair
        self._seed = seed
        self._generator = torch.Generator()
        self.clear()

    def clear(self) -> None:
        """Forget every item, the counts, and what was drawn."""
        self._slots: dict[int, list[int]] = {}
        self._seen: dict[int, int] = {}
        self._size = 0
        self._generator.manual_seed(self._seed)

    def __len__(self) -> int:
        return self._size

    def insert(self, label: int, uncertainty: float) -> int | None:
        """Offer one input; ``uncertainty`` is not looked at.

        Returns:
            The slot to write it to, or None if it is refused.
        """
        self._seen[label] = self._seen.get(label, 0) + 1
        own = self._slots.setdefault(label, [])
        if self._size < self.capacity:
            own.append(self._size)
            self._size += 1
            return own[-1]
        most = max(map(len, self._slots.values()))
        if len(own) < most:
            largest = sorted(c for c, slots in self._slots.items() if len(slots) == most)
            slots = self._slots[largest[self._draw(len(largest))]]
            own.append(slots.pop(self._draw(len(slots))))
            return own[-1]
        if self._fair and self._draw(self._seen[label]) >= len(own):
            return None
        return own[self._draw(len(own))]

    def _draw(self, below: int) -> int:
        """A whole number from 0 on, below ``below``."""
        return int(torch.randint(below, (), generator=self._generator))

    def counts(self) -> dict[int, int]:
        """How many items each class holds."""
        return {label: len(slots) for label, slots in sorted(self._slots.items()) if slots}

    def classes(self) -> int:
        """How many classes hold an item."""
        return len(self.counts())

    def state_dict(self) -> State:
        """Slots and counts by class, and the generator."""
        return {
            "slots": {str(label): list(slots) for label, slots in self._slots.items()},
            "seen": {str(label): count for label, count in self._seen.items()},
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        self._slots = {int(label): list(slots) for label, slots in state["slots"].items()}
        self._seen = {int(label): count for label, count in state["seen"].items()}
        self._size = sum(map(len, self._slots.values()))
        self._generator.set_state(state["generator"].cpu())
