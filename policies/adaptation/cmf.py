"""CMF: ROID with a filtered hidden model in place of the source weights."""

from __future__ import annotations

import torch
from pydantic import Field

from kernels import lerp_
from policies.adaptation.roid import ROID
from policies.interfaces import Context, State, Weights

VALUES_AT_WHICH_NOISE_IS_SET = 38400


class CMF(ROID):
    """ROID whose weights are pulled towards a Kalman-filtered mean of their own path that leans towards the source.

    Reference: Lee & Chang, "Continual momentum filtering on parameter space for online test-time adaptation" (ICLR
    2024).

    Equations: those of `ROID`, but after the step, with a hidden model ``h`` (the source at first), a variance ``v`` (0
    at first) and ``q = noise * |phi| / 38400``, at most 1:

        h <- a h + (1 - a) phi_s,   v <- a^2 v + q,   b = r / (v + r) with r = 1 - q
        b clipped to [0.89, 1], and 1 from 0.9999 on;   h <- b h + (1 - b) phi,   v <- b v
        phi <- g phi + (1 - g) h

    Shapes: as of `ROID`.

    State: that of `ROID`, ``h`` and ``v``.

    Deviations: those of `ROID`. `reset` sets ``v`` to 0 too. ``h`` moves along with labelled learning.

    Cost: as of `ROID`, and one more copy of the adapted parameters.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "cmf"

    class Params(ROID.Params):
        """Parameters of CMF; ``pull`` is the share ``1 - g`` of the hidden model.

        Attributes:
            keep: ``a``, the share of the hidden model that the source leaves in it.
            process_noise: ``noise``.
        """

        keep: float = Field(default=0.99, ge=0, le=1)
        process_noise: float = Field(default=0.005, ge=0)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._hidden = {name: value.clone() for name, value in self._anchor.values.items()}
        self._variance = 0.0
        values = sum(value.numel() for value in self._hidden.values())
        self._noise = min(1.0, params.process_noise * values / VALUES_AT_WHICH_NOISE_IS_SET)

    def _stepped(self) -> None:
        hidden = list(self._hidden.values())
        live = [self._named[name].data for name in self._hidden]
        lerp_(hidden, [self._anchor.values[name] for name in self._hidden], 1 - self.params.keep)
        share, self._variance = filtered(self._variance, self.params.keep, self._noise)
        lerp_(hidden, live, 1 - share)
        lerp_(live, hidden, self.params.pull)

    @torch.no_grad()
    def learned(self, before: Weights, after: Weights) -> None:
        """Move anchor and hidden model as the live weights were moved."""
        super().learned(before, after)
        for name in self._hidden.keys() & after.keys():
            self._hidden[name].add_(after[name] - before[name])

    def reset(self) -> None:
        """Return to the source model, the hidden one too, and forget everything."""
        super().reset()
        for name, value in self._anchor.values.items():
            self._hidden[name].copy_(value)
        self._variance = 0.0

    def state_dict(self) -> State:
        """Hidden model and variance beside what ROID holds."""
        return super().state_dict() | {"hidden": dict(self._hidden), "variance": self._variance}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        for name in self._hidden.keys() & state["hidden"].keys():
            self._hidden[name].copy_(state["hidden"][name])
        self._variance = float(state["variance"])


def filtered(variance: float, keep: float, noise: float) -> tuple[float, float]:
    """One turn of the filter.

    Returns:
        The share ``b`` that the hidden model keeps of itself, and the variance afterwards.
    """
    variance = keep * keep * variance + noise
    rest = 1 - noise
    share = rest / (variance + rest) if variance + rest > 0 else 1.0
    share = min(max(share, 0.89), 1.0)
    share = 1.0 if share >= 0.9999 else share
    return share, share * variance
