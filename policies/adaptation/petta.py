"""PeTTA: RoTTA whose teacher slows down, and whose student is held back, the further classes drift."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels import lerp_
from policies.adaptation.rotta import RoTTA
from policies.features import Features
from policies.interfaces import Context, Outcome, State, Weights, load_weights
from policies.teachers import follow


class PeTTA(RoTTA):
    """RoTTA for streams that go on for long and come back: it senses how far classes have left the source.

    Reference: Hoang et al., "Persistent test-time adaptation in recurring testing scenarios" (NeurIPS 2024).

    Equations: bank, robust BatchNorm, teacher and student as of `RoTTA`; at each update, with the source's mean ``m_c``
    and variance ``s_c`` of the features of class ``c`` and the running mean ``h_c`` of the teacher's on the bank:

        h_c <- (1 - follow) h_c + follow * mean of features of c,   D = mean_{c on the bank, j} (h_cj - m_cj)^2 / (s_cj
        + 1e-6) g = 1 - exp(-D),   lambda = g * pull,   alpha = (1 - g) * nu

    and with the teacher's, the student's (plain and augmented) and the source's probabilities ``p', p, p_a, p_s``:

        L = (CE(p', p) + CE(p, p') + CE(p', p_a) + CE(p_a, p')) / 4 + lambda R + anchor * CE(p_s, p_a)
        R = - mean over parameters of cos(phi, phi_s);   the teacher takes on the share ``alpha`` of the student

    Shapes: as of `RoTTA`; features are flattened to ``(B, d)``.

    State: that of `RoTTA`, the source copy, sums for ``m`` and ``s`` (``3 K d`` numbers) and ``h (K, d)``.

    Deviations: those of `RoTTA`. The original takes ``m`` and ``s`` from data of the source. Here they come from the
    source model's features and labels on the first ``prototype_rows`` rows of the stream; until then ``D = 0``. Classes
    that had fewer than two rows do not count in ``D``. Gradients flow through both sides of the first two terms but not
    through the teacher. The source copy moves along with labelled learning.

    Cost: as of `RoTTA` and, for each update, forwards of student and source on the bank and a backward through two
    passes of the student; for the first ``prototype_rows`` rows one forward of the source. Memory: a third model.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected, the model offers no features, or
            inputs change their shape.
    """

    name = "petta"

    class Params(RoTTA.Params):
        """Parameters of PeTTA; ``nu`` is the teacher's rate where nothing has drifted.

        Attributes:
            pull: Weight of the likeness to the source's parameters where everything has drifted.
            anchor: Weight of the source model's answers.
            follow: Share of the newest features in the running mean of a class.
            prototype_rows: Rows of the stream to measure the source's features on.
            layer: Name of the module whose input is the features; empty finds the classifier by itself.
        """

        pull: float = Field(default=10.0, ge=0)
        anchor: float = Field(default=1.0, ge=0)
        follow: float = Field(default=0.05, ge=0, le=1)
        prototype_rows: int = Field(default=512, ge=2)
        layer: str = ""

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._source_model = copy.deepcopy(context.source).requires_grad_(False)
        self._source = params.parameters(self._source_model)
        self._features = Features(context.model, params.layer, context.num_classes, self.name)
        self._source_features = Features(self._source_model, params.layer, context.num_classes, self.name)
        self._forget()

    def _forget(self) -> None:
        self._rate = self.params.nu
        self._rows = 0
        self._sums: Tensor | None = None
        self._running: Tensor | None = None
        self.gauges |= {"drift": 0.0, "prototype_rows": 0}

    def update(self) -> Outcome | None:
        """Measure the source's features where that is due; then as RoTTA."""
        for inputs, _ in self._waiting:
            if self._rows < self.params.prototype_rows:
                self._measure(inputs)
        return super().update()

    @torch.no_grad()
    def _measure(self, inputs: Tensor) -> None:
        """Add rows to the counts, sums and sums of squares ``(3, K, d)`` of the source's features."""
        logits = self._source_model(inputs)
        features = self._source_features.of(inputs, len(logits)).double()
        good = logits.isfinite().all(1) & features.isfinite().all(1)
        features, labels = features[good], logits[good].argmax(1)
        if self._sums is None:
            self._sums = features.new_zeros(3, self.context.num_classes, features.shape[1])
        for held, term in zip(self._sums, (torch.ones_like(features), features, features.square()), strict=True):
            held.index_add_(0, labels, term)
        self._rows += len(labels)
        self.gauges["prototype_rows"] = self._rows

    def _drifted(self, features: Tensor, labels: Tensor) -> float:
        """``D``, having moved the running means by the bank's features ``(n, d)`` of classes ``labels (n,)``."""
        if self._sums is None or self._rows < self.params.prototype_rows:
            return 0.0
        counts, totals, squares = self._sums
        mean = totals / counts.clamp(min=1)
        var = (squares / counts.clamp(min=1) - mean.square()).clamp(min=0)
        self._running = mean.clone() if self._running is None else self._running
        found = torch.zeros_like(mean).index_add_(0, labels, features.double())
        here = torch.bincount(labels, minlength=len(mean)).to(found)[:, None]
        moved = torch.lerp(self._running, found / here.clamp(min=1), self.params.follow)
        self._running = torch.where((here > 0) & moved.isfinite(), moved, self._running)
        known = (here[:, 0] > 0) & (counts[:, 0] >= 2)
        distance = ((self._running - mean).square() / (var + 1e-6))[known]
        return float(distance.mean()) if len(distance) else 0.0

    def _loss(self) -> Tensor:
        inputs = self._bank.inputs
        with torch.no_grad():
            with self._teacher_norm.active():
                teacher = self.context.model(inputs)
            features = self._features.of(inputs, len(teacher))
            drift = self._drifted(features, teacher.argmax(1))
            source = self._source_model(inputs)
        strength, self._rate = persistence(drift, self.params.pull, self.params.nu)
        self.gauges["drift"] = min(drift, 1e30)
        view = self.params.view(inputs, self._generator)
        with torch.enable_grad(), self._student_norm.active():
            plain, strong = self._student_model(inputs), self._student_model(view)
            pairs = [_cross(teacher, plain), _cross(plain, teacher), _cross(teacher, strong), _cross(strong, teacher)]
            loss = torch.stack(pairs).sum() / 4 + self.params.anchor * _cross(source, strong)
            likeness = [
                F.cosine_similarity(parameter.flatten(), self._source[name].flatten(), 0)
                for name, parameter in self._student.items()
            ]
            return loss - strength * torch.stack(likeness).mean()

    def _stepped(self) -> None:
        lerp_(list(self._teacher.values()), list(self._student.values()), self._rate)

    def learned(self, before: Weights, after: Weights) -> None:
        """Move student and source copy as the teacher was moved."""
        super().learned(before, after)
        follow(self._source_model, self.adapted, before, after)

    def reset(self) -> None:
        """Return all models to the source and forget everything."""
        super().reset()
        load_weights(self._source_model, self.context.source.state_dict())
        self._forget()

    def detach(self) -> None:
        """Remove the hook and put the original BatchNorm layers back."""
        super().detach()
        self._features.remove()

    def state_dict(self) -> State:
        """Source copy, sums and running means beside what RoTTA holds."""
        own = {"source": self._source_model.state_dict(), "sums": self._sums, "running": self._running}
        return super().state_dict() | own | {"rows": self._rows}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        load_weights(self._source_model, state["source"])
        device = self.context.device
        sums, running = state["sums"], state["running"]
        self._sums = None if sums is None else sums.to(device, copy=True)
        self._running = None if running is None else running.to(device, copy=True)
        self._rows = int(state["rows"])


def _cross(target: Tensor, logits: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``(n, K)`` with the softmax of the logits ``target``."""
    return -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def persistence(drift: float, pull: float, nu: float) -> tuple[float, float]:
    """Weight of the likeness to the source, and the teacher's rate, at this ``D``."""
    gone = -math.expm1(-drift)
    return gone * pull, (1 - gone) * nu
