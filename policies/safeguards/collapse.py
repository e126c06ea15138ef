"""Detecting a collapsed model by comparing it with the source model on the same rows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from policies.interfaces import Batch, Context, MethodParams, Safeguard, State, Verdict

WHOLE_BATCH = 16
"""Sampled rows are gathered up to this many, so that large batches pay for few forwards of useful size."""

CONSTANT = 0.1
"""Answers that carry less than this share of the source's information do not depend on their rows."""

LEAST_INFORMATION = 0.05
"""Nats of information about its rows below which the source itself says nothing to compare with."""


class Collapse(Safeguard):
    """Resets the live model when it answers with few classes where the source model sees many.

    Reference: none; the entropy of the mean answer is a common sign of collapse (Niu et al., "Towards stable test-time
    adaptation in dynamic wild world", ICLR 2023, watch a like one), which a narrow stream shows too. Hence the pairing.

    Equations, with decayed means over sampled rows, ``p`` the live and ``q`` the source model's probabilities:

        n(p) = exp(H(mean p)),   I(p) = H(mean p) - mean H(p),   agreement = mean [argmax p = argmax q]

    A window of ``window`` sampled rows is bad if live and source agree on less than ``agreement`` of the rows, and
    either ``n(p) < ratio * n(q)`` (few classes) or ``I(p) < 0.1 I(q)`` (the same answer to everything). After
    ``patience`` bad windows in a row the verdict is a reset.

    A stream whose classes truly come in runs narrows the source's answers as well, and so passes.

    Shapes: logits ``(B, K)``; state of ``2 K + 9`` numbers.
    State: decayed sums of ``p``, ``q``, their entropies, agreement and rows; counts; the share of a row owed.
    Deviations: rows are the first of a batch, so many that their share of all rows is ``share``; the decay is
    ``1 - 1 / window`` a sampled row. Rows that either model cannot answer with finite numbers are left out.
    Labels are not looked at: they come late and for few rows. So a source model that is right on fewer than
    ``agreement`` of the rows of one class, while that class alone comes for ``patience`` windows, looks like a
    collapse of a live model that is right; a longer ``window`` avoids it.
    Cost: one forward of the source model over ``share`` of the rows.
    """

    name = "collapse"

    class Params(MethodParams):
        """Parameters of collapse detection.

        Attributes:
            share: Share of all rows that the source model answers too.
            ratio: Live classes per source class below which a window is bad.
            agreement: Share of rows with the same answer from which a window is good.
            window: Sampled rows a window; None takes ten a class, at least 100.
            patience: Bad windows in a row that lead to a reset.
            cooldown: Windows after a reset in which no window counts as bad.
        """

        share: float = Field(default=0.1, gt=0, le=1)
        ratio: float = Field(default=0.5, gt=0, lt=1)
        agreement: float = Field(default=0.5, gt=0, le=1)
        window: int | None = Field(default=None, ge=1)
        patience: int = Field(default=3, ge=1)
        cooldown: int = Field(default=3, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self.window = params.window or max(100, 10 * context.num_classes)
        self._owed = 0.0
        self._resets = 0
        self._rest = 0
        self._forget()

    def _forget(self) -> None:
        """Start measuring afresh."""
        classes = self.context.num_classes
        self._sums = torch.zeros(2 * classes + 4, dtype=torch.float64)
        """Decayed sums over sampled rows: p, q, H(p), H(q), agreement, and how many rows."""
        self._rows = 0
        self._strikes = 0
        self.gauges |= {"resets": self._resets, "strikes": 0}

    def _decay(self, rows: int) -> float:
        return (1 - 1 / self.window) ** rows

    def verdict(self, batch: Batch, logits: Tensor) -> Verdict:
        """Compare the answers with the source model's on a few rows; judge at the end of every window."""
        self._owed += self.params.share * len(batch)
        rows = min(int(self._owed), len(batch))
        if rows == 0 or rows < min(len(batch), WHOLE_BATCH):
            return Verdict.KEEP
        self._owed -= rows
        self._measure(batch.inputs[:rows], logits[:rows].detach())
        if self._rows < self.window:
            return Verdict.KEEP
        self._rows %= self.window
        return self._judge()

    @torch.no_grad()
    def _measure(self, inputs: Tensor, logits: Tensor) -> None:
        """Fold the answers to some rows into the decayed sums; one device round trip."""
        other = self.context.source(inputs)
        valid = inputs.flatten(1).isfinite().all(1) & logits.isfinite().all(1) & other.isfinite().all(1)
        live, source = _summary(logits), _summary(other)
        same = (logits.argmax(1) == other.argmax(1)).float()[:, None]
        parts = [live[0], source[0], live[1], source[1], same, torch.ones_like(same)]
        values = torch.where(valid[:, None], torch.cat(parts, 1), 0.0).sum(0).cpu().double()
        rows = int(values[-1])
        self._sums.mul_(self._decay(rows)).add_(values)
        self._rows += rows

    def _judge(self) -> Verdict:
        """Whether the window just ended is one bad window too many."""
        if self._rest > 0:
            self._rest -= 1
        self._strikes = self._strikes + 1 if self._bad() and self._rest == 0 else 0
        self.gauges["strikes"] = self._strikes
        if self._strikes < self.params.patience:
            return Verdict.KEEP
        self._resets += 1
        self._rest = self.params.cooldown + 1
        self._forget()
        return Verdict.RESET

    def _bad(self) -> bool:
        """Whether the decayed means show a collapse."""
        classes = self.context.num_classes
        means = self._sums / self._sums[-1]
        live, source = _entropy(means[:classes]), _entropy(means[classes : 2 * classes])
        live_information, source_information = live - float(means[-4]), source - float(means[-3])
        agreement = float(means[-2])
        self.gauges |= {"live_classes": math.exp(live), "source_classes": math.exp(source), "agreement": agreement}
        few = math.exp(live) < self.params.ratio * math.exp(source)
        constant = source_information > LEAST_INFORMATION and live_information < CONSTANT * source_information
        return (few or constant) and agreement < self.params.agreement

    def reset(self) -> None:
        """Start measuring afresh: the live model is the source model again."""
        self._forget()

    def state_dict(self) -> State:
        """Decayed sums, counts, and the share of a row owed."""
        return {
            "sums": self._sums,
            "rows": self._rows,
            "strikes": self._strikes,
            "owed": self._owed,
            "resets": self._resets,
            "rest": self._rest,
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        self._resets, self._rest, self._owed = int(state["resets"]), int(state["rest"]), float(state["owed"])
        sums = state["sums"].cpu().clone()
        self._forget()
        self._sums, self._rows, self._strikes = sums, int(state["rows"]), int(state["strikes"])
        self.gauges["strikes"] = self._strikes


def _summary(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities ``(n, K)`` and their entropies ``(n, 1)``."""
    logarithms = F.log_softmax(logits.float(), 1)
    chances = logarithms.exp()
    return chances, -(chances * logarithms.clamp_min(-1e30)).sum(1, keepdim=True)


def _entropy(distribution: Tensor) -> float:
    """Entropy in nats of ``(K,)`` probabilities."""
    return float(torch.special.entr(distribution).sum())
