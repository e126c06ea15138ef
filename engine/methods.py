"""The methods of one policy, built and held together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from engine.host import ModelHost
from policies.interfaces import (
    Adaptation,
    Context,
    Gate,
    Interpolation,
    Method,
    MethodParams,
    PolicyError,
    Reweighting,
    Safeguard,
    State,
)
from policies.registry import find
from policies.stepping import SafeStepper

_KEYS = {
    "adaptation": "adaptation",
    "reweighting": "reweighting.{}",
    "safeguard": "safeguards.{}",
    "interpolation": "interpolation",
    "gate": "gate",
}
"""Where a policy names a method of each kind, for messages."""


class Choice(NamedTuple):
    """One method that a policy chose, with its validated parameters."""

    kind: str
    name: str
    params: MethodParams


@dataclass(slots=True)
class Methods:
    """Every method of a policy, by kind."""

    adaptation: Adaptation
    reweightings: tuple[Reweighting, ...]
    safeguards: tuple[Safeguard, ...]
    interpolation: Interpolation | None
    gate: Gate | None
    stepper: SafeStepper

    @classmethod
    def build(cls, choices: Sequence[Choice], host: ModelHost, seed: int) -> Methods:
        """Build the methods on ``host``; safeguards first, since the others step through them.

        Raises:
            PolicyError: If a method cannot run with this model.
        """
        stepper = SafeStepper(())

        def make(kind: str) -> list[Any]:
            found: list[Any] = []
            for index, choice in enumerate(c for c in choices if c.kind == kind):
                context = Context(
                    model=host.live,
                    source=host.source,
                    num_classes=host.num_classes,
                    seed=derive_seed(seed, f"{kind}/{choice.name}/{index}"),
                    stepper=stepper,
                )
                try:
                    found.append(find(kind, choice.name)(choice.params, context))
                except PolicyError as error:
                    raise PolicyError(f"{_KEYS[kind].format(index)}: {choice.name}: {error}") from error
            return found

        safeguards = tuple(cast("list[Safeguard]", make("safeguard")))
        stepper.safeguards = safeguards
        return cls(
            adaptation=make("adaptation")[0],
            reweightings=tuple(make("reweighting")),
            safeguards=safeguards,
            interpolation=next(iter(make("interpolation")), None),
            gate=next(iter(make("gate")), None),
            stepper=stepper,
        )

    def __iter__(self) -> Iterator[tuple[str, Method]]:
        yield "adaptation", self.adaptation
        for method in (*self.reweightings, *self.safeguards):
            yield f"{method.kind}.{method.name}", method
        if self.interpolation is not None:
            yield "interpolation", self.interpolation
        if self.gate is not None:
            yield "gate", self.gate

    def gauges(self) -> dict[tuple[str, str], float]:
        """What the methods want watched: ``(method, name) -> value``."""
        return {(method.name, name): value for _, method in self for name, value in method.gauges.items()}

    def state_dict(self) -> State:
        """The state of every method by its place (a policy names a method once at most), with its name."""
        return {place: {"name": method.name, "state": method.state_dict()} for place, method in self}

    def load_state_dict(self, state: State, *, strict: bool = False) -> dict[str, str]:
        """Take over states; a method that the policy did not have before starts afresh.

        Args:
            state: Of this policy's methods, or of another's.
            strict: Whether to raise what a method raises at a state that does not fit it; else it starts afresh.

        Returns:
            Places whose state was not used, with the reason.
        """
        unused = dict.fromkeys(sorted(state), "the policy has changed")
        for place, method in self:
            if place in state and state[place]["name"] == method.name:
                del unused[place]
                problem = _load(method, state[place]["state"], strict)
                if problem:
                    unused[place] = (
                        f"{method.name} cannot take it over, as it is now or with these parameters: {problem}"
                    )
        return unused


def _load(method: Method, state: State, strict: bool) -> str:
    """Have a method take over its state, or start afresh; what keeps it from that, empty where nothing does."""
    fresh = _copied(method.state_dict())
    try:
        method.load_state_dict(state)
    except Exception as error:  # methods may raise anything at a state that they do not know
        if strict or isinstance(error, MemoryError) or "CUDA" in str(error):  # the last two: no fault of the state
            raise
        method.load_state_dict(fresh)
        return f"{type(error).__name__}: {error}"
    return ""


def _copied(state: Any) -> Any:
    """The same nesting, sharing no memory with it."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list | tuple) else state


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of 63 bits that differs from purpose to purpose."""
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
