"""Classes that persist in time: answers corrected by the rows before and after them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from policies.interfaces import State

Array = npt.NDArray[np.float64]

STAY_LIMIT = 0.98
"""Largest estimated probability of staying: no run of equal answers makes the chain sure that it will never end."""

START = 0.1
"""Probability of staying to begin with: low, yet far enough from 0, which no evidence could raise."""


class ClassChain:
    """A hidden Markov chain of classes behind a stream of answers.

    From one row to the next of the same group a class stays with probability ``s``; else the next is drawn from the
    long-run frequencies ``pi``. With a model's probabilities ``q_t``, a share ``e`` of them taken for noise, the
    likelihood ratio is ``L_t = ((1 - e) q_t + e pi) / pi`` and the posterior comes from the forward-backward recursions

        f_t = L_t (s f_{t-1} + (1 - s) pi) / Z,   b_{t-1} = s L_t b_t + (1 - s) sum(pi L_t b_t),   y_t = f_t b_t / Z'

    over the rows of one batch, ``f`` carried on to the next. ``s`` follows the expected share of stays (one step of
    Baum and Welch a batch, forgetting), ``pi`` the mean posterior, slower. Classes that come independently drive ``s``
    to 0, where ``y_t`` is ``q_t`` up to ``e``: the chain turns itself off. (Rabiner, "A tutorial on hidden Markov
    models", Proc. IEEE 1989, equations 19 to 40.)

    Args:
        num_classes: ``K``.
        noise: ``e``.
        memory: Rows over which ``s`` is averaged; ``pi`` over eight times as many.
        groups: Groups whose last posterior is kept; the one unused for longest goes first.
    """

    def __init__(self, num_classes: int, *, noise: float = 0.05, memory: int = 256, groups: int = 1024) -> None:
        self._classes, self._noise, self._memory, self._groups = num_classes, noise, memory, groups
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.stay = START
        self.frequencies: Array = np.full(self._classes, 1 / self._classes)
        self._held: OrderedDict[str | None, Array] = OrderedDict()

    def correct(self, probabilities: Array, groups: Sequence[str | None]) -> Array:
        """Posteriors ``(B, K)`` of probabilities ``(B, K)`` in the order of arrival; the chain learns from them."""
        prior = self.frequencies
        ratios = ((1 - self._noise) * probabilities + self._noise * prior) / prior
        places: dict[str | None, list[int]] = {}
        for row, group in enumerate(groups):
            places.setdefault(group, []).append(row)
        posterior, stays = np.empty_like(ratios), 0.0
        for group, rows in places.items():
            before = self._held.pop(group, prior)
            posterior[rows], last, expected = _smooth(ratios[rows], before, self.stay, prior)
            self._held[group] = last
            stays += expected
        while len(self._held) > self._groups:
            self._held.popitem(last=False)
        self._learn(posterior, stays)
        return posterior

    def _learn(self, posterior: Array, stays: float) -> None:
        rows = len(posterior)
        share = rows / (rows + self._memory)
        self.stay = min(self.stay + share * (stays / rows - self.stay), STAY_LIMIT)
        share = rows / (rows + 8 * self._memory)
        # A floor keeps a class that has long been absent possible.
        mean = 0.9 * posterior.mean(0) + 0.1 / self._classes
        self.frequencies = self.frequencies + share * (mean - self.frequencies)

    def state_dict(self) -> State:
        """Stay probability, frequencies, and each group's last posterior."""
        held = np.array(list(self._held.values())).reshape(-1, self._classes)
        return {
            "stay": self.stay,
            "frequencies": torch.from_numpy(self.frequencies),
            "groups": list(self._held),
            "posteriors": torch.from_numpy(held),
        }

    def load_state_dict(self, state: Any) -> None:
        """Take over a copy of a state."""
        self.stay = float(state["stay"])
        self.frequencies = state["frequencies"].numpy().copy()
        self._held = OrderedDict(zip(state["groups"], state["posteriors"].numpy().copy(), strict=True))


def _smooth(ratios: Array, before: Array, stay: float, prior: Array) -> tuple[Array, Array, float]:
    """Posteriors of one group's rows, the last filtered one, and the expected number of stays."""
    rows = len(ratios)
    filtered = np.empty_like(ratios)
    last = before
    for t in range(rows):
        last = ratios[t] * (stay * last + (1 - stay) * prior)
        last /= last.sum()
        filtered[t] = last
    earlier = np.concatenate([before[None], filtered[:-1]])
    backward = np.ones_like(prior)
    posterior, stays = np.empty_like(ratios), 0.0
    for t in range(rows - 1, -1, -1):
        posterior[t] = filtered[t] * backward
        message = ratios[t] * backward
        jump = (1 - stay) * float(prior @ message)
        kept = stay * float(earlier[t] @ message)
        stays += kept / (kept + jump)
        backward = stay * message + jump
        backward /= backward.max()
    posterior /= posterior.sum(1, keepdims=True)
    return posterior, last, stays
