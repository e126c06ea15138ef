"""The audit window: held-out feedback that nothing is ever learned from.

A fixed share of feedback is held out by a hash of the event id, so a redelivered label always falls on the same
side. The newest rows are kept, with the classes that the source model, the live model (as it answered) and the
current release give them: whether adapting helps always has a measured answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from engine.host import Inputs
from policies.flips import UNKNOWN
from policies.interfaces import AuditWindow, State
from streams.join import Joined


def held_out(event_id: str, share: float, salt: str = "audit") -> bool:
    """Whether the event with this id belongs to the audit window; true for a ``share`` in [0, 1] of all ids."""
    hashed = _keyed(salt).copy()  # half as dear as keying it anew
    hashed.update(event_id.encode())
    return int.from_bytes(hashed.digest(), "little") < share * 2.0**64


@cache
def _keyed(salt: str) -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8, key=salt.encode())


class Audit:
    """Keeps the newest ``capacity`` audited rows.

    Args:
        capacity: Rows kept.
        inputs: The form of the inputs; rows are kept as records hold them.
        device: Where the window is needed.
    """

    def __init__(self, capacity: int, inputs: Inputs, device: torch.device) -> None:
        self._capacity = capacity
        self._inputs = inputs
        self._device = device
        self._width = int(torch.Size(inputs.record_shape).numel()) * inputs.dtype.itemsize
        self._bytes = torch.zeros(0, self._width, dtype=torch.uint8)
        self._classes = torch.zeros(0, 6, dtype=torch.int64)
        """Labels, classes of source, live and release, whether the live answer has had its rollback, and whether the
        inputs are among the bytes."""
        self._rolled_back_at = 0
        self.seen = 0

    def __len__(self) -> int:
        return len(self._classes)

    @property
    def evidence(self) -> int:
        """Rows whose inputs are here, so that new weights can be judged on them."""
        return len(self._bytes)

    def add(self, rows: Sequence[Joined], source: Tensor, release: Tensor) -> None:
        """Take in audited rows with the classes ``(N,)`` that source model and release predict for them.

        Rows without inputs count until there is a new release: nobody can tell what that would have answered.
        """
        if not rows:
            return
        labels = torch.tensor([row.label for row in rows])
        live = torch.tensor([row.predicted for row in rows])
        paid = torch.tensor([0 <= row.step < self._rolled_back_at for row in rows])
        held = torch.tensor([bool(row.inputs) for row in rows])
        classes = torch.stack([labels, source, live, release, paid, held], 1)
        self._classes = torch.cat([self._classes, classes])[-self._capacity :].clone()
        raw = torch.cat([self._bytes, self._raw(rows)])
        self._bytes = raw[len(raw) - int(self._classes[:, 5].sum()) :].clone()
        self.seen += len(rows)

    def _raw(self, rows: Sequence[Joined]) -> Tensor:
        joined = bytearray().join(row.inputs for row in rows)
        return torch.from_numpy(np.frombuffer(joined, np.uint8)).reshape(-1, self._width)

    def window(self) -> AuditWindow:
        """The rows with inputs as methods see them: what was answered before a rollback is no evidence for another."""
        labels, source, live, release, paid, _ = self._classes[self._classes[:, 5].bool()].unbind(1)
        live = torch.where(paid.bool(), UNKNOWN, live)
        raw = [bytes(row.numpy().data) for row in self._bytes]
        return AuditWindow(self._inputs.stack(raw, self._device), labels, source, live, release)

    def promoted(self, predicted: Tensor) -> None:
        """Hear that a new release predicts the classes ``(N,)`` for the rows of `window`; the others are forgotten."""
        classes = self._classes[self._classes[:, 5].bool()]
        classes[:, 3] = predicted
        self._classes = classes

    def rolled_back(self, step: int) -> None:
        """Hear that the live weights went back to the release; those of before ``step`` answered all rows so far."""
        self._rolled_back_at = step
        self._classes = self._classes.clone()
        self._classes[:, 4] = 1

    def accuracies(self) -> dict[str, float]:
        """Accuracy of ``source``, ``live`` and ``release`` on the window; empty while the window is."""
        classes = self._classes  # read once: another thread may ask while rows are added
        if not len(classes):
            return {}
        right = (classes[:, 1:4] == classes[:, :1]).double().mean(0).tolist()
        return dict(zip(("source", "live", "release"), right, strict=True))

    def flips(self) -> tuple[float, float]:
        """Negative and positive flip rates of the live answers against the release, on the window."""
        classes = self._classes
        if not len(classes):
            return 0.0, 0.0
        labels, _, live, release, *_ = classes.unbind(1)
        negative = ((release == labels) & (live != labels)).double().mean()
        positive = ((release != labels) & (live == labels)).double().mean()
        return float(negative), float(positive)

    def state_dict(self) -> State:
        """Rows as bytes, classes, how many were ever seen, and the step of the last rollback."""
        return {
            "bytes": self._bytes,
            "classes": self._classes,
            "seen": self.seen,
            "rolled_back_at": self._rolled_back_at,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a state."""
        self._bytes, self._classes, self.seen = state["bytes"], state["classes"], state["seen"]
        self._rolled_back_at = state.get("rolled_back_at", 0)
        if self._classes.shape[1] == 4:  # written before rollbacks were heard of
            self._classes = torch.nn.functional.pad(self._classes, (0, 1))
        if self._classes.shape[1] == 5:  # written when the inputs of all rows were here
            self._classes = torch.nn.functional.pad(self._classes, (0, 1), value=1)
