"""Of which answered events the inputs wait for a label: of those for which there is a use once it comes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.audit import held_out
from engine.coretypes import CoreSettings
from engine.host import ModelHost
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
        host: Of the core.
        methods: Of the core.
        learner: Of the core.

    Attributes:
        plain: Whether nothing but a source model has ever answered; part of the checkpoint.
    """

    def __init__(self, settings: CoreSettings, host: ModelHost, methods: Methods, learner: Learner) -> None:
        self._all, self._share, self._learns = settings.all_inputs, settings.audit_share, learner.enabled
        adapts = type(methods.adaptation) is not NoAdaptation or bool(methods.safeguards)
        self._changes = adapts or learner.enabled or settings.release_every > 0
        self._host = host
        self._same: bool | None = None
        self.plain = True

    def restored(self, *, plain: bool) -> None:
        """Take `plain` over from a checkpoint, whose weights are loaded before the next event is answered."""
        self.plain, self._same = plain, None

    @property
    def one_model(self) -> bool:
        """Whether source, live and release are one model, and whatever waits was answered by it."""
        if self._changes or not self.plain:
            return False
        if self._same is None:  # under such a policy no weights change, so looking once will do
            source, live = self._host.source.state_dict(), self._host.live.state_dict()
            same = ((live[name], self._host.release[name], tensor) for name, tensor in source.items())
            self._same = all(torch.equal(a, tensor) and torch.equal(b, tensor) for a, b, tensor in same)
        return self._same

    def answered(self, events: Events) -> Sequence[bytes]:
        """Return the inputs of events that were just answered, and nothing in place of those without a use."""
        self.plain &= not self._changes
        if self.one_model and not self._all:
            return [b""] * len(events)
        return self.seen(events)

    def seen(self, events: Events) -> Sequence[bytes]:
        """Return the same of events that others have answered, nobody knows how."""
        if self._learns or self._all:
            return events.inputs
        named = zip(events.ids, events.inputs, strict=True)
        return [inputs if held_out(name, self._share) else b"" for name, inputs in named]

    def can_judge(self, row: Joined) -> bool:
        """Whether source and release can be held against a label."""
        return bool(row.inputs) or (row.predicted >= 0 and self.one_model)
