"""A release gate with a budget of negative flips."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from policies.flips import (
    UNKNOWN,
    FlipCounts,
    accuracy_gain_lower_bound,
    count_flips,
    rate_upper_bound,
    rows_needed,
    worse_e_value,
)
from policies.interfaces import (
    Action,
    AuditWindow,
    Candidate,
    Context,
    Decision,
    Evidence,
    Gate,
    MethodParams,
)


@dataclass(frozen=True, slots=True)
class _Tested:
    """A candidate with what the window says of it; ``failure`` is empty where it passes."""

    index: int
    alpha: float
    flips: FlipCounts
    upper: float
    failure: str

    @property
    def merit(self) -> tuple[float, float, float]:
        """Best accuracy first, then fewest negative flips, then nearest to the release."""
        return self.flips.new_accuracy, -self.flips.nfr, self.alpha


class Flips(Gate):
    """Promotes the most accurate candidate whose negative flips are surely within a budget.

    Reference: negative flips are those of Yan et al., "Positive-congruent training" (CVPR 2021); the bound is Clopper
    and Pearson's (1934); the rollback test is a mixture e-value on discordant pairs.

    Equations, on the ``N`` rows of the audit window, with ``b`` negative and ``c`` positive flips against the release:

        NFR bound:  BetaInv(confidence; b + 1, N - b) <= budget
        accuracy:   (c - b) / N - 1.645 sqrt(b + c - (b - c)^2 / N) / N >= -margin
        roll back:  E(b', c') >= 1 / rollback_error for the flips of the daemon's own answers against the release

    Many candidates, one window: they are tested from the oldest (largest alpha) to the newest, and testing stops at
    the first that fails. A candidate is tested only if all before it passed, so the chance that any candidate passes
    although its rate exceeds the budget stays at ``1 - confidence``, however many there are and whichever is taken.
    One more negative flip never turns a failure into a pass.

    Reasons. Promote: ``passed``. Hold: ``no_candidates``, ``too_few`` (rows), ``flips`` or ``accuracy`` (the first
    candidate that differs fails so), ``unchanged`` (no candidate that passed answers differently), ``no_gain`` (none
    that passed is more accurate than the release). Roll back: ``live_worse``.

    A roll back waits for nothing but evidence, however few the rows. It is not called for where today's live weights
    (the candidate of alpha 0) are no less accurate than the release: they have recovered from what the answers show.

    State: none.
    Deviations: the level of ``rollback_error`` holds for each window by itself, not for all looks together, since
    windows slide; its default is strict for that reason.
    Cost: counting; bounds take milliseconds for windows of thousands.
    """

    name = "flips"

    class Params(MethodParams):
        """Parameters of the gate.

        Attributes:
            budget: Largest rate of negative flips.
            confidence: One-sided confidence of the bound on it.
            margin: Accuracy that a candidate may lose at worst.
            min_rows: Least rows to promote on; None takes those on which no flip at all proves the budget (299 for
                1 % at 95 %).
            rollback_error: Chance of rolling back live weights that are no worse, per window.
        """

        budget: float = Field(default=0.01, gt=0, lt=1)
        confidence: float = Field(default=0.95, gt=0.5, lt=1)
        margin: float = Field(default=0.005, ge=0, le=0.25)
        min_rows: int | None = Field(default=None, ge=1)
        rollback_error: float = Field(default=0.001, gt=0, lt=1)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self.min_rows = params.min_rows or rows_needed(params.budget, params.confidence)

    def decide(self, evidence: Evidence) -> Decision:
        """Decide on the evidence alone; the same evidence always gives the same decision."""
        figures = _accuracies(evidence.window)
        if self._live_is_worse(evidence):
            return Decision(Action.ROLL_BACK, "live_worse", figures=figures)
        if len(evidence.window) < self.min_rows:
            return Decision(Action.HOLD, "too_few", figures=figures)
        if not evidence.candidates:
            return Decision(Action.HOLD, "no_candidates", figures=figures)
        return self._choose(self._test(evidence), figures)

    def _choose(self, tested: list[_Tested], figures: dict[str, float]) -> Decision:
        """The best of the candidates that passed, if it is better than the release."""
        passed = [one for one in tested if not one.failure]
        better = [one for one in passed if one.flips.positive > one.flips.negative]
        if better:
            best = max(better, key=lambda one: one.merit)
            return Decision(Action.PROMOTE, "passed", best.index, figures | _figures(best))
        last = tested[-1]
        changed = any(one.flips.positive or one.flips.negative for one in passed)
        reason = last.failure or ("no_gain" if changed else "unchanged")
        return Decision(Action.HOLD, reason, figures=figures | _figures(last))

    def _test(self, evidence: Evidence) -> list[_Tested]:
        """Test candidates from old to new up to the first that fails, which is the last of the result."""
        tested: list[_Tested] = []
        order = sorted(range(len(evidence.candidates)), key=lambda index: -evidence.candidates[index].alpha)
        for index in order:
            tested.append(self._one(index, evidence.candidates[index], evidence.window))
            if tested[-1].failure:
                break
        return tested

    def _one(self, index: int, candidate: Candidate, window: AuditWindow) -> _Tested:
        """Hold one candidate against the budget and the margin."""
        flips = count_flips(window.release, candidate.predicted, window.labels)
        upper = rate_upper_bound(flips.negative, flips.rows, self.params.confidence)
        if upper > self.params.budget:
            failure = "flips"
        else:
            failure = "accuracy" if accuracy_gain_lower_bound(flips) < -self.params.margin else ""
        return _Tested(index, candidate.alpha, flips, upper, failure)

    def _live_is_worse(self, evidence: Evidence) -> bool:
        """Whether the daemon's answers were worse than the release's, and its weights of today may still be."""
        window = evidence.window
        known = window.live != UNKNOWN
        flips = count_flips(window.release[known], window.live[known], window.labels[known])
        if worse_e_value(flips) < 1 / self.params.rollback_error:
            return False
        today = [one for one in evidence.candidates if one.alpha == 0]
        return not any(_no_worse(count_flips(window.release, one.predicted, window.labels)) for one in today)


def _no_worse(flips: FlipCounts) -> bool:
    return flips.positive >= flips.negative


def _accuracies(window: AuditWindow) -> dict[str, float]:
    """Accuracy of each model on the rows that it answered; a model that answered none is left out."""
    found: dict[str, float] = {}
    for name, predicted in (("release", window.release), ("live", window.live), ("source", window.source)):
        known = predicted != UNKNOWN
        if bool(known.any()):
            found[f"accuracy_{name}"] = float((predicted == window.labels)[known].double().mean())
    return found


def _figures(one: _Tested) -> dict[str, float]:
    """The numbers of the candidate that the decision rests on."""
    return {
        "alpha": one.alpha,
        "nfr": one.flips.nfr,
        "nfr_upper": one.upper,
        "pfr": one.flips.pfr,
        "nfi": one.flips.nfi,
        "accuracy_candidate": one.flips.new_accuracy,
    }
