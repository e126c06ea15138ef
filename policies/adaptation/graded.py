"""Graded resets: ETA that goes back to the source as far as there is reason to."""

from __future__ import annotations

import logging
import math

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from kernels import lerp_
from policies.adaptation.rdumb import RDumb
from policies.interfaces import Context, Outcome, State

RESTING = "resting"
"""A full reset was made not long ago; nothing is adapted to yet."""

_log = logging.getLogger(__name__)


class GradedReset(RDumb):
    """Adapts as `ETA` does, gives back part of it while signs of harm grow, and all of it once one is beyond its limit.

    Reference: the triggers of a reset are those of `policies.adaptation.sar.SAR` (a running entropy too low), of
    `RDumb` (a fixed interval) and of usual watches for collapse (classes vanish, answers differ from the source's).
    The grades between nothing and a reset are a construction of this project, of no paper.

    Equations, with decayed means over watched rows of the answers ``p`` and of ``q``, what the same rows would be
    answered after a reset, ``n(p) = exp(H(mean p))``, and ``ramp(x; a, b)`` 0 at ``a``, 1 at ``b``, linear between:

        g = max(ramp(mean [argmax p != argmax q]; disagreement / 2, disagreement),
                ramp(n(p) / n(q); (1 + spread) / 2, spread),
                ramp(mean H(p) / ln K; 2 entropy, entropy))

    After each step ``phi <- phi + rate g (phi_s - phi)``. At ``g = 1``, and every ``every`` batches, a full reset: the
    source's weights, an empty optimizer, no running mean, no evidence, and no step for ``cooldown`` batches.

    Shapes: as of `ETA`.

    State: that of `RDumb`, sums over watched rows (``2 K + 3`` numbers), counts of these and of all rows, and batches
    left to rest.

    Deviations: those of `RDumb`. One row in ``watch`` is watched. The source's answers are those of the live model with
    the anchor's values, BatchNorm with its stored statistics, so that what labels taught does not count as harm.
    Nothing is judged before ``memory`` rows were watched.

    Cost: as of `ETA`, and one forward over the watched rows.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "graded"

    class Params(RDumb.Params):
        """Parameters of graded resets.

        Attributes:
            disagreement: Share of answers other than the source's from which on all is given back.
            spread: Effective classes of the answers, per one of the source's, down from which all is given back.
            entropy: Mean entropy in units of ``ln K`` down from which all is given back; 0 never does.
            rate: Share of the way back at a step where ``g`` is 1.
            cooldown: Batches without a step after a reset.
            watch: Rows per watched one.
            memory: Watched rows over which evidence is averaged.
        """

        disagreement: float = Field(default=0.8, gt=0, le=1)
        spread: float = Field(default=0.3, ge=0, lt=1)
        entropy: float = Field(default=0.01, ge=0, lt=1)
        rate: float = Field(default=0.1, ge=0, le=1)
        cooldown: int = Field(default=10, ge=0)
        watch: int = Field(default=16, ge=1)
        memory: int = Field(default=64, ge=1)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._rest = 0
        self._rows = 0
        self._forget_evidence()

    def _forget_evidence(self) -> None:
        self._watched = 0
        self._sums = torch.zeros(2 * self.context.num_classes + 3, dtype=torch.float64)
        """Decayed sums over watched rows: p, q, H(p), disagreement, rows."""
        self.gauges |= {"grade": 0.0, "disagreement": 0.0}

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor | None:
        self._watch(inputs, logits.detach())
        return super()._loss(inputs, logits)

    @torch.no_grad()
    def _watch(self, inputs: Tensor, logits: Tensor) -> None:
        """Compare some rows with what they would be answered after a reset."""
        places = range(-self._rows % self.params.watch, len(inputs), self.params.watch)
        self._rows = (self._rows + len(inputs)) % self.params.watch
        if not places:
            return
        chosen = torch.tensor(places, device=inputs.device)
        source = functional_call(self.context.model, self._anchor.values, (inputs[chosen],)).double().softmax(1)
        live = logits[chosen].double().softmax(1)
        differ = (live.argmax(1) != source.argmax(1)).double()[:, None]
        entropy = torch.special.entr(live).sum(1, keepdim=True)
        seen = torch.cat([live, source, entropy, differ, torch.ones_like(differ)], 1).cpu()
        seen = seen[seen.isfinite().all(1)]
        self._watched = min(self._watched + len(seen), self.params.memory)
        self._sums = self._sums * (1 - 1 / self.params.memory) ** len(seen) + seen.sum(0)

    def _grade(self) -> float:
        """How much of what was adapted to should be given back, in [0, 1]."""
        if self._watched < self.params.memory:
            return 0.0
        means = self._sums / self._sums[-1]
        classes = self.context.num_classes
        live, source = (float(torch.special.entr(part).sum().exp()) for part in means[:-3].split(classes))
        entropy, differ = means[-3:-1].tolist()
        self.gauges["disagreement"] = differ
        limits = self.params
        grade = max(
            ramp(differ, limits.disagreement / 2, limits.disagreement),
            ramp(live / source, (1 + limits.spread) / 2, limits.spread),
            ramp(entropy / math.log(classes), 2 * limits.entropy, limits.entropy)
            if limits.entropy and classes > 1
            else 0.0,
        )
        self.gauges["grade"] = grade
        return grade

    def update(self) -> Outcome | None:
        """Step on the rows answered since the last call unless at rest; then give back what there is reason to."""
        if self._rest and self._waiting:
            self._rest = max(0, self._rest - len(self._waiting))
            self._batches += len(self._waiting)
            self._forget()
            return Outcome(applied=False, reason=RESTING)
        outcome = super().update()
        grade = self._grade() if outcome is not None and outcome.applied else 0.0
        if grade >= 1:
            _log.info("graded: reset; answers differ from the source's on %.3g of rows", self.gauges["disagreement"])
            self._start_over()
        elif grade > 0:
            names = sorted(self._named)
            values = [self._anchor.values[name] for name in names]
            lerp_([self._named[name].data for name in names], values, self.params.rate * grade)
        return outcome

    def _start_over(self) -> None:
        super()._start_over()
        self._forget_evidence()
        self._rest = self.params.cooldown

    def reset(self) -> None:
        """Return to the source model, forget the evidence and rest no more."""
        super().reset()
        self._forget_evidence()
        self._rest = self._rows = 0

    def state_dict(self) -> State:
        """Evidence and rest beside what `RDumb` holds."""
        own = {"sums": self._sums, "watched": self._watched, "rest": self._rest, "rows": self._rows}
        return super().state_dict() | own

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._sums = state["sums"].to("cpu", copy=True)
        self._watched, self._rest, self._rows = int(state["watched"]), int(state["rest"]), int(state["rows"])


def ramp(value: float, start: float, end: float) -> float:
    """0 at ``start`` and before it, 1 at ``end`` and beyond it, linear between; ``end`` may be the smaller one."""
    return min(1.0, max(0.0, (value - start) / (end - start)))
