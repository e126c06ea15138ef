"""RoTTA: robust BatchNorm, a class-balanced bank and a time-aware teacher and student."""

from __future__ import annotations

import copy
import logging

import torch
from pydantic import Field
from torch import Tensor

from kernels import lerp_
from policies.augment import ViewParams
from policies.banked import BankedAdaptation
from policies.interfaces import Context, State, Weights, load_weights
from policies.memory import Bank, Timetable
from policies.norm import Blending, NormSelection
from policies.optimizers import Adam, load_optimizer_state, optimizer_state
from policies.teachers import follow

_log = logging.getLogger(__name__)


class RoTTA(BankedAdaptation):
    """Adapts on a small bank that is balanced over classes, so that class-correlated streams do no harm.

    Reference: Yuan et al., "Robust test-time adaptation in dynamic scenarios" (CVPR 2023).

    The live model is the teacher; a student of the same shape lives inside the method.

    Equations:

    - Robust BatchNorm, while updating: ``mu_t = (1 - a) mu + a mu_B``, ``v_t = (1 - a) v + a v_B`` (biased); normalise
      with the blend, let gradients flow through the batch's part, then store it. Otherwise: stored statistics.
    - The bank keeps ``capacity`` inputs by CSTU, see `policies.memory.Timetable`, under the teacher's pseudo-label and
      entropy.
    - After every ``interval`` inputs: teacher on the bank, student on a strongly augmented bank, both updating their
      statistics; with ages ``a_i`` in units of the capacity and ``E(a) = exp(-a) / (1 + exp(-a))``

          L = (1 / n) sum_i E(a_i) CE(softmax(z_T,i), softmax(z_S,i))

      One Adam step of the student; then ``theta_T <- (1 - nu) theta_T + nu theta_S`` over the adapted parameters.
      Statistics are not averaged.

    Shapes: inputs ``(B, *shape)``, of one shape throughout, to the teacher's logits ``(B, K)`` of before the update.

    State: the student, the bank's inputs and timetable, Adam's moments, the generator, the number of inputs seen, and
    rows answered but not yet offered to the bank. The bank holds raw inputs, so a checkpoint does too.

    Deviations: affine parameters of LayerNorm and GroupNorm adapt too (``layers: [batch]`` is the paper's choice).
    Rows are offered to the bank when `update` runs. A step that is not applied leaves the statistics as they were; one
    that is not finite also empties the bank. Rows without finite logits are not offered. Augmentation: see
    `policies.augment.strong_image`. The outcome depends on the order of rows.

    Cost: one forward a batch; per ``interval`` inputs two forwards and one backward on at most ``capacity`` rows,
    without gradients of frozen weights. Memory: a second model and the bank.

    Raises:
        PolicyError: If no affine parameter of a normalisation layer is selected, or inputs change their shape.
    """

    name = "rotta"

    class Params(NormSelection, ViewParams):
        """Parameters of RoTTA.

        Attributes:
            capacity: Inputs that the bank holds.
            interval: Inputs between two updates.
            nu: Share of the student that the teacher takes on at an update.
            alpha: Share of the batch in robust BatchNorm (a).
            lambda_t: Weight of age in the bank's score.
            lambda_u: Weight of uncertainty in the bank's score.
            lr: Adam's learning rate.
            beta1: Adam's first decay; the second is 0.999.
        """

        capacity: int = Field(default=64, ge=1)
        interval: int = Field(default=64, ge=1)
        nu: float = Field(default=0.001, ge=0, le=1)
        alpha: float = Field(default=0.05, ge=0, le=1)
        lambda_t: float = Field(default=1.0, ge=0)
        lambda_u: float = Field(default=1.0, ge=0)
        lr: float = Field(default=1e-3, ge=0)
        beta1: float = Field(default=0.9, ge=0, lt=1)

    _bank: Bank

    def __init__(self, params: Params, context: Context) -> None:
        bank = Bank(Timetable(params.capacity, context.num_classes, params.lambda_t, params.lambda_u))
        super().__init__(params, context, bank, params.interval)
        self.params = params
        self._bank = bank
        self._teacher = params.parameters(context.model)
        self.adapted = frozenset(self._teacher)
        self._student_model = copy.deepcopy(context.model)
        for name, parameter in self._student_model.named_parameters():
            parameter.requires_grad_(name in self.adapted)
        self._student = params.parameters(self._student_model)
        self._teacher_norm = Blending(context.model, share=params.alpha, unbiased=False, store=True)
        self._student_norm = Blending(self._student_model, share=params.alpha, unbiased=False, store=True)
        self._optimizer = Adam(self._student.values(), lr=params.lr, betas=(params.beta1, 0.999))
        self._generator = torch.Generator(context.device).manual_seed(context.seed)
        self._stepped_model = self._student_model
        counts = sum(p.numel() for p in self._student.values()), len(self._student)
        _log.info("rotta adapts %d values in %d parameters", *counts)
        self.gauges["adapted_values"] = counts[0]

    def _statistics(self) -> list[Tensor]:
        return self._teacher_norm.statistics() + self._student_norm.statistics()

    def _stepped(self) -> None:
        lerp_(list(self._teacher.values()), list(self._student.values()), self.params.nu)

    def _loss(self) -> Tensor:
        """The weighted cross-entropy between teacher and student on the bank."""
        inputs = self._bank.inputs
        with torch.no_grad(), self._teacher_norm.active():
            target = self.context.model(inputs).softmax(1)
        view = self.params.view(inputs, self._generator)
        with torch.enable_grad(), self._student_norm.active():
            cross_entropy = -(target * self._student_model(view).log_softmax(1)).sum(1)
            loss: Tensor = (timeliness(self._bank.ages()) * cross_entropy).mean()
        return loss

    def learned(self, before: Weights, after: Weights) -> None:
        """Move the student as the teacher was moved."""
        follow(self._student_model, self.adapted, before, after)

    def reset(self) -> None:
        """Return teacher and student to the source model and forget everything."""
        super().reset()
        load_weights(self._student_model, self.context.source.state_dict())
        self._generator.manual_seed(self.context.seed)

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._teacher_norm.undo()

    def state_dict(self) -> State:
        """The student, the bank, the optimizer, the generator and the counter."""
        return super().state_dict() | {
            "student": self._student_model.state_dict(),
            "optimizer": optimizer_state(self._optimizer, self._student),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        super().load_state_dict(state)
        load_weights(self._student_model, state["student"])
        load_optimizer_state(self._optimizer, self._student, state["optimizer"])
        self._generator.set_state(state["generator"].cpu())


def timeliness(ages: Tensor) -> Tensor:
    """Weights ``E(a) = exp(-a) / (1 + exp(-a))`` in (0, 1/2] of ages ``(n,)`` in units of the bank's capacity."""
    return torch.sigmoid(-ages)
