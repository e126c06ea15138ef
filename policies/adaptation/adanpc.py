"""AdaNPC: nearest neighbours among sure features of the stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import softmax_entropy
from policies.features import HeadAdaptation, HeadParams
from policies.interfaces import Batch, Context, State


class AdaNPC(HeadAdaptation):
    """Lets the nearest features of a growing memory vote; weights stay untouched.

    Reference: Zhang et al., "AdaNPC: exploring non-parametric classifier for test-time adaptation" (ICML 2023).

    Equations, for features ``h`` of unit length and a memory of features ``m_j`` of unit length with classes ``y_j``:
    among the ``neighbours`` nearest, ``p_k`` is proportional to ``sum_{j: y_j = k} exp(<h, m_j> / temperature)``. The
    answer is ``ln p``. A row of which the classifier is sure to ``confidence`` joins the memory under the classifier's
    class once its batch is answered.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``; features are flattened to ``(B, d)``.

    State: the memory's features ``(n, d)`` and classes, and where the next one is written.

    Deviations: the original starts with the features of all training data; here the memory starts with the rows of a
    linear classifier, one a class, which stay and follow labelled learning; with so little to vote, votes would confirm
    themselves, so the classifier judges who joins. The memory is bounded: beyond ``capacity``
    the oldest features give way. A class without a vote gets the logarithm of the smallest normal number. Rows without
    finite logits or features are answered by the classifier and join nothing.

    Cost: one forward and ``O(B (n + K) d)``.

    Raises:
        PolicyError: If the classifier is not linear with K outputs.
    """

    name = "adanpc"

    class Params(HeadParams):
        """Parameters of AdaNPC.

        Attributes:
            neighbours: How many features vote.
            temperature: Of the votes.
            confidence: Confidence of the classifier from which on a row joins; above 1 none does.
            capacity: Features of the stream to keep.
        """

        neighbours: int = Field(default=20, ge=1)
        temperature: float = Field(default=0.1, gt=0)
        confidence: float = Field(default=0.75, ge=0)
        capacity: int = Field(default=2000, ge=1)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._forget()

    def _forget(self) -> None:
        weight = self._head.weight.detach()
        self._memory = weight.new_zeros(0, weight.shape[1])
        self._classes = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self._next = 0
        self.gauges["memory_rows"] = 0

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        logits: Tensor = self.context.model(batch.inputs)
        features = self._features.of(batch.inputs, len(logits)).to(self._memory.dtype)
        usable = logits.isfinite().all(1) & features.isfinite().all(1) & (features != 0).any(1)
        if not bool(usable.any()):
            return logits
        rows = F.normalize(features[usable], dim=1)
        votes = self._votes(rows)
        _, confidence, label = softmax_entropy(logits[usable])
        joins = confidence >= self.params.confidence
        self._join(rows[joins], label[joins])
        if len(rows) == len(logits):
            return votes
        answers = logits.clone()
        answers[usable] = votes.to(answers.dtype)
        return answers

    def _votes(self, rows: Tensor) -> Tensor:
        """Logarithms ``(n, K)`` of the shares of votes."""
        templates = self._head.weight
        memory = torch.cat([F.normalize(templates, dim=1), self._memory])
        classes = torch.cat([self._head(templates).argmax(1), self._classes])
        nearest = (rows @ memory.T).topk(min(self.params.neighbours, len(memory)), dim=1)
        weights = (nearest.values / self.params.temperature).softmax(1)
        shares = torch.zeros(len(rows), self.context.num_classes, device=rows.device, dtype=rows.dtype)
        shares.scatter_add_(1, classes[nearest.indices], weights)
        return shares.clamp_(min=torch.finfo(rows.dtype).tiny).log()

    def _join(self, rows: Tensor, labels: Tensor) -> None:
        """Write rows over the oldest once the memory is full."""
        rows, labels = rows[-self.params.capacity :], labels[-self.params.capacity :]
        room = self.params.capacity - len(self._memory)
        if room:
            self._memory = torch.cat([self._memory, rows[:room]])
            self._classes = torch.cat([self._classes, labels[:room]])
        rest = len(rows) - min(room, len(rows))
        if rest:
            places = (self._next + torch.arange(rest, device=rows.device)) % self.params.capacity
            self._memory[places], self._classes[places] = rows[-rest:], labels[-rest:]
            self._next = (self._next + rest) % self.params.capacity
        self.gauges["memory_rows"] = len(self._memory)

    def state_dict(self) -> State:
        """The memory and where the next row goes."""
        return {"memory": self._memory, "classes": self._classes, "next": self._next}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state; a memory larger than ``capacity`` keeps what was written last."""
        device, capacity = self.context.device, self.params.capacity
        memory, classes, start = state["memory"].to(device), state["classes"].to(device), int(state["next"])
        if len(memory) > capacity:
            memory, classes, start = memory.roll(-start, 0)[-capacity:], classes.roll(-start, 0)[-capacity:], 0
        self._memory, self._classes, self._next = memory.clone(), classes.clone(), start
        self.gauges["memory_rows"] = len(memory)
