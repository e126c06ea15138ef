"""Experience replay from a reservoir that redelivery does not change."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from policies.interfaces import Context, LabelledBatch, MethodParams, Safeguard, State, StepKind
from policies.safeguards.modes import in_eval_mode


class Replay(Safeguard):
    """Adds the loss on remembered labelled rows to every labelled step.

    Reference: reservoir sampling is Vitter (1985), by hashed priorities so that it is idempotent; replay with
    cross-entropy is Chaudhry et al., "On tiny episodic memories in continual learning" (2019).

    Equations: row ``i`` has the priority ``u_i = blake2b_64(salt, id_i)``; the ``M = capacity`` rows of largest ``u``
    are kept, a uniform sample without replacement of all ids ever seen. The penalty is
    ``weight * mean CE(f(x_j), y_j)`` over ``batch`` rows ``j`` drawn without replacement.

    Shapes: rows ``(M, *shape)``, labels ``(M,)``, allocated once when the first row comes.
    State: rows, labels, ids, salt, and the generator that draws.
    Deviations: an id that comes again changes nothing, not even with another label. Rows that are not finite are not
    kept. The forward runs in eval mode, so running statistics stay as they are. A reset of the live model keeps the
    rows: their labels are as true as before.
    Cost: one forward and backward over ``batch`` rows a labelled step; a hash a labelled row.
    """

    name = "replay"

    class Params(MethodParams):
        """Parameters of replay.

        Attributes:
            capacity: Rows kept, ``M``.
            batch: Rows drawn for one step.
            weight: Weight of their mean loss beside that of the step.
        """

        capacity: int = Field(default=5000, ge=1)
        batch: int = Field(default=64, ge=1)
        weight: float = Field(default=1.0, gt=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._salt = context.seed
        self._generator = torch.Generator().manual_seed(context.seed)
        self._inputs: Tensor | None = None
        self._labels = torch.zeros(params.capacity, dtype=torch.int64, device=context.device)
        self._clear()

    def _clear(self) -> None:
        self._ids: list[str] = []
        self._known: set[str] = set()
        self._least: list[tuple[int, str, int]] = []
        """A heap of ``(priority, id, slot)``: the row to give up is on top."""
        self.gauges["rows"] = 0

    def __len__(self) -> int:
        """Rows kept at present."""
        return len(self._ids)

    @torch.no_grad()
    def observe(self, batch: LabelledBatch) -> None:
        """Keep the rows whose priority is among the largest."""
        if len(batch) == 0:
            return
        finite = batch.inputs.flatten(1).isfinite().all(1).tolist()
        kept = self._admit((row, key) for row, key in enumerate(batch.ids) if finite[row])
        if not kept:
            return
        if self._inputs is None:
            self._inputs = batch.inputs.new_zeros((self.params.capacity, *batch.inputs.shape[1:]))
        slots = torch.tensor(list(kept), device=batch.inputs.device)
        rows = torch.tensor(list(kept.values()), device=batch.inputs.device)
        self._inputs[slots] = batch.inputs[rows].to(self._inputs)
        self._labels[slots] = batch.labels[rows].to(self._labels)

    def _admit(self, rows: Iterable[tuple[int, str]]) -> dict[int, int]:
        """Take ids in by priority; the row of the batch that each changed slot now holds."""
        kept: dict[int, int] = {}
        for row, key in rows:
            if key in self._known:
                continue
            priority = self._priority(key)
            if len(self._ids) < self.params.capacity:
                slot = len(self._ids)
                self._ids.append(key)
                heapq.heappush(self._least, (priority, key, slot))
            elif (priority, key) > self._least[0][:2]:
                slot = self._least[0][2]
                heapq.heapreplace(self._least, (priority, key, slot))
                self._known.remove(self._ids[slot])
                self._ids[slot] = key
            else:
                continue
            self._known.add(key)
            kept[slot] = row
        self.gauges["rows"] = len(self._ids)
        return kept

    def _priority(self, key: str) -> int:
        """64 bits that depend on the id and the salt alone."""
        salt = (self._salt % 2**64).to_bytes(8, "little")
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest()
        return int.from_bytes(digest, "little")

    def penalty(self, model: nn.Module, kind: StepKind) -> Tensor | None:
        """The weighted mean loss of a draw; None before the first row and in steps without labels."""
        if kind is not StepKind.LEARNING or self._inputs is None or not self._ids:
            return None
        drawn = torch.randperm(len(self._ids), generator=self._generator)[: self.params.batch].to(self._labels.device)
        with in_eval_mode(model):
            logits = model(self._inputs[drawn])
        return self.params.weight * F.cross_entropy(logits, self._labels[drawn])

    def state_dict(self) -> State:
        """The rows kept, their labels and ids, the salt, and the generator."""
        return {
            "salt": self._salt,
            "generator": self._generator.get_state(),
            "ids": list(self._ids),
            "inputs": None if self._inputs is None else self._inputs[: len(self._ids)],
            "labels": self._labels[: len(self._ids)],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over the rows; a smaller capacity keeps those of largest priority."""
        inputs, labels, ids = state["inputs"], state["labels"].clone(), state["ids"]
        self._clear()
        self._inputs = None
        self._salt = int(state["salt"])
        self._generator.set_state(state["generator"].cpu())
        if inputs is None:
            return
        inputs = inputs.to(self._labels.device).clone()
        self._inputs = inputs.new_zeros((self.params.capacity, *inputs.shape[1:]))
        kept = self._admit(enumerate(ids))
        slots, rows = list(kept), list(kept.values())
        self._inputs[slots] = inputs[rows]
        self._labels[slots] = labels.to(self._labels.device)[rows]
