"""CoTTA: an averaged teacher, answers averaged over views, and random returns to the source."""

from __future__ import annotations

import copy
import logging

import torch
from pydantic import Field
from torch import Tensor

from kernels import lerp_
from policies.augment import ViewParams
from policies.interfaces import (
    Adaptation,
    Batch,
    Context,
    Outcome,
    State,
    StepKind,
    Weights,
    load_weights,
)
from policies.memory import fastest
from policies.norm import Blending
from policies.optimizers import Adam, load_optimizer_state, optimizer_state
from policies.teachers import follow
from policies.waiting import Waiting

_log = logging.getLogger(__name__)


class CoTTA(Adaptation):
    """Trains all weights of a student on the answers of its slowly following teacher, and undoes some of it by chance.

    Reference: Wang et al., "Continual test-time domain adaptation" (CVPR 2022).

    The live model is the teacher; a student of the same shape and a copy of the source, the anchor, live inside.

    Equations, per batch, all BatchNorm layers with the statistics of the batch:

    - ``c = mean_i max_k p_a,ik`` of the anchor; the teacher's logits are ``z' = f'(x)``, and where ``c < threshold``
      the mean of ``f'(view_j(x))`` over ``views`` strongly augmented views;
    - ``L = mean_i CE(softmax z'_i, softmax z_i)``, ``z = f(x)`` of the student; with ``symmetric`` the mean of that and
      of ``CE(softmax z_i, softmax z'_i)``; one step of the student on all its weights;
    - ``theta' <- momentum theta' + (1 - momentum) theta``;
    - every element of ``theta`` returns to the anchor's with probability ``restore``;
    - the answer is ``z'``.

    Shapes: inputs ``(B, *shape)`` to the teacher's logits ``(B, K)``, those of before the step.

    State: student, anchor, the optimizer's moments, the generator, and inputs and answers not yet adapted to.

    Deviations: the views are not computed where they are not used. Statistics of BatchNorm are never stored, so teacher
    and student keep the source's. The anchor moves along with labelled learning. Rows without finite logits of the
    teacher or the student are left out. Every batch answered since the last `update` makes a step of its own.
    ``threshold`` should be a low quantile of the source model's confidence on inputs it was made for: 0.92 suits 10
    classes, 0.72 a hundred, 0.1 a thousand. For inputs that are no images, views are `policies.augment.feature_noise`.

    Cost: forwards of anchor and teacher (``views`` of the teacher where it is unsure), one forward and backward of the
    student on all weights. Memory: three models and the moments of all weights.
    """

    name = "cotta"

    class Params(ViewParams):
        """Parameters of CoTTA.

        Attributes:
            momentum: Share that the teacher keeps of itself at a step.
            restore: Chance of each weight to return to the source; 0.01 suits 10 classes, 0.001 a thousand.
            threshold: Confidence of the anchor below which answers are averaged over views.
            views: How many.
            symmetric: Whether the loss goes both ways.
            lr: Adam's learning rate.
        """

        momentum: float = Field(default=0.999, ge=0, le=1)
        restore: float = Field(default=0.01, ge=0, le=1)
        threshold: float = Field(default=0.92, ge=0, le=1)
        views: int = Field(default=32, ge=1)
        symmetric: bool = False
        lr: float = Field(default=1e-3, ge=0)

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._teacher = {name: p for name, p in context.model.named_parameters() if p.is_floating_point()}
        self.adapted = frozenset(self._teacher)
        self._student_model = copy.deepcopy(context.model).requires_grad_(True)
        self._anchor_model = copy.deepcopy(context.source).requires_grad_(False)
        self._student = dict(self._student_model.named_parameters())
        self._anchor = dict(self._anchor_model.named_parameters())
        models = (context.model, self._student_model, self._anchor_model)
        self._norms = [Blending(model, share=1.0, unbiased=False, store=False) for model in models]
        self._optimizer = Adam(self._student.values(), lr=params.lr)
        self._generator = torch.Generator(context.device).manual_seed(context.seed)
        self._waiting = Waiting()
        values = sum(p.numel() for p in self._student.values())
        _log.info("cotta adapts %d values in %d parameters", values, len(self._student))
        self.gauges |= {"adapted_values": values, "anchor_confidence": 0.0, "loss": 0.0, "rows_rejected": 0}

    @torch.no_grad()
    def _adapt(self, batch: Batch) -> Tensor:
        inputs = fastest(batch.inputs)
        with self._norms[0].active(), self._norms[2].active():
            anchored = self._anchor_model(inputs).softmax(1).amax(1)
            confidence = float(anchored[anchored.isfinite()].mean().nan_to_num(nan=1.0))
            logits: Tensor
            if confidence < self.params.threshold:
                logits = self.context.model(self.params.view(inputs, self._generator))
                for _ in range(self.params.views - 1):
                    logits += self.context.model(self.params.view(inputs, self._generator))
                logits /= self.params.views
            else:
                logits = self.context.model(inputs)
        self.gauges["anchor_confidence"] = confidence
        self._waiting.add(inputs, logits)
        return logits

    def update(self) -> Outcome | None:
        """Step on every batch answered since the last call."""
        outcome = None
        for inputs, answered in self._waiting.take():
            outcome = self._step(inputs, answered)
        return outcome

    def _step(self, inputs: Tensor, answered: Tensor) -> Outcome:
        """Step the student, let the teacher follow, return some of the student to the anchor."""
        with torch.enable_grad(), self._norms[1].active():
            logits = self._student_model(inputs)
            finite = (logits.detach().isfinite() & answered.isfinite()).all(1)
            kept = int(finite.sum())
            self.gauges["rows_rejected"] += len(logits) - kept
            if kept == 0:
                return Outcome(applied=False, reason="empty")
            loss = self._loss(answered[finite], logits[finite])
        outcome = self.context.stepper.step(self._student_model, self._optimizer, loss, StepKind.ADAPTATION)
        self.gauges["loss"] = float(loss.detach())
        if outcome.applied:
            students = [self._student[name] for name in self._teacher]
            lerp_(list(self._teacher.values()), students, 1 - self.params.momentum)
            self._restore()
        return outcome

    def _loss(self, answered: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of the student's logits ``(n, K)`` with the teacher's."""
        loss = -(answered.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        if not self.params.symmetric:
            return loss
        return (loss - (logits.softmax(1) * answered.log_softmax(1)).sum(1).mean()) / 2

    @torch.no_grad()
    def _restore(self) -> None:
        """Return elements of the student to the anchor by chance."""
        if self.params.restore == 0:
            return
        flat = torch.cat([p.flatten() for p in self._student.values()])
        back = torch.rand(len(flat), generator=self._generator, device=flat.device) < self.params.restore
        for (name, parameter), mask in zip(
            self._student.items(), back.split([p.numel() for p in self._student.values()]), strict=True
        ):
            parameter.copy_(torch.where(mask.view_as(parameter), self._anchor[name], parameter))

    def learned(self, before: Weights, after: Weights) -> None:
        """Move student and anchor as the teacher was moved."""
        for model in (self._student_model, self._anchor_model):
            follow(model, self.adapted, before, after)

    def reset(self) -> None:
        """Return teacher, student and anchor to the source model and forget everything."""
        super().reset()
        for model in (self._student_model, self._anchor_model):
            load_weights(model, self.context.source.state_dict())
        self._optimizer.state.clear()
        self._generator.manual_seed(self.context.seed)
        self._waiting.clear()

    def detach(self) -> None:
        """Put the original BatchNorm layers back."""
        self._norms[0].undo()

    def state_dict(self) -> State:
        """Student, anchor, optimizer, generator, and what waits."""
        return {
            "student": self._student_model.state_dict(),
            "anchor": self._anchor_model.state_dict(),
            "optimizer": optimizer_state(self._optimizer, self._student),
            "generator": self._generator.get_state(),
            "waiting": self._waiting.state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        load_weights(self._student_model, state["student"])
        load_weights(self._anchor_model, state["anchor"])
        load_optimizer_state(self._optimizer, self._student, state["optimizer"])
        self._generator.set_state(state["generator"].cpu())
        self._waiting.load(state["waiting"], self.context.device)
