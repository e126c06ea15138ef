"""Restoring weights towards the source model or the release: at random, or a little every step."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from policies.interfaces import Context, MethodParams, Safeguard, State, StepKind, Weights


class Restore(Safeguard):
    """Lets drift away from an anchor decay with a half-life of ``ln 2 / rate`` steps.

    Reference: stochastic restore is Wang et al., "Continual test-time domain adaptation" (CoTTA, CVPR 2022), eq. 7-8;
    the deterministic pull is the weight ensembling of Marsden et al., "Universal test-time adaptation through weight
    ensembling, diversity weighting, and prior correction" (ROID, WACV 2024).

    Equations, after every step, with the anchor ``a``:

    - ``mode: stochastic``: ``theta <- m a + (1 - m) theta`` with ``m ~ Bernoulli(rate)``, each weight by itself.
    - ``mode: pull``: ``theta <- theta + rate (a - theta)``: the same in expectation, without the noise.

    Shapes: as the parameters.
    State: the generator that draws ``m``, and the anchor where it follows the release.
    Deviations: only parameters that were stepped are restored; the optimizer's memory of them stays. The default
    anchor is the release (the source model before the first): restoring towards the source would undo what a true
    change of the world has taught.
    Cost: one random number a stepped weight (``stochastic``); elementwise.
    """

    name = "restore"

    class Params(MethodParams):
        """Parameters of restoring.

        Attributes:
            mode: At random, or a little every step.
            rate: Share restored in one step, in [0, 1].
            toward: The anchor.
            steps: After which steps: those of adaptation, or labelled ones as well.
        """

        mode: Literal["stochastic", "pull"] = "stochastic"
        rate: float = Field(default=0.01, ge=0, le=1)
        toward: Literal["release", "source"] = "release"
        steps: Literal["adaptation", "all"] = "adaptation"

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        source = {name: p.detach() for name, p in context.source.named_parameters()}
        follows = params.toward == "release"
        self._anchor = {name: p.clone() for name, p in source.items()} if follows else source
        self._generator = torch.Generator(context.device).manual_seed(context.seed)

    @torch.no_grad()
    def after_step(self, model: nn.Module, kind: StepKind, lr: float) -> None:
        """Restore what was stepped."""
        if kind is not StepKind.ADAPTATION and self.params.steps != "all":
            return
        named = model.named_parameters()
        stepped = [(p.detach(), self._anchor[name]) for name, p in named if p.grad is not None and name in self._anchor]
        if not stepped:
            return
        weights, anchors = [list(side) for side in zip(*stepped, strict=True)]
        if self.params.mode == "pull":
            torch._foreach_lerp_(weights, anchors, self.params.rate)
        else:
            self._restore_some(weights, anchors)

    def _restore_some(self, weights: list[Tensor], anchors: list[Tensor]) -> None:
        """Put each weight back with the chance ``rate``, from one draw for all tensors."""
        sizes = [weight.numel() for weight in weights]
        drawn = torch.rand(sum(sizes), generator=self._generator, device=self._generator.device) < self.params.rate
        for weight, anchor, chosen in zip(weights, anchors, torch.split(drawn, sizes), strict=True):
            weight.copy_(torch.where(chosen.view_as(weight), anchor, weight))

    @torch.no_grad()
    def released(self, release: Weights) -> None:
        """Move the anchor to the release, where it follows it."""
        if self.params.toward == "release":
            for name, anchor in self._anchor.items():
                anchor.copy_(release[name])

    def state_dict(self) -> State:
        """The generator, and the anchor where it follows the release."""
        anchor = dict(self._anchor) if self.params.toward == "release" else {}
        return {"generator": self._generator.get_state(), "anchor": anchor}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        """Take over generator and anchor; an anchor that the state lacks stays the source model's."""
        self._generator.set_state(state["generator"].cpu())
        if self.params.toward == "release":
            for name, tensor in state["anchor"].items():
                self._anchor[name].copy_(tensor)
