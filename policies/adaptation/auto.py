"""Auto: notices which stream it is on, and does what helps there; the source model is the floor."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from kernels import softmax_entropy
from policies.auto_params import BUNCHED, COMPARED, EVENED, FIRST_PROBE, PRIOR_ROWS, SLOWEST, AutoParams
from policies.chain import ClassChain
from policies.gradient import Anchor
from policies.interfaces import Adaptation, Batch, Context, Outcome, State, StepKind, Verdict, Weights
from policies.memory import fastest
from policies.modes import Calm, Part, Probe, Switch, Switches, Trials
from policies.moments import StreamStatistics
from policies.norm import only_require_grad
from policies.optimizers import load_optimizer_state, optimizer_state
from policies.safeguards.collapse import Collapse
from policies.streamview import StreamView

_log = logging.getLogger(__name__)


class Auto(Adaptation):
    """Composes statistics, answers and steps by what the stream shows; the source model is the floor.

    Reference: none as a whole. Statistics: `policies.moments`. Answers: `policies.chain`. Steps: Wang et al., "Tent"
    (ICLR 2021).

    What is in force, looked at after every ``window`` rows and changed with hysteresis:

    - ``adapting``: layers normalise with the statistics of the stream, adjusted for classes, and the more balanced over
      classes windows are, with those of the batch: its share is ``share B / (B + 16) max(0, 1 - imbalance / limit)``.
      Off until a probe on a few rows shows that it pays (`policies.modes.Probe`). From then on now and then a batch is
      answered with the source model's statistics too (`policies.modes.Trials`); where those tell more, all goes back.
      Probes grow rare while they speak against it, unless entropy rises or inputs move (`policies.modes.Calm`).
    - ``correlated``: a class stays from one row to the next with probability ``persistence`` at least. Then answers are
      those of the class chain; else the model's.
    - ``imbalanced``: two rows of a window share a class more often than two of the stream do, by ``imbalance``. While
      not so, and once trials speak for adapting, every ``every``-th batch makes one step that lowers the entropy of its
      answers.
    - Where neighbours are ``alike`` beyond their class (`policies.detectors.neighbour_distances`), so are their errors,
      and windows show a stretch, not the stream: nothing of this is done.

    The floor: once steps have been made, a sample of rows is answered by the source model too. Where the live model has
    collapsed beside it (`policies.safeguards.collapse`), everything returns to the source model for ``rest`` windows,
    twice as long each time.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``; where answers are corrected, the logarithms of posteriors.

    State: all of the parts, the optimizer's moments, and the inputs of the batch that waits for its step.

    Deviations: batches answered between two calls of `update` make one step, on the last one that was due. Rows
    without finite logits are left out of it. Models without BatchNorm have no statistics to try: they count as adapting
    while their features have moved from those of the first rows. Models without any normalisation layer take no steps.

    Cost: one forward, and one of 32 rows for a probe. While adapting, two sums over each BatchNorm layer's input, one
    more forward for one batch in 16 (two more once steps were made), and one backward for each step.
    """

    name = "auto"

    class Params(AutoParams):
        """Parameters of auto; the defaults are meant to be left alone."""

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._named = params.selected(context.model)
        self.adapted = frozenset(self._named)
        self._optimizer = params.built(list(self._named.values())) if self._named else None
        self._statistics = StreamStatistics(
            context, common_rate=params.common_rate, offset_rate=params.offset_rate, window=params.window
        )
        self._chain = ClassChain(context.num_classes)
        self._view = StreamView(context, params, own=not len(self._statistics))
        self._trials = Trials(context.num_classes, params.window, params.worse, params.patience + 1)
        self._probe = Probe(params.window // 2, params.sure, params.gain)
        self._calm = Calm(params.risen, FIRST_PROBE)
        self._moved = Switch("adapting", params.moved, params.patience)
        self._anchor = Anchor(context, self.adapted)
        self._mixed = Switch("caution with mixed groups", BUNCHED / context.num_classes, params.patience)
        self._correlated = Switch("correction by the class chain", params.persistence, params.patience)
        self._imbalanced = Switch("caution with imbalanced batches", params.imbalance, params.patience)
        self._switches = Switches(
            adapting=self._moved, correlated=self._correlated, imbalanced=self._imbalanced, mixed=self._mixed
        )
        _log.info("adaptation 'auto' finds %d BatchNorm layers, %d parameters", len(self._statistics), len(self._named))
        self._start()

    def _start(self) -> None:
        self._floor = Collapse(Collapse.Params(share=1 / 16), self.context)
        self._probe.begin()
        self._batches = 0
        self._stepped = self._fallen = False
        self._rest = self._falls = 0
        self._waiting: tuple[Tensor, float] | None = None
        self._graph: Tensor | None = None
        self._publish()

    @property
    def _parts(self) -> dict[str, Part]:
        return {
            "statistics": self._statistics,
            "chain": self._chain,
            "view": self._view,
            "anchor": self._anchor,
            "trials": self._trials,
            "probe": self._probe,
            "calm": self._calm,
            "switches": self._switches,
        }

    @property
    def _adapting(self) -> bool:
        return self._moved.on and not self._rest

    def _adapt(self, batch: Batch) -> Tensor:
        inputs = fastest(batch.inputs)
        self._batches += 1
        share = self._share(len(batch)) if self._adapting else 0.0
        if self._adapting and len(self._statistics) and self._trials.due(len(batch)):
            logits = self._try(inputs, share)
        elif self._step_due(share):
            self._waiting = (inputs, share)
            logits = self._graph = self._forward(inputs, share, measure=True)
        else:
            logits = self._plain(inputs, share)
            if self._probing and self._probe.trying:
                chosen = self._probe.choose(len(batch))
                if len(inputs[chosen]):
                    self._try_first(inputs[chosen], logits[chosen])
        return self._answer(batch, inputs, logits.detach())

    @property
    def _probing(self) -> bool:
        return len(self._statistics) > 0 and not self._moved.on and not self._rest and not self._view.alike

    def _step_due(self, share: float) -> bool:
        """Whether this batch is to make a step."""
        cautious = self._imbalanced.on or self._mixed.on or self._view.alike
        if not self._named or not self._adapting or cautious or self._batches % self.params.every:
            return False
        return not len(self._statistics) or (share > 0 and self._trials.count >= self.params.patience)

    @torch.no_grad()
    def _plain(self, inputs: Tensor, share: float) -> Tensor:
        """Logits without gradients; moments are measured while adapting, and before it may begin."""
        with self._statistics.measuring(self._adapting or (self._probing and self._probe.measuring)):
            return self._normalised(inputs, share)

    @torch.no_grad()
    def _try_first(self, inputs: Tensor, answered: Tensor) -> None:
        """Have the probe see rows, answered by the source model, with the statistics of the stream too."""
        self._statistics.write(source=False)
        other = self._normalised(inputs, 0.0)
        self._statistics.write(source=True)
        good = answered.isfinite().all(1) & other.isfinite().all(1)
        self._probe.see(answered[good], other[good])

    @torch.no_grad()
    def _try(self, inputs: Tensor, share: float) -> Tensor:
        """Logits as in `_plain`; and a trial of the source model's statistics on the same rows.

        Steps make answers surer wherever they lead, so both sides of the trial have the weights of before any step.
        """
        logits = self._plain(inputs, share)
        self._graph = None  # What follows changes weights and statistics in place; the step repeats its forward.
        live = [parameter.clone() for parameter in self._named.values()] if self._stepped else []
        if live:
            self._anchor.restore(self._named)
        ours = self._normalised(inputs, share) if live else logits
        self._statistics.write(source=True)
        other = self._normalised(inputs, 0.0)
        self._statistics.write(source=False)
        if live:
            torch._foreach_copy_(list(self._named.values()), live)
        good = ours.isfinite().all(1) & other.isfinite().all(1)
        if bool(good.any()):
            self._trials.see(ours[good], other[good])
        return logits

    @property
    def _slowness(self) -> float:
        """By how much to learn statistics slower, which is the more the longer nothing has moved."""
        return min(max(1.0, self._view.steady * self.params.common_rate), SLOWEST)

    def _share(self, rows: int) -> float:
        """The batch's share of the statistics to normalise with."""
        if self._mixed.on:
            return 0.0
        balance = max(0.0, 1 - self._view.imbalance / self.params.imbalance)
        return self.params.share * balance * rows / (rows + PRIOR_ROWS)

    def _normalised(self, inputs: Tensor, share: float) -> Tensor:
        """Logits with the batch's share of the statistics."""
        if not share:
            logits: Tensor = self.context.model(inputs)
            return logits
        self._statistics.blending.set_share(share)
        with self._statistics.blending.active():
            blended: Tensor = self.context.model(inputs)
        return blended

    def _forward(self, inputs: Tensor, share: float, *, measure: bool) -> Tensor:
        """Logits with gradients of the adapted parameters."""
        with (
            torch.enable_grad(),
            only_require_grad(self.context.model, self.adapted),
            self._statistics.measuring(measure),
        ):
            return self._normalised(inputs, share)

    @torch.no_grad()
    def _answer(self, batch: Batch, inputs: Tensor, logits: Tensor) -> Tensor:
        """The logits to answer with; what the rows tell is kept for `update`."""
        good = logits.isfinite().all(1)
        safe = logits if bool(good.all()) else torch.where(good[:, None], logits, torch.zeros_like(logits))
        probabilities = safe.softmax(1)
        posterior = self._chain.correct(probabilities.double().cpu().numpy(), batch.groups)
        corrected = torch.from_numpy(posterior)
        if self._correlated.on:
            safe = corrected.log().to(logits)
        classes = safe.argmax(1)
        self._view.add(probabilities, classes, inputs, self._statistics.shallow(len(classes)))
        self._statistics.take(classes)
        if self._stepped:
            self._fallen |= self._floor.verdict(batch, logits) is Verdict.RESET
        return torch.where(good[:, None], safe, logits)

    def update(self) -> Outcome | None:
        """Step where one is due, learn statistics, and look at the stream once a window is full."""
        outcome = self._step() if self._waiting is not None else None
        if self._fallen:
            self._fall()
        if self._statistics.learn(self._slowness if self._adapting else 1.0):
            self._probe.measured()
            if self._adapting:
                self._statistics.write(source=False)
        if self._probing and self._probe.done:
            self._decide()
        if self._view.full:
            self._look()
        return outcome

    def _step(self) -> Outcome:
        """One step that lowers the entropy of the batch that waits."""
        assert self._waiting is not None
        assert self._optimizer is not None
        logits = self._graph
        if logits is None:  # Weights have moved since it was answered, or this is a restart.
            logits = self._forward(*self._waiting, measure=False)
        self._waiting = self._graph = None
        finite = logits.detach().isfinite().all(1)
        with torch.enable_grad():
            entropy = softmax_entropy(logits if bool(finite.all()) else logits[finite]).entropy
            loss = entropy.mean() if len(entropy) else entropy.sum()
        outcome = self.context.stepper.step(self.context.model, self._optimizer, loss, StepKind.ADAPTATION)
        self._stepped |= outcome.applied
        return outcome

    def _look(self) -> None:
        """Look at the window just full, and change what is to change."""
        self._view.look(self._chain.frequencies)
        self._rest = max(0, self._rest - 1)
        self._correlated.see(0.0 if self._view.alike else self._chain.stay)
        self._imbalanced.see(self._view.imbalance)
        if not len(self._statistics):
            self._moved.see(self._view.feature_distance)
        elif not self._moved.on:
            if self._probe.idle and self._calm.over(self._view.entropy, self._view.moved):
                self._probe.begin(anew=self._calm.risen)
        elif self._view.alike:
            self._moved.set(False, f"rows are alike: {self._view.likeness:.3g}")
            self._settle()
        elif self._adapting and self._trials.worse(by=-self.params.worse if self._mixed.on else self.params.worse):
            self._moved.set(False, f"it costs information: {self._trials.loss:.3g} of the entropy")
            self._settle()
        self._see_bunching()
        self._publish()

    def _decide(self) -> None:
        """Adapt, where a first step towards the statistics of the stream pays; else go on as before."""
        pays = self._probe.decide(caution=self._mixed.on)
        if pays:
            self._trials.reset()
            self._view.compare_anew()
            self._statistics.write(source=False)
            self._moved.set(True, f"it tells more: {self._probe.gain:.3g} of the entropy")
            return
        self._statistics.reset()
        # Few rows of classes in runs tell little, so that more of them are asked.
        self._calm.begin(soon=pays is None or self._correlated.on or self._imbalanced.on)
        if self._probe.promising:
            self._probe.begin()

    def _see_bunching(self) -> None:
        """Take back what single batches taught, where classes are bunched and no chain of them explains it."""
        before = self._mixed.on
        if self._correlated.on or self._imbalanced.on:
            self._mixed.set(False, "the order of arrival explains the bunching")
        elif self._view.compared >= COMPARED * min(1 + self._mixed.changes, 16):
            self._mixed.see(self._view.bunching * (EVENED if self._adapting and not before else 1))
        if self._mixed.on != before:
            self._view.compare_anew()
            self._undo_steps()

    def _undo_steps(self) -> None:
        """Return to the weights of before any step."""
        self._waiting = self._graph = None
        self._stepped = False
        self._anchor.restore(self._named)
        if self._optimizer is not None:
            self._optimizer.state.clear()

    def _settle(self) -> None:
        """Return to the weights of before any step and to the source model's statistics."""
        self._calm.begin()
        self._view.compare_anew()
        self._undo_steps()
        self._statistics.reset()
        self._statistics.write(source=True)

    def _fall(self) -> None:
        """Return to the source model, and stay there for a while."""
        falls = self._falls + 1
        _log.warning("adaptation 'auto': back to the source model, the live one has collapsed (%d times now)", falls)
        counts = {name: switch.changes for name, switch in self._switches.items()}
        self.reset()
        for name, switch in self._switches.items():
            switch.changes = counts[name]
        self._falls = falls
        self._rest = self.params.rest * 2 ** min(falls - 1, 10)
        self._publish()

    def _publish(self) -> None:
        self.gauges |= {name: float(switch.on) for name, switch in self._switches.items()}
        self.gauges |= self._view.gauges | self._floor.gauges
        self.gauges |= {
            "changes": sum(switch.changes for switch in self._switches.values()) + self._falls,
            "resting": self._rest,
            "falls": self._falls,
            "drift": self._statistics.drift(),
            "persistence": self._chain.stay,
            "information_lost": self._trials.loss,
            "rows_rejected": self._statistics.rejected,
        }

    def learned(self, before: Weights, after: Weights) -> None:
        """Drop the graph of the batch that waits, and move the weights of before any step along."""
        self._graph = None
        self._anchor.learned(before, after)

    def reset(self) -> None:
        """Return to the source model and forget everything."""
        super().reset()
        if self._optimizer is not None:
            self._optimizer.state.clear()
        for part in self._parts.values():
            part.reset()
        self._start()

    def detach(self) -> None:
        """Put the original BatchNorm layers back and remove hooks."""
        self._waiting = self._graph = None
        self._statistics.blending.undo()
        self._view.detach()

    def state_dict(self) -> State:
        """The state of all parts."""
        waiting = None if self._waiting is None else dict(zip(("inputs", "share"), self._waiting, strict=True))
        return {
            "optimizer": {} if self._optimizer is None else optimizer_state(self._optimizer, self._named),
            "floor": self._floor.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "waiting": waiting,
            "counts": [self._batches, self._rest, self._falls, int(self._stepped), int(self._fallen)],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state; a batch that waits goes through the model again at the next update."""
        if self._optimizer is not None:
            load_optimizer_state(self._optimizer, self._named, state["optimizer"])
        self._floor.load_state_dict(state["floor"])
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self._graph = self._waiting = None
        if (waiting := state["waiting"]) is not None:
            self._waiting = (fastest(waiting["inputs"].to(self.context.device)), float(waiting["share"]))
        self._batches, self._rest, self._falls, stepped, fallen = map(int, state["counts"])
        self._stepped, self._fallen = bool(stepped), bool(fallen)
        self._publish()
