"""RDumb: ETA that returns to the source every so many batches."""

from __future__ import annotations

from pydantic import Field

from policies.adaptation.eata import ETA
from policies.gradient import Anchor, Anchored
from policies.interfaces import Context, Outcome, State


class RDumb(Anchored, ETA):
    """Adapts as `ETA` does and starts over at fixed intervals, which on long streams beats all that never does.

    Reference: Press et al., "RDumb: a simple approach that questions our progress in continual test-time adaptation"
    (NeurIPS 2023).

    Equations: those of `ETA`; batches ``0, every, 2 every, ...`` meet the source's weights, an empty optimizer and no
    running mean.

    Shapes: as of `ETA`.

    State: that of `ETA`, the anchor that resets return to, and the number of batches seen.

    Deviations: those of `ETA`. A reset happens once the batch before it has been adapted to. The anchor is the source
    model's weights, moved along by labelled learning.

    Cost: as of `ETA`.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "rdumb"

    class Params(ETA.Params):
        """Parameters of RDumb.

        Attributes:
            every: Batches between two resets.
        """

        every: int = Field(default=1000, ge=1)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._anchor = Anchor(context, self.adapted)
        self._batches = 0
        self.gauges["resets"] = 0

    def update(self) -> Outcome | None:
        """Step on the rows answered since the last call; start over where that is due."""
        before = self._batches // self.params.every
        self._batches += len(self._waiting)
        outcome = super().update()
        if self._batches // self.params.every > before:
            self._start_over()
        return outcome

    def _start_over(self) -> None:
        """The anchor's values, an empty optimizer, no running mean."""
        self._anchor.restore(self._named)
        self._optimizer.state.clear()
        self._mean = None
        self.gauges["resets"] += 1

    def reset(self) -> None:
        """Return to the source model and count anew."""
        super().reset()
        self._batches = 0

    def state_dict(self) -> State:
        """Anchor and count beside what `ETA` holds."""
        return super().state_dict() | {"batches": self._batches}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._batches = int(state["batches"])
