"""Per group: one state of a method for each group that events name, over one set of weights."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from policies.interfaces import Adaptation, Batch, Context, MethodParams, Outcome, PolicyError, State, Weights
from policies.registry import find

_log = logging.getLogger(__name__)

_UNIT = 2.0**-40
"""What gauges are summed up in, as whole numbers: such sums are the same in any order, and when terms are taken out."""


class PerGroup(Adaptation):
    """Keeps one state of another method for each group, so that groups that come mixed are like streams of their own.

    Reference: none.

    Each group has a method of its own on a model of its own, which shares all parameters with the live model and has
    buffers (BatchNorm statistics, say) of its own. The rows of a group in a batch go through its method as a batch of
    their own, in the order of arrival. Rows that name no group make up one more.

    Shapes: those of the method.

    State: of each group held, its method's state and its model's buffers; which groups an update is still due for.

    Deviations: a method that changes parameters is refused, as these are shared by all groups. Of more than ``groups``
    groups, those unused for longest are forgotten, and start from the source model if they come again. Buffers of the
    live model stay as they are, so a release holds no group's statistics. Gauges are means over the groups that
    show them, NaN once none does any more.

    Cost: that of the method, in as many forwards a batch as it has groups.

    Raises:
        PolicyError: If the method does not run on this model, or changes parameters.
    """

    name = "per_group"

    class Params(MethodParams):
        """Parameters of keeping groups apart.

        Attributes:
            of: Name of the adaptation method that each group has its own state of.
            params: That method's parameters.
            groups: Groups held at a time.
        """

        of: str = "class_bn"
        params: dict[str, Any] = Field(default_factory=dict)
        groups: int = Field(default=256, ge=1)

        @model_validator(mode="after")
        def _known(self) -> Self:
            self.inner()
            return self

        def inner(self) -> MethodParams:
            """The parameters of the method ``of``, validated.

            Raises:
                ValueError: There is no such method, or it has no such parameters.
            """
            if self.of == PerGroup.name:
                raise ValueError("of: groups are kept apart once; name another method, for instance 'class_bn'")
            try:
                found: MethodParams = find("adaptation", self.of).Params.model_validate(self.params)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(str(part) for part in ("params", *first["loc"]))
                raise ValueError(f"{where}: {first['msg']} (of method {self.of!r})") from None
            return found

    def __init__(self, params: Params, context: Context) -> None:
        super().__init__(params, context)
        self.params = params
        self._inner = params.inner()
        self._class: type[Adaptation] = find("adaptation", params.of)
        if self._make().adapted:
            raise PolicyError(
                f"{params.of!r} changes weights, which all groups share: choose a method that changes none, for "
                "instance 'class_bn', 'bn', 'lame', or 'auto' with 'every: 0'"
            )
        self._held: OrderedDict[str | None, Adaptation] = OrderedDict()
        self._forget()

    def _forget(self) -> None:
        self._held.clear()
        self._due: dict[str | None, None] = {}
        self._shown: dict[str | None, dict[str, int]] = {}
        self._sums: Counter[str] = Counter()
        self._showing: Counter[str] = Counter()
        self.gauges = dict.fromkeys(self.gauges, math.nan) | {"groups": 0, "evictions": 0}

    def _make(self) -> Adaptation:
        """The method on a model with the live model's parameters and buffers of its own."""
        shared = {id(parameter): parameter for parameter in self.context.model.parameters()}
        return self._class(self._inner, replace(self.context, model=copy.deepcopy(self.context.model, shared)))

    def _member(self, group: str | None) -> Adaptation:
        """The method of a group, which becomes the one used last."""
        found = self._held.pop(group, None)
        if found is None:
            found = self._make()
            if len(self._held) >= self.params.groups:
                self._show(self._held.popitem(last=False)[0], {})
                if not self.gauges["evictions"]:
                    _log.warning(
                        "adaptation 'per_group' forgets groups: more than 'groups: %d' come", len(self._held) + 1
                    )
                self.gauges["evictions"] += 1
        self._held[group] = found
        return found

    def _adapt(self, batch: Batch) -> Tensor:
        places: dict[str | None, list[int]] = {}
        for row, group in enumerate(batch.groups):
            places.setdefault(group, []).append(row)
        self._due |= dict.fromkeys(places)
        if len(places) == 1:
            return self._member(batch.groups[0]).adapt(batch)
        logits = torch.empty(len(batch), self.context.num_classes, device=batch.inputs.device)
        for group, rows in places.items():
            keep = torch.tensor(rows)
            answered = self._member(group).adapt(batch.rows(keep))
            logits = logits.to(answered.dtype)
            logits[keep.to(logits.device)] = answered
        return logits

    def update(self) -> Outcome | None:
        """Have each group that was answered since the last call do what follows."""
        for group in self._due:
            if group in self._held:
                self._held[group].update()
        due, self._due = self._due, {}
        self._gauge(due)
        return None

    def _gauge(self, groups: Iterable[str | None]) -> None:
        """Look at what the methods of these groups show; that of the others is as it was."""
        for group in groups:
            if group in self._held:
                self._show(group, self._held[group].gauges)
        means = {
            name: self._sums[name] * _UNIT / count if count else math.nan  # or the last value would go on being shown
            for name, count in sorted(self._showing.items())
        }
        self.gauges = means | {"groups": len(self._held), "evictions": self.gauges["evictions"]}

    def _show(self, group: str | None, gauges: Mapping[str, float]) -> None:
        """Put what a group shows now in the place of what it has shown; what is no number is left out."""
        now = {name: round(value / _UNIT) for name, value in gauges.items() if math.isfinite(value / _UNIT)}
        before = self._shown.pop(group, {})
        self._sums.update(now)
        self._sums.subtract(before)
        self._showing.update(now.keys())
        self._showing.subtract(before.keys())
        if now:
            self._shown[group] = now

    def labelled(self, ids: Sequence[str], labels: Sequence[int], groups: Sequence[str | None]) -> None:
        """Hand labels on to the methods of the rows' groups, where these are held."""
        places: dict[str | None, list[int]] = {}
        for row, group in enumerate(groups):
            places.setdefault(group, []).append(row)
        for group, rows in places.items():
            if group in self._held:
                chosen = [ids[row] for row in rows], [labels[row] for row in rows]
                self._held[group].labelled(*chosen, [group] * len(rows))

    def learned(self, before: Weights, after: Weights) -> None:
        """Hand on that parameters have moved."""
        for method in self._held.values():
            method.learned(before, after)
        self._gauge(self._held)

    def reset(self) -> None:
        """Return to the source model and forget all groups."""
        super().reset()
        self._forget()

    def detach(self) -> None:
        """Nothing of the live model was changed."""

    def state_dict(self) -> State:
        """The groups held, the one unused for longest first."""
        states = [
            {"method": method.state_dict(), "buffers": dict(method.context.model.named_buffers())}
            for method in self._held.values()
        ]
        return {
            "of": self.params.of,
            "names": list(self._held),
            "states": states,
            "due": list(self._due),
            "evictions": int(self.gauges["evictions"]),
        }

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state; of more groups than are held now, those used last; none of another method."""
        self._forget()
        if state["of"] != self.params.of:
            _log.warning("adaptation 'per_group' begins afresh: its groups were of %r", state["of"])
            return
        pairs: Sequence[tuple[str | None, State]] = list(zip(state["names"], state["states"], strict=True))
        for group, held in pairs[-self.params.groups :]:
            method = self._held[group] = self._make()
            own = dict(method.context.model.named_buffers())
            for name, value in held["buffers"].items():
                own[name].copy_(value)
            method.load_state_dict(held["method"])
        self._due = dict.fromkeys(state["due"])
        self.gauges["evictions"] = int(state["evictions"])
        self._gauge(self._held)
