"""Auto: notices which stream it is on, and does what helps there; the source model is the floor."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from policies.auto_params import BUNCHED, COMPARED, EVENED, FIRST_PROBE, AutoParams
from policies.chain import ClassChain
from policies.hindsight import EVERY, Hindsight
from policies.interfaces import Adaptation, Batch, Context, Outcome, State, Verdict, Weights
from policies.memory import fastest
from policies.modes import Calm, Part, Probe, Switch, Switches, Trials
from policies.moments import StreamStatistics
from policies.passes import Passes
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

    Where labels arrive, however late, they come first (`policies.hindsight`): they tell which way is right on rows that
    were answered both ways. They end adapting, or the chain, where that has more errors than the source model's way,
    and call for it also where rows are alike or nothing else is sure; what they alone called for ends when they stop.

    The floor: once steps have been made, a sample of rows is answered by the source model too. Where the live model has
    collapsed beside it (`policies.safeguards.collapse`), everything returns to the source model for ``rest`` windows,
    twice as long each time; and so it does where, while adapting, with more than two classes, the accuracy estimated
    without labels (`policies.label_free`) is next to guessing or half of the source model's on this stream,
    ``patience`` times, unless in as many windows a label has judged a row that was answered both ways.

    Shapes: inputs ``(B, *shape)`` to logits ``(B, K)``; where answers are corrected, the logarithms of posteriors.

    State: all of the parts, the optimizer's moments, the inputs of the batch that waits for its step, and while labels
    arrive ids and classes of up to 4096 rows.

    Deviations: batches answered between two calls of `update` make one step, on the last one that was due. Rows
    without finite logits are left out of it. Models without BatchNorm have no statistics to try: they count as adapting
    while their features have moved from those of the first rows. Models without any normalisation layer take no steps.

    Cost: one forward, one of 32 rows for a probe, and once answers are out, of 64 rows in one to four windows, eleven
    passes through the classifier (`policies.label_free`, which draws random numbers only once). While
    adapting, two sums over each BatchNorm layer's input, one more forward for one batch in 16 (two more once steps were
    made), and one backward for each step. While labels arrive, one row in eight goes through twice.
    """

    name = "auto"

    class Params(AutoParams):
        """Parameters of auto; the defaults are meant to be left alone."""

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._statistics = StreamStatistics(
            context, common_rate=params.common_rate, offset_rate=params.offset_rate, window=params.window
        )
        self._chain = ClassChain(context.num_classes)
        self._view = StreamView(context, params, own=not len(self._statistics))
        self._passes = Passes(context, params, self._statistics)
        self.adapted = frozenset(self._passes.named)
        self._hindsight = Hindsight(params.window, params.rest)
        self._trials = Trials(context.num_classes, params.window, params.worse, params.patience + 1)
        self._probe = Probe(params.window // 2, params.sure, params.gain)
        self._calm = Calm(params.risen, FIRST_PROBE)
        self._moved = Switch("adapting", params.moved, params.patience)
        self._mixed = Switch("caution with mixed groups", BUNCHED / context.num_classes, params.patience)
        self._correlated = Switch("correction by the class chain", params.persistence, params.patience)
        self._imbalanced = Switch("caution with imbalanced batches", params.imbalance, params.patience)
        self._switches = Switches(
            adapting=self._moved, correlated=self._correlated, imbalanced=self._imbalanced, mixed=self._mixed
        )
        _log.info(
            "adaptation 'auto' finds %d BatchNorm layers, %d parameters", len(self._statistics), len(self.adapted)
        )
        self._start()

    def _start(self) -> None:
        self._floor = Collapse(Collapse.Params(share=1 / 16), self.context)
        self._probe.begin()
        self._batches = 0
        self._fallen = False
        self._rest = self._falls = 0
        self._publish()

    @property
    def _parts(self) -> dict[str, Part]:
        return {
            "statistics": self._statistics,
            "chain": self._chain,
            "view": self._view,
            "trials": self._trials,
            "probe": self._probe,
            "calm": self._calm,
            "switches": self._switches,
            "hindsight": self._hindsight,
        }

    @property
    def _adapting(self) -> bool:
        return self._moved.on and not self._rest

    def _adapt(self, batch: Batch) -> Tensor:
        inputs = fastest(batch.inputs)
        self._batches += 1
        self._view.begin()
        other: Tensor | None = None
        share = self._view.share(len(batch)) if self._adapting and not self._mixed.on else 0.0
        tried = self._adapting and len(self._statistics) > 0 and self._trials.due(len(batch))
        if tried:
            logits, other = self._try(batch.ids, inputs, share)
        elif self._step_due(share):
            logits = self._passes.for_step(inputs, share)
        else:
            logits = self._plain(inputs, share)
        answer = self._answer(batch, inputs, logits.detach(), other)
        if not tried and not self._passes.waiting:  # or its graph would be lost
            self._try_some(batch.ids, inputs, logits)
        self._hindsight.answered(len(batch))
        return answer

    def _try_some(self, ids: Sequence[str], inputs: Tensor, logits: Tensor) -> None:
        """Answer some rows the other way too, where a probe or labels call for it."""
        probe = self._probing and self._probe.trying
        if not probe and not self._hindsight.arriving:
            return
        chosen = (self._probe if probe else self._hindsight).choose(len(inputs))
        if len(inputs[chosen]):
            (self._try_first if probe else self._try_for_labels)(ids[chosen], inputs[chosen], logits[chosen])

    @property
    def _probing(self) -> bool:
        if not len(self._statistics) or self._moved.on or self._rest or self._view.alike:
            return False
        return not self._hindsight.adapting.resting

    @property
    def _shadowing(self) -> bool:
        """Whether statistics follow the stream by the rows alone that labels are to judge them by."""
        return self._hindsight.arriving and not self._moved.on

    def _step_due(self, share: float) -> bool:
        """Whether this batch is to make a step."""
        cautious = self._imbalanced.on or self._mixed.on or self._view.alike
        if not self.adapted or not self._adapting or cautious or self._batches % self.params.every:
            return False
        return not len(self._statistics) or (share > 0 and self._trials.count >= self.params.patience)

    def _plain(self, inputs: Tensor, share: float) -> Tensor:
        """Logits without gradients; moments are measured while adapting, and where it may begin."""
        measure = self._adapting or (self._probing and self._probe.measuring and not self._shadowing)
        return self._passes.plain(inputs, share, measure=measure)

    def _try_first(self, ids: Sequence[str], inputs: Tensor, answered: Tensor) -> None:
        """Have the probe see rows, answered by the source model, with the statistics of the stream too."""
        other = self._passes.with_statistics(inputs, source=False)
        good = answered.isfinite().all(1) & other.isfinite().all(1)
        self._probe.see(answered[good], other[good])
        self._hindsight.compare(ids, other, answered)

    def _try(self, ids: Sequence[str], inputs: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Logits as in `_plain`; and those of a trial of the source model's statistics on the same rows.

        Steps make answers surer wherever they lead, so both sides of the trial have the weights of before any step.
        """
        logits = self._plain(inputs, share)
        with self._passes.before_steps():
            ours = self._passes.plain(inputs, share) if self._passes.stepped else logits
            other = self._passes.with_statistics(inputs, source=True)
        good = ours.isfinite().all(1) & other.isfinite().all(1)
        if bool(good.any()):
            self._trials.see(ours[good], other[good])
        self._hindsight.compare(ids, logits, other)
        return logits, other

    def _try_for_labels(self, ids: Sequence[str], inputs: Tensor, answered: Tensor) -> None:
        """Answer rows the other way too, while labels arrive that can tell which of both is right."""
        if self._adapting:
            with self._passes.before_steps():
                other = self._passes.with_statistics(inputs, source=True)
            self._hindsight.compare(ids, answered, other)
        elif len(self._statistics):
            other = self._passes.with_statistics(inputs, source=False, measure=True)
            self._statistics.take(other.argmax(1))
            self._hindsight.compare(ids, other, answered)

    @torch.no_grad()
    def _answer(self, batch: Batch, inputs: Tensor, logits: Tensor, source: Tensor | None) -> Tensor:
        """The logits to answer with; what the rows tell, by the source model too if known, is kept for `update`."""
        good = logits.isfinite().all(1)
        safe = logits if bool(good.all()) else torch.where(good[:, None], logits, torch.zeros_like(logits))
        probabilities = safe.softmax(1)
        own = probabilities.double().cpu().numpy()
        posterior = self._chain.correct(own, batch.groups)
        self._hindsight.compare_chain(batch.ids, posterior, own)
        if self._correlated.on:
            safe = torch.from_numpy(posterior).log().to(logits)
        classes = safe.argmax(1)
        self._view.add(probabilities, classes, inputs, self._statistics.shallow(len(classes)))
        self._statistics.take(classes)
        if source is not None:
            self._view.compare(safe[good], source[good])
        elif not self._adapting:
            self._view.compare(safe, logits)
        if self._passes.stepped:
            self._fallen |= self._floor.verdict(batch, logits) is Verdict.RESET
        return torch.where(good[:, None], safe, logits)

    def update(self) -> Outcome | None:
        """Step where one is due, learn statistics, and look at the stream once a window is full."""
        outcome = self._passes.step() if self._passes.waiting else None
        if self._fallen:
            self._fall("the live one has collapsed")
        slowness = self._view.slowness if self._adapting or self._shadowing else 1.0
        if self._statistics.learn(slowness, EVERY if self._shadowing else 1):
            self._probe.measured()
            if self._adapting:
                self._statistics.write(source=False)
        if self._probing and self._probe.done:
            self._decide()
        if self._view.full:
            self._look()
        return outcome

    def _look(self) -> None:
        """Look at the window just full, and change what is to change."""
        self._view.look(self._chain.frequencies, usual=not self._adapting)
        self._rest = max(0, self._rest - 1)
        if self._hindsight.window_passed() and not self._moved.on:
            self._statistics.reset()  # no labels come any more that they could be judged by
        self._see_chain()
        self._imbalanced.see(self._view.imbalance)
        self._see_adapting()
        self._see_bunching()
        useless = self._adapting and self._view.estimate.low >= self.params.patience
        if useless and self._hindsight.adapting.silent > self.params.patience:
            self._fall(f"the error of answers is estimated at {self._view.gauges['estimated_error']:.3g}")
        self._publish()

    def _see_chain(self) -> None:
        """Answer from the chain where labels say so, or else where classes persist."""
        said = self._hindsight.chain.decide(self._correlated.on)
        if said is None:
            self._correlated.see(0.0 if self._view.alike else self._chain.stay)
        else:
            self._correlated.set(said, self._hindsight.chain.why)

    def _see_adapting(self) -> None:
        """Adapt, go back, or ask whether to, as labels say, or else as the stream does."""
        said, why = self._hindsight.adapting.decide(self._moved.on), self._hindsight.adapting.why
        if said is not None:
            if said != self._moved.on:
                self._begin(why) if said else self._settle(why)
        elif not len(self._statistics):
            self._moved.see(self._view.feature_distance)
        elif not self._moved.on:
            if self._probe.idle and self._calm.over(self._view.entropy, self._view.moved):
                self._probe.begin(anew=self._calm.risen)
        elif self._view.alike:
            self._settle(f"rows are alike: {self._view.likeness:.3g}")
        elif self._adapting and self._trials.worse(by=-self.params.worse if self._mixed.on else self.params.worse):
            self._settle(f"it costs information: {self._trials.loss:.3g} of the entropy")

    def _decide(self) -> None:
        """Adapt, where a first step towards the statistics of the stream pays; else go on as before."""
        pays = self._probe.decide(caution=self._mixed.on)
        if pays:
            self._begin(f"it tells more: {self._probe.gain:.3g} of the entropy")
            return
        if not self._shadowing:
            self._statistics.reset()
        # Few rows of classes in runs tell little, so that more of them are asked.
        self._calm.begin(soon=pays is None or self._correlated.on or self._imbalanced.on)
        if self._probe.promising:
            self._probe.begin()

    def _begin(self, why: str) -> None:
        """Adapt from now on."""
        self._rest = 0
        self._probe.reset()
        self._trials.reset()
        self._view.compare_anew()
        self._statistics.write(source=False)
        self._moved.set(True, why)

    def _see_bunching(self) -> None:
        """Take back what single batches taught, where classes are bunched and no chain of them explains it."""
        before = self._mixed.on
        if self._correlated.on or self._imbalanced.on:
            self._mixed.set(False, "the order of arrival explains the bunching")
        elif self._view.compared >= COMPARED * min(1 + self._mixed.changes, 16):
            self._mixed.see(self._view.bunching * (EVENED if self._adapting and not before else 1))
        if self._mixed.on != before:
            self._view.compare_anew()
            self._passes.undo_steps()

    def _settle(self, why: str) -> None:
        """Return to the weights of before any step and to the source model's statistics."""
        self._moved.set(False, why)
        self._calm.begin()
        self._view.compare_anew()
        self._passes.undo_steps()
        self._statistics.reset()
        self._statistics.write(source=True)

    def _fall(self, why: str) -> None:
        """Return to the source model, and stay there for a while."""
        falls = self._falls + 1
        _log.warning("adaptation 'auto': back to the source model, as %s (fall %d)", why, falls)
        changes, fallen = self._switches.changes, self._view.estimate.falls
        self.reset()
        self._switches.changes = changes
        self._view.count_falls(fallen)
        self._falls = falls
        self._rest = self.params.rest * 2 ** min(falls - 1, 10)
        self._publish()

    def _publish(self) -> None:
        self.gauges |= {name: float(switch.on) for name, switch in self._switches.items()}
        self.gauges |= self._view.gauges | self._floor.gauges | self._hindsight.gauges
        if self._adapting and not len(self._statistics):  # no trials are made; the floor compares some rows
            self.gauges["disagreement"] = 1 - self._floor.gauges.get("agreement", math.nan)
        self.gauges |= {
            "changes": sum(self._switches.changes.values()) + self._falls,
            "resting": self._rest,
            "falls": self._falls,
            "drift": self._statistics.drift(),
            "persistence": self._chain.stay,
            "information_lost": self._trials.loss,
            "rows_rejected": self._statistics.rejected,
        }

    def labelled(self, ids: Sequence[str], labels: Sequence[int], groups: Sequence[str | None]) -> None:
        """Note what labels say; what follows from it is decided in `update`."""
        self._hindsight.hear(ids, labels)

    def learned(self, before: Weights, after: Weights) -> None:
        """Drop the graph of the batch that waits, and move the weights of before any step along."""
        self._passes.learned(before, after)

    def reset(self) -> None:
        """Return to the source model and forget everything."""
        super().reset()
        self._passes.reset()
        for part in self._parts.values():
            part.reset()
        self._start()

    def detach(self) -> None:
        """Put the original BatchNorm layers back and remove hooks."""
        self._passes.forget()
        self._statistics.blending.undo()
        self._view.detach()

    def state_dict(self) -> State:
        """The state of all parts."""
        return {
            "passes": self._passes.state_dict(),
            "floor": self._floor.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "counts": [self._batches, self._rest, self._falls, int(self._passes.stepped), int(self._fallen)],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state; a batch that waits goes through the model again at the next update."""
        self._floor.load_state_dict(state["floor"])
        for name, part in self._parts.items():
            if name in state["parts"]:  # hindsight came later than the others
                part.load_state_dict(state["parts"][name])
        self._batches, self._rest, self._falls, stepped, fallen = map(int, state["counts"])
        self._fallen = bool(fallen)
        before = {"anchor": state["parts"].get("anchor")} | state  # what kept `passes` and their anchor apart
        self._passes.load_state_dict(state.get("passes", before), bool(stepped))
        self._publish()
