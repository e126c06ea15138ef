"""What the core is given and what it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.codec import Events


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """What the core needs to know of a policy.

    Attributes:
        batch_size: Labelled rows of one learning step.
        max_delay: Seconds of event time after which fewer rows are learned from.
        audit_share: Share of feedback held out for the audit window, in [0, 1].
        release_every: Joined labels between two release attempts; 0 for never.
        store_inputs: Whether inputs wait for their feedback, or feedback carries them.
        all_inputs: Whether those wait that nobody has a use for as well; see `engine.needs`.
        background: Whether jobs run beside serving; else each runs at once, where it is made.
        window: Seconds by which one row may move the watermark; see `engine.watermark`.
        freeze_after: Rollbacks after which nothing adapts or learns any more; 0 for never. See `engine.freeze`.
    """

    batch_size: int
    max_delay: float
    audit_share: float
    release_every: int
    store_inputs: bool
    background: bool
    window: float = math.inf
    freeze_after: int = 0
    all_inputs: bool = False


class Answers(NamedTuple):
    """Answers to one batch, in row order."""

    events: Events
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    release: int
    step: int
