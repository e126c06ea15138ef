"""A bank of past inputs that stays balanced between classes: decisions on the CPU, inputs in one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from policies.interfaces import PolicyError, State


@dataclass(slots=True)
class _Item:
    """An input of the bank: its row in the tensor, uncertainty score and the number of the insertion it came with."""

    slot: int
    uncertainty: float
    born: int


class Timetable:
    """Category-balanced sampling with timeliness and uncertainty (CSTU): which inputs a bank keeps.

    Reference: Yuan et al., "Robust test-time adaptation in dynamic scenarios" (RoTTA, CVPR 2023), section 3.2.

    Equations, for capacity ``N``, ``K`` classes, an item of age ``A`` and uncertainty ``u`` (an entropy):

        s(A, u) = lambda_t / (1 + exp(-A / N)) + lambda_u u / ln K      (higher = sooner removed)

    An input of class ``y`` comes with age 0. While ``y`` holds fewer than ``N / K`` items and the bank has room, it is
    kept. Otherwise the item of highest score gives way if its score exceeds the newcomer's; it is sought among the
    items of ``y`` if ``y`` holds its quota, else among those of the largest classes. Of equal scores the later item in
    order of class and arrival counts as higher. After every attempt, also a refused one, all items age by 1.

    Args:
        capacity: ``N``.
        num_classes: ``K``.
        lambda_t: Weight of age.
        lambda_u: Weight of uncertainty.
    """

    def __init__(self, capacity: int, num_classes: int, lambda_t: float = 1.0, lambda_u: float = 1.0) -> None:
        self.capacity = capacity
        self._quota = capacity / num_classes
        self._lambda_t = lambda_t
        self._uncertainty_scale = lambda_u / math.log(num_classes) if num_classes > 1 else lambda_u
        self.clear()

    def clear(self) -> None:
        """Forget every item."""
        self._classes: dict[int, list[_Item]] = {}
        self._size = 0
        self._attempts = 0

    def __len__(self) -> int:
        return self._size

    def score(self, age: int, uncertainty: float) -> float:
        """How removable an item is."""
        return self._lambda_t / (1 + math.exp(-age / self.capacity)) + self._uncertainty_scale * uncertainty

    def insert(self, label: int, uncertainty: float) -> int | None:
        """Offer one input.

        Returns:
            The slot to write it to, or None if it is refused.
        """
        slot = self._room(label, self.score(0, uncertainty))
        if slot is not None:
            self._classes.setdefault(label, []).append(_Item(slot, uncertainty, self._attempts))
            self._size += 1
        self._attempts += 1
        return slot

    def _room(self, label: int, score: float) -> int | None:
        """A free slot for a newcomer, freed if need be; None where it must not displace anything."""
        if len(self._classes.get(label, ())) >= self._quota:
            return self._evict([label], score)
        if self._size < self.capacity:
            return self._size
        largest = max(map(len, self._classes.values()))
        return self._evict(sorted(c for c, items in self._classes.items() if len(items) == largest), score)

    def _evict(self, classes: list[int], newcomer: float) -> int | None:
        """Remove the item of highest score among ``classes`` if it exceeds the newcomer's; its slot, or None."""
        highest, where, position = -math.inf, -1, -1
        for label in classes:
            for index, item in enumerate(self._classes[label]):
                score = self.score(self._attempts - item.born, item.uncertainty)
                if score >= highest:
                    highest, where, position = score, label, index
        if highest <= newcomer:
            return None
        items = self._classes[where]
        slot = items.pop(position).slot
        if not items:
            del self._classes[where]
        self._size -= 1
        return slot

    def items(self) -> dict[int, list[tuple[float, int]]]:
        """``(uncertainty, age)`` of every item, by class, in order of arrival."""
        return {
            label: [(item.uncertainty, self._attempts - item.born) for item in items]
            for label, items in sorted(self._classes.items())
        }

    def ages(self) -> list[int]:
        """Ages in insertion attempts, by slot."""
        ages = [0] * self._size
        for items in self._classes.values():
            for item in items:
                ages[item.slot] = self._attempts - item.born
        return ages

    def classes(self) -> int:
        """How many classes hold an item."""
        return len(self._classes)

    def state_dict(self) -> State:
        """Every item as ``[slot, uncertainty, born]`` by class, and the number of attempts."""
        classes = {
            str(label): [[item.slot, item.uncertainty, item.born] for item in items]
            for label, items in self._classes.items()
        }
        return {"classes": classes, "attempts": self._attempts}

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        self._classes = {
            int(label): [_Item(slot, uncertainty, born) for slot, uncertainty, born in items]
            for label, items in state["classes"].items()
        }
        self._size = sum(map(len, self._classes.values()))
        self._attempts = state["attempts"]


