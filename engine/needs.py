"""Of which answered events the inputs wait for a label: of those for which there is a use once it comes."""

from __future__ import annotations

from collections.abc import Sequence

from engine.audit import held_out
from engine.coretypes import CoreSettings
from engine.learner import Learner
from engine.methods import Methods
from policies.adaptation.none import NoAdaptation
from streams.codec import Events
from streams.join import Joined


class Needs:
    """What a core has a use for.

    Labels are learned from, or held out to judge models by; both take the inputs. Where one model answers everything,
    what it answered is what source and release say as well, so that nobody has to ask them.

    Args:
        settings: Of the core.
        methods: Of the core.
        learner: Of the core.
    """

    def __init__(self, settings: CoreSettings, methods: Methods, learner: Learner) -> None:
        self._all, self._share, self._learns = settings.all_inputs, settings.audit_share, learner.enabled
        adapts = type(methods.adaptation) is not NoAdaptation or bool(methods.safeguards)
        self._changes = adapts or learner.enabled or settings.release_every > 0

    def one_model(self, step: int, release: int) -> bool:
        """Whether one model answers everything, and always has, if there were ``step`` updates and ``release`` s."""
        return not (self._changes or step or release)

    def inputs(self, events: Events, *, one_model: bool) -> Sequence[bytes]:
        """Return the inputs of events, and nothing in place of those for which there is no use."""
        if self._learns or self._all:
            return events.inputs
        if one_model:
            return [b""] * len(events)
        named = zip(events.ids, events.inputs, strict=True)
        return [inputs if held_out(name, self._share) else b"" for name, inputs in named]

    def can_judge(self, row: Joined, *, one_model: bool) -> bool:
        """Whether source and release can be held against a label."""
        return bool(row.inputs) or (one_model and row.predicted >= 0)
