"""MeZO-style updates: entropy minimised by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kernels import softmax_entropy
from policies.gradient import GradientAdaptation, GradientParams
from policies.interfaces import Context, State
from policies.optimizers import SGD
from policies.sharpness import with_gradients


class MeZO(GradientAdaptation):
    """Minimises the entropy of its predictions along one random direction a batch, with no backward pass.

    Reference: Malladi et al., "Fine-tuning language models with just forward passes" (NeurIPS 2023); the loss is that
    of `policies.adaptation.tent.Tent`.

    Equations, per batch, with ``z ~ N(0, I)`` over the adapted parameters ``phi``:

        g = (L(phi + eps z) - L(phi - eps z)) / (2 eps),   phi <- phi - lr g z

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``, those of before the step.

    State: the generator, the optimizer's moments, and the inputs of batches answered but not yet adapted to.

    Deviations: as of `policies.adaptation.tent.Tent`. Both points are computed from a saved copy, which is put back bit
    for bit: adding and subtracting in place does not return to the start in any precision. The step is the optimizer's,
    plain gradient descent by default. Gradients this noisy suit few parameters and small
    learning rates.

    Cost: three forwards, no backward.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected.
    """

    name = "mezo"

    class Params(GradientParams):
        """Parameters of MeZO.

        Attributes:
            optimizer: ``sgd`` without momentum, or ``adam``.
            lr: Learning rate.
            eps: How far from the weights the loss is measured.
        """

        optimizer: Literal["adam", "sgd"] = "sgd"
        lr: float = Field(default=1e-4, ge=0)
        eps: float = Field(default=1e-3, gt=0)

        def built(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            """The optimizer over ``parameters``."""
            if self.optimizer == "sgd":
                return SGD(parameters, lr=self.lr)
            return super().built(parameters)

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self._generator = torch.Generator(context.device).manual_seed(context.seed)

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Batch statistics, and no gradients."""
        with torch.no_grad(), self._blending.active():
            yield

    def _loss(self, inputs: Tensor, logits: Tensor) -> Tensor:
        parameters = list(self._named.values())

        def loss() -> Tensor:
            return softmax_entropy(self._forward(inputs)).entropy.mean()

        slope, drawn = directional(parameters, self.params.eps, self._generator, loss)
        return with_gradients(softmax_entropy(logits).entropy.mean(), parameters, [slope * z for z in drawn])

    def reset(self) -> None:
        """Return to the source model and to the generator's start."""
        super().reset()
        self._generator.manual_seed(self.context.seed)

    def state_dict(self) -> State:
        """The generator beside what every gradient method holds."""
        return super().state_dict() | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"].cpu())


@torch.no_grad()
def directional(
    parameters: Sequence[nn.Parameter], eps: float, generator: torch.Generator, loss: Callable[[], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The slope of a loss along a random direction.

    Args:
        parameters: Moved while ``loss`` runs, and bit for bit as before afterwards.
        eps: How far.
        generator: Draws the direction, parameter by parameter; on their device.
        loss: Gives a scalar at the present parameters.

    Returns:
        The slope, and the direction by parameter.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    drawn = [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in parameters]
    values = []
    try:
        for sign in (1, -1):
            for parameter, start, z in zip(parameters, before, drawn, strict=True):
                torch.add(start, z, alpha=sign * eps, out=parameter.data)
            values.append(loss())
    finally:
        torch._foreach_copy_([parameter.detach() for parameter in parameters], before)
    return (values[0] - values[1]) / (2 * eps), drawn