def fastest(inputs: Tensor) -> Tensor:
    """``inputs`` in the memory layout to adapt in; no copy where they have it.

    Images on a CPU lie channels last, where convolution and BatchNorm are fastest; the rest stays as it is.
    """
    if inputs.dim() != 4 or inputs.device.type != "cpu":
        return inputs
    return inputs.contiguous(memory_format=torch.channels_last)


class Keeper(Protocol):
    """Decides, one input after another, what a bank keeps."""

    capacity: int

    def __len__(self) -> int:
        """How many inputs are kept."""
        ...

    def clear(self) -> None:
        """Forget every input."""
        ...

    def insert(self, label: int, uncertainty: float) -> int | None:
        """Offer one input; the slot to write it to, or None if it is refused."""
        ...

    def classes(self) -> int:
        """How many classes hold an input."""
        ...

    def state_dict(self) -> State:
        """Everything that a restart needs."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        ...


KeeperT = TypeVar("KeeperT", bound=Keeper)


class KeptInputs(Generic[KeeperT]):
    """The inputs that a `Keeper` keeps, in one tensor on the model's device.

    Args:
        timetable: Decides what is kept.
    """

    def __init__(self, timetable: KeeperT) -> None:
        self.timetable = timetable
        self._inputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timetable)

    def clear(self) -> None:
        """Forget every input; nothing of it stays in memory."""
        self.timetable.clear()
        self._inputs = None

    def insert(self, inputs: Tensor, judged: Sequence[tuple[int, float]]) -> None:
        """Offer rows one after another; those kept are written by one copy.

        Args:
            inputs: ``(B, *shape)``; every call brings rows of one shape and type.
            judged: Pseudo-label and entropy of each row.

        Raises:
            PolicyError: If the rows differ in shape or type from those already here.
        """
        written: dict[int, int] = {}
        for row, (label, uncertainty) in enumerate(judged):
            slot = self.timetable.insert(label, uncertainty)
            if slot is not None:
                written[slot] = row
        if not written:
            return
        if self._inputs is None:
            self._inputs = self._allocate(inputs)
        if self._inputs.shape[1:] != inputs.shape[1:] or self._inputs.dtype != inputs.dtype:
            raise PolicyError(
                f"a bank of inputs needs rows of one shape and type: it holds {tuple(self._inputs.shape[1:])} "
                f"{self._inputs.dtype}, and got {tuple(inputs.shape[1:])} {inputs.dtype}; "
                "pad the inputs, or choose an adaptation without a bank"
            )
        slots = torch.tensor(list(written), device=inputs.device)
        rows = torch.tensor(list(written.values()), device=inputs.device)
        self._inputs.index_copy_(0, slots, inputs.index_select(0, rows))

    def _allocate(self, inputs: Tensor) -> Tensor:
        """Zeros for a whole bank of rows like ``inputs``, in the `fastest` layout."""
        return fastest(inputs.new_zeros(self.timetable.capacity, *inputs.shape[1:]))

    @property
    def inputs(self) -> Tensor:
        """The inputs ``(n, *shape)`` by slot, a view of the bank; not to be changed."""
        assert self._inputs is not None, "an empty bank has no inputs"
        return self._inputs[: len(self)]

    def state_dict(self) -> State:
        """The timetable and the inputs by slot."""
        return {"timetable": self.timetable.state_dict(), "inputs": self.inputs if len(self) else None}

    def load_state_dict(self, state: State, device: torch.device) -> None:
        """Take over a copy of a state, on ``device``; a bank that is too small for it starts empty."""
        self.clear()
        held: Tensor | None = state["inputs"]
        if held is None or len(held) <= self.timetable.capacity:
            self.timetable.load_state_dict(state["timetable"])
        if len(self) and held is not None:
            self._inputs = self._allocate(held.to(device))
            self._inputs[: len(held)] = held.to(device)


class Bank(KeptInputs[Timetable]):
    """The inputs that a `Timetable` keeps, with their ages."""

    def ages(self) -> Tensor:
        """Ages ``(n,)`` float32 by slot, in units of the capacity, on the bank's device."""
        ages = torch.tensor(self.timetable.ages(), dtype=torch.float32) / self.timetable.capacity
        return ages.to(self.inputs.device)
