"""NHL: the first convolution learns by a local rule, and a modulator behind it by the entropy of answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from policies.adaptation.tent import Tent
from policies.gradient import Anchor, Anchored
from policies.interfaces import Context, Outcome, PolicyError, State
from policies.norm import all_finite

_log = logging.getLogger(__name__)


class NHL(Anchored, Tent):
    """Lets the first convolution follow the stream without an error signal, and steers what comes after it.

    Reference: Tang et al., "Neuro-modulated Hebbian learning for fully test-time adaptation" (CVPR 2023). **A
    reconstruction**: its equations were not at hand. From it are the parts and their roles (soft competitive Hebbian
    learning in the first convolution alone, a small modulator behind it trained by entropy, a frozen rest). The local
    rule is that of Journé et al., "Hebbian deep learning without feedback" (ICLR 2023). The modulator's form, the bound
    and all defaults are choices of this project; figures of the original are no measure of it.

    Equations, per position of the convolution with patch ``x`` and ``u_c = <W_c, x>`` without bias:

        y = softmax(u / temperature) over channels;  with ``anti`` negative for all but the largest
        dW_c = sum over rows and positions of y_c (x - u_c W_c),   W <- W + eta dW / max |dW|

    and where ``||W - W_s|| > bound ||W_s||`` the source's ``W_s`` is put back. The modulator is the scale and shift of
    the first normalisation layer behind it with as many channels, else the convolution's bias; it takes the step of
    `policies.adaptation.tent.Tent`.

    Shapes: as of `policies.adaptation.tent.Tent`.

    State: the optimizer's moments, ``W_s``, and the inputs of batches answered but not yet adapted to.

    Deviations: as of `policies.adaptation.tent.Tent`. The original adapts before it answers; here the answer comes
    first. Where the entropy step is not applied, neither is the local one. ``W_s`` moves along with labelled learning.

    Cost: one forward; a backward through the whole network, and one through the first convolution.

    Raises:
        PolicyError: If the model has no convolution, or nothing that could modulate the first one.
    """

    name = "nhl"

    class Params(Tent.Params):
        """Parameters of NHL; ``layers``, ``include`` and ``exclude`` say which normalisation layers may modulate.

        Attributes:
            eta: Largest change of a weight of the convolution at a step.
            temperature: Of the competition between channels.
            anti: Whether channels that lose unlearn what the winner learns.
            bound: Distance from the source, in units of its norm, at which the convolution returns to it.
        """

        eta: float = Field(default=1e-4, ge=0)
        temperature: float = Field(default=1.0, gt=0)
        anti: bool = True
        bound: float = Field(default=0.05, gt=0)

        def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
            """The modulator.

            Raises:
                PolicyError: If the model has no convolution, or no modulator.
            """
            name, conv = first_convolution(model)
            try:
                selected = super().parameters(model)
            except PolicyError:
                selected = {}
            behind = False
            for path, module in model.named_modules():
                own = {key: p for key, p in selected.items() if key.rpartition(".")[0] == path}
                if behind and own and all(p.shape == (conv.out_channels,) for p in own.values()):
                    return own
                behind = behind or module is conv
            if isinstance(conv.bias, nn.Parameter):
                return {f"{name}.bias" if name else "bias": conv.bias}
            raise PolicyError(
                f"nothing can modulate the convolution {name!r}: it has no bias, and no selected normalisation layer "
                f"behind it has {conv.out_channels} channels; choose 'tent', 'lame' or 'none'"
            )

    params: Params

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        name, self._conv = first_convolution(context.model)
        self._weight = f"{name}.weight" if name else "weight"
        self.adapted |= {self._weight}
        self._anchor = Anchor(context, frozenset({self._weight}))
        self._learning = False
        self._changes: list[Tensor] = []
        self._hook = self._conv.register_forward_hook(self._learn)
        self.gauges |= {"distance": 0.0, "returns": 0}

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """As of TENT, with the local rule watching the convolution."""
        self._learning = True
        try:
            with super()._gradients():
                yield
        finally:
            self._learning = False

    def _learn(self, conv: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        """Forward hook of the convolution: note what the local rule would change."""
        if self._learning:
            self._changes.append(hebbian(self._conv, out, self.params.temperature, anti=self.params.anti))

    def update(self) -> Outcome | None:
        """Step on the rows answered since the last call."""
        if len(self._graphs) < len(self._waiting):
            self._changes = []  # these batches go through the model again
        try:
            return super().update()
        finally:
            self._changes = []

    def _stepped(self) -> None:
        """The local step, and the way back where it went too far."""
        change = torch.stack(self._changes).sum(0)
        largest = change.abs().amax()
        if not all_finite([change]) or largest == 0:
            return
        weight, source = self._conv.weight, self._anchor.values[self._weight]
        weight.add_(change / largest, alpha=self.params.eta)
        distance = float((weight - source).norm() / source.norm().clamp(min=torch.finfo(source.dtype).tiny))
        self.gauges["distance"] = distance
        if not distance <= self.params.bound:
            weight.copy_(source)
            self.gauges["returns"] += 1
            _log.info("nhl: the convolution returns to the source, %.3g from it", distance)

    def reset(self) -> None:
        """Return to the source model and forget what waits."""
        super().reset()
        self._changes = []

    def detach(self) -> None:
        """Remove the hook and put the original BatchNorm layers back."""
        super().detach()
        self._hook.remove()

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        self._changes = []


def first_convolution(model: nn.Module) -> tuple[str, _ConvNd]:
    """The first convolution in the order of the model's definition, and its name.

    Raises:
        PolicyError: If there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) and not module.transposed:
            return name, module
    raise PolicyError("adaptation 'nhl' needs a convolution: the model has none; choose 'tent', 'lame' or 'none'")


def hebbian(conv: _ConvNd, out: Tensor, temperature: float, *, anti: bool) -> Tensor:
    """What the local rule adds to the weight of a convolution, not scaled.

    Args:
        conv: The convolution.
        out: What it gave ``(B, C, ...)``, with a graph to its weight.
        temperature: Of the competition between channels.
        anti: Whether losing channels unlearn.
    """
    with torch.no_grad():
        plain = out if conv.bias is None else out - conv.bias.view(1, -1, *[1] * (out.dim() - 2))
        chosen = (plain / temperature).softmax(1)
        if anti:
            winner = torch.zeros_like(chosen).scatter_(1, plain.argmax(1, keepdim=True), 1.0)
            chosen = torch.where(winner > 0, chosen, -chosen)
        decay = (chosen * plain).sum([0, *range(2, out.dim())])
    # The gradient of sum y u for the weight is the sum of y x over rows and positions, whatever stride and padding.
    (patches,) = torch.autograd.grad(out, conv.weight, chosen, retain_graph=True)
    return patches - decay.view(-1, *[1] * (patches.dim() - 1)) * conv.weight.detach()
