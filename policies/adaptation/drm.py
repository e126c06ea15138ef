"""DRM: several heads, one of each source, of which the surest count most."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from policies.interfaces import Adaptation, Batch, Context, MethodParams, Outcome, PolicyError, State, StepKind
from policies.norm import Pattern
from policies.optimizers import Adam, load_optimizer_state, optimizer_state


class DRM(Adaptation):
    """Mixes the answers of a model's heads row by row, each the more the surer it is.

    Reference: Zhang et al., "Domain-specific risk minimization for domain generalization" (KDD 2023), its use at test
    time.

    Equations, for heads ``j`` with probabilities ``p_j`` and entropies ``H_j`` of a row:

        w_j = (H_j + 1e-8)^-gamma / sum_j (H_j + 1e-8)^-gamma,   p = sum_j w_j p_j

    and with ``gamma < 0`` the answer of the head of least entropy. The answer is ``ln p``. With ``confidence`` up to 1,
    rows of which ``p`` is so sure teach every head their class: one Adam step of the sum over heads of the mean
    cross-entropy; what is before the heads stays.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``; heads take features ``(B, d)``.

    State: where heads are taught, Adam's moments, and the features and classes of sure rows not yet taught.

    Deviations: heads are linear layers with K outputs in the model, which need not use them all: each is given the
    input of the one that ran last. How they were trained is not this method's matter. Weights sum to one over the heads
    that are mixed. A class without probability gets the logarithm of the smallest normal number. A row on which a head
    is not finite does without that head; one on which all are not finite is answered with uniform probabilities. Heads
    that are overconfident always win: bring them to one scale before. The variants that weigh heads by a discriminator
    or by distances to prototypes, and the one that adapts all weights, are left out.

    Cost: one forward and the heads; where heads are taught, a backward through them alone.

    Raises:
        PolicyError: If the model has fewer than two such heads.
    """

    name = "drm"

    class Params(MethodParams):
        """Parameters of DRM.

        Attributes:
            heads: Regular expression that a head's name must match somewhere; empty takes every linear layer with K
                outputs.
            gamma: How much surer heads count more: 0 counts all alike, below 0 the surest alone counts.
            confidence: Confidence from which on a row teaches the heads; above 1 none does.
            lr: Adam's learning rate for the heads.
        """

        heads: Pattern = ""
        gamma: float = 1.0
        confidence: float = Field(default=1.1, ge=0)
        lr: float = Field(default=1e-4, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._heads = heads_of(context.model, params.heads, context.num_classes)
        self._held: Tensor | None = None
        self._hooks = [head.register_forward_pre_hook(self._capture) for head in self._heads.values()]
        self._named = {f"{name}.{key}": p for name, head in self._heads.items() for key, p in head.named_parameters()}
        teaching = params.confidence <= 1
        self.adapted = frozenset(self._named if teaching else ())
        self._optimizer = Adam(self._named.values(), lr=params.lr)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self.gauges |= {"heads": len(self._heads), "kept_ratio": 0.0, "loss": 0.0}

    def _capture(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the heads: keep their input."""
        self._held = args[0]

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's logits, and what the last of its heads to run was given."""
        self._held = None
        logits: Tensor = self.context.model(inputs)
        return logits, self._held

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        logits, features = self._forward(batch.inputs)
        if features is None or features.dim() != 2 or len(features) != len(logits):
            found = "none of its heads ran" if features is None else f"its heads take {tuple(features.shape)}"
            raise PolicyError(
                f"adaptation 'drm' needs a model that gives a head features (rows, d) at each forward: {found}; "
                "name other heads, or choose 'lame' or 'none'"
            )
        mixed = steered(torch.stack([head(features) for head in self._heads.values()]), self.params.gamma)
        self._held = None
        if self.adapted:
            confidence, label = mixed.exp().max(1)
            sure = (confidence >= self.params.confidence) & features.isfinite().all(1) & logits.isfinite().all(1)
            self.gauges["kept_ratio"] = float(sure.double().mean())
            self._waiting.append((features[sure], label[sure]))
        return mixed

    def update(self) -> Outcome | None:
        """Teach the heads the sure rows answered since the last call."""
        if not self._waiting:
            return None
        features, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        if not len(labels):
            return Outcome(applied=False, reason="empty")
        with torch.enable_grad():
            loss = torch.stack([F.cross_entropy(head(features), labels) for head in self._heads.values()]).sum()
        self._held = None
        outcome = self.context.stepper.step(self.context.model, self._optimizer, loss, StepKind.ADAPTATION)
        self.gauges["loss"] = float(loss.detach())
        return outcome

    def reset(self) -> None:
        """Return to the source model; clear the optimizer and what waits."""
        super().reset()
        self._optimizer.state.clear()
        self._waiting = []

    def detach(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> State:
        """Adam's moments and what waits."""
        return {
            "optimizer": optimizer_state(self._optimizer, self._named),
            "waiting": [{"features": features, "labels": labels} for features, labels in self._waiting],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        load_optimizer_state(self._optimizer, self._named, state["optimizer"])
        device = self.context.device
        self._waiting = [(row["features"].to(device), row["labels"].to(device)) for row in state["waiting"]]


def heads_of(model: nn.Module, pattern: str, num_classes: int) -> dict[str, nn.Linear]:
    """The linear layers with ``num_classes`` outputs and equally many inputs whose names match.

    Raises:
        PolicyError: If there are fewer than two, or their inputs differ.
    """
    heads = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes and re.search(pattern, name)
    }
    widths = {head.in_features for head in heads.values()}
    if len(heads) < 2 or len(widths) > 1:
        found = f"takes inputs of {sorted(widths)}" if len(widths) > 1 else f"has {len(heads)}"
        raise PolicyError(
            f"adaptation 'drm' needs two or more heads over the same features, each a torch.nn.Linear with "
            f"{num_classes} outputs: this model {found}; name them with 'heads', or choose 't3a' or 'none'"
        )
    return heads


def steered(logits: Tensor, gamma: float) -> Tensor:
    """Logarithms ``(B, K)`` of the mixture of the heads' answers ``logits (D, B, K)``."""
    finite = logits.isfinite().all(2)
    log_p = torch.where(finite[..., None], logits, torch.zeros_like(logits)).float().log_softmax(2)
    entropy = -(log_p.exp() * log_p).sum(2)
    if gamma < 0:
        least = torch.where(finite, entropy, torch.inf).argmin(0)
        return log_p[least, torch.arange(len(least), device=least.device)]
    log_weights = torch.where(finite, -gamma * (entropy + 1e-8).log(), torch.finfo(entropy.dtype).min)
    mixed = (log_weights.log_softmax(0).exp()[..., None] * log_p.exp()).sum(0)
    return mixed.clamp(min=torch.finfo(mixed.dtype).tiny).log()
