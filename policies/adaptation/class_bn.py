"""Class-adjusted BatchNorm statistics: an average of the stream that does not lean towards the classes of the hour."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from policies.interfaces import Adaptation, Batch, Context, MethodParams, Outcome, PolicyError, State
from policies.moments import StreamStatistics


class ClassAdjustedBatchNorm(Adaptation):
    """Follows a stream with the BatchNorm statistics, adjusted for the classes that it predicts; no gradients.

    Reference: none; an analysis of variance with one factor, fitted row by row. Methods with the same aim keep a bank
    balanced by class (RoTTA) or statistics of each class (TRIBE).

    Equations: moments of what reaches each layer, row by row, are split into a common part and offsets of the predicted
    classes, see `policies.moments.ClassMoments`. The layers normalise with the common part alone, as it stood before
    the batch: ``mean = g_1``, ``var = g_2 - g_1^2``, in units of the source model's statistics.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``.

    State: the common part and the offsets, ``(K + 1) 2 C`` numbers for ``C`` channels in all layers, and the moments of
    rows that wait for a window. The live model's statistics hold what follows from them.

    Deviations: an answer does not depend on the other rows of its batch, so batches of one, several groups interleaved
    and correlated classes are all the same to it. Rows whose moments are not finite are left out and counted.

    Cost: one forward and two sums over each layer's input.

    Raises:
        PolicyError: If the model has no BatchNorm layer with running statistics.
    """

    name = "class_bn"

    class Params(MethodParams):
        """Parameters of class-adjusted statistics.

        Attributes:
            common_rate: Share of 64 rows in the common part.
            offset_rate: Share of a window in the offsets of its classes; 0 keeps none, for very many classes.
            window: Rows to learn from at once.
        """

        common_rate: float = Field(default=0.1, gt=0, lt=1)
        offset_rate: float = Field(default=0.1, ge=0, le=1)
        window: int = Field(default=64, ge=1)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._statistics = StreamStatistics(
            context, common_rate=params.common_rate, offset_rate=params.offset_rate, window=params.window
        )
        if not len(self._statistics):
            raise PolicyError(
                "adaptation 'class_bn' does nothing for this model: it has no BatchNorm layer with running statistics; "
                "choose 'tent', 'lame' or 'none'"
            )
        self._gauge(0.0)

    def _gauge(self, drift: float) -> None:
        self.gauges |= {"layers": len(self._statistics), "rows_rejected": self._statistics.rejected, "drift": drift}

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        with self._statistics.measuring():
            logits: Tensor = self.context.model(batch.inputs)
        self._statistics.take(logits.argmax(1))
        return logits

    def update(self) -> Outcome | None:
        """Learn from a window of rows once there is one."""
        if self._statistics.learn():
            self._statistics.write(source=False)
            self._gauge(self._statistics.drift())
        return None

    def reset(self) -> None:
        """Return to the source model and forget all moments."""
        super().reset()
        self._statistics.reset()

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._statistics.blending.undo()

    def state_dict(self) -> State:
        """Moments and rows that wait."""
        return self._statistics.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self._statistics.load_state_dict(state)
