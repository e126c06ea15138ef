"""Parameters of `policies.adaptation.auto`."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from policies.gradient import GradientParams
from policies.interfaces import PolicyError

PRIOR_ROWS = 16
"""What the stream's statistics are worth, in rows, beside those of a batch."""

SLOWEST = 5.0
"""By how much statistics are learned slower at most."""

BUNCHED = 0.1
"""Bunching of classes, in units of 1 / K, above which rows of a window do not come independently."""

EVENED = 10
"""By how much less bunched answers are that a batch's own statistics have evened out over classes."""

COMPARED = 12
"""Windows over which bunching is measured before it counts, as many more each time that it has counted."""

FIRST_PROBE = 3
"""Windows of calm until adapting is probed again although nothing calls for it."""


class AutoParams(GradientParams):
    """Parameters of auto; the defaults are meant to be left alone.

    Attributes:
        window: Rows between two looks at the stream.
        patience: Looks in a row that it takes to change a switch, or to give up what is estimated to be of no use.
        sure: Student's t of the information that rows gain from which on adapting begins; 1.645 is passed by chance in
            5 % of cases.
        gain: Information, in units of the entropy of answers, that they have to gain; twice as much where groups mix.
        worse: Information that answers lack while adapting, in units of the entropy with the source model's
            statistics, from which on adapting does not pay.
        risen: Rise of the entropy while calm, as a factor, from which on adapting is tried again.
        moved: Distance of features, in deviations, from which on a model without BatchNorm is adapted.
        reference: Rows at the start that those distances are from.
        persistence: Probability of staying from which on classes are correlated.
        alike: Likeness of rows that follow one another in one class from which on the chain of classes is not trusted:
            their errors are alike as well then, and the chain would take them for evidence.
        imbalance: Excess of pairs of one class from which on batches are imbalanced.
        share: Largest share of a batch's own statistics.
        every: Batches to a step; 0 makes none.
        common_rate: Share of 64 rows in the statistics of the stream.
        offset_rate: Share of a window in the offsets of its classes; 0 keeps none, for very many classes.
        rest: Windows of rest at the source model after a collapse, or once labels have ended something.
    """

    window: int = Field(default=64, ge=2)
    patience: int = Field(default=3, ge=1)
    sure: float = 1.645
    gain: float = 0.05
    worse: float = Field(default=0.1, ge=0)
    risen: float = Field(default=1.15, ge=1)
    moved: float = Field(default=0.25, ge=0)
    reference: int = Field(default=256, ge=2)
    persistence: float = Field(default=0.2, ge=0, le=1)
    alike: float = Field(default=0.3, ge=0)
    imbalance: float = Field(default=0.1, gt=0, le=1)
    share: float = Field(default=0.8, ge=0, le=1)
    every: int = Field(default=2, ge=0)
    common_rate: float = Field(default=0.1, gt=0, lt=1)
    offset_rate: float = Field(default=0.1, ge=0, le=1)
    rest: int = Field(default=16, ge=0)

    def selected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters to step; none in a model without normalisation layers."""
        if not self.every:
            return {}
        try:
            return self.parameters(model)
        except PolicyError:
            return {}
