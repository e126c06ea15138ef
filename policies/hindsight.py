"""What late labels say of two ways to answer, both of which had answered a row before its label came."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from policies.chain import Array
from policies.interfaces import State

REMEMBERED = 2048
"""Rows whose two answers are remembered for each question; the oldest go first."""

FRESH = 64
"""Windows for which a label tells that labels arrive."""

EVERY = 8
"""Rows to one that is answered both ways while labels arrive."""

BETS = (0.05, 0.1, 0.2, 0.4)
"""Shares of their wealth that purses put on each block for leaving the source model's way."""

BETS_BACK = (0.1, 0.2, 0.4, 0.8)
"""The same for going back to it: bolder, as going back in vain costs little."""

SURE = 20.0
"""Wealth at which labels have spoken for leaving the source model's way."""

UNSURE = 10.0
"""Wealth at which labels have spoken for going back to it: the floor takes less."""

LATE_BLOCKS = 0.05
"""Share of a block in the mean square of rows that blocks have of late."""

LATE = 256
"""Decided rows over which the share of them that was won is averaged."""


class Wager:
    """Wealth from betting, block by block, that one way to answer beats another.

    With ``d_t`` in [-1, 1] what a block says, and one purse for each share ``b``,

        w_b <- min(max(w_b, 1) (1 + b d_t), limit n),   wealth = mean_b w_b

    over the ``n`` purses. Where the way is no better, whatever the blocks before have shown, no ``1 + b d_t`` is more
    than 1 in the mean, and it takes ``x`` blocks or more in the mean until the wealth reaches ``x`` by chance: however
    often one looks, and with no number of rows set beforehand. ``max(w, 1)`` forgets: a purse that is down starts anew,
    so that a change is found as fast after a year as on the first day. (The e-CUSUM of Shin, Ramdas and Rinaldo,
    "E-detectors", 2023; bets after Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
    2023.) McNemar's test on the same rows would have to be corrected for every look, and takes rows for independent.

    Args:
        bets: The shares.
    """

    def __init__(self, bets: Sequence[float]) -> None:
        self._bets = bets
        self.reset()

    def reset(self) -> None:
        """Forget all blocks."""
        self.purses = [1.0] * len(self._bets)

    @property
    def wealth(self) -> float:
        """The mean over the purses."""
        return sum(self.purses) / len(self.purses)

    def see(self, found: float, limit: float) -> None:
        """Take in a block; the wealth is not to grow far beyond ``limit``, or a change would be found late."""
        most = limit * len(self._bets)
        self.purses = [
            min(max(purse, 1.0) * (1 + bet * found), most) for purse, bet in zip(self.purses, self._bets, strict=True)
        ]


class Question:
    """Whether one way to answer, ``on``, beats the other, ``off``, which is nearer to the source model's.

    Rows that both answer alike say nothing and are not kept. Of the others, those of one window make one block, as
    neighbours are often right or wrong together: with ``won`` rows that ``on`` alone had right and ``lost`` that
    ``off`` alone had right, it says ``(won - lost) / max(won + lost, s)``, with ``s`` the root of the mean square of
    ``won + lost`` in the blocks before, from 1 to ``most``. So few rows now and then do not outweigh many at once. A
    label that comes after one of a later window counts in the block of that one, so that there are never more blocks
    than windows. There is a `Wager` in each direction.

    Args:
        most: Rows, right one way alone, from which on a block counts in full in any case.
        rest: Windows for which a way that labels spoke against is not taken up again without them; twice as many each
            time.

    Attributes:
        compared: Rows judged so far, answered differently by the two ways.
        won: Share of late, among rows that one way alone had right, of those that ``on`` had right; 0.5 at first.
        licensed: Whether ``on`` is in force because labels say so.
        vetoes: How often labels have ended ``on``; each doubles the wealth that it takes for labels to call for it.
        resting: Windows for which ``on`` is not taken up again without labels.
        silent: Windows looked at since a row was judged last; many before the first.
        why: The reason of the last decision.
    """

    def __init__(self, most: int, rest: int) -> None:
        self._most, self._rest = most, rest
        self._wagers = Wager(BETS), Wager(BETS_BACK)
        self.reset()

    def reset(self) -> None:
        """Forget all rows and what they said."""
        self._rows: OrderedDict[str, tuple[int, int, int]] = OrderedDict()
        for wager in self._wagers:
            wager.reset()
        self._window, self._won, self._lost = 0, 0, 0
        self.compared = self._decided = 0
        self.won = 0.5
        self._square = 0.0
        self.licensed = False
        self.vetoes = self.resting = 0
        self.silent = FRESH
        self.why = ""

    def __len__(self) -> int:
        return len(self._rows)

    def note(self, ids: Sequence[str], on: Sequence[int], off: Sequence[int], window: int) -> None:
        """Remember the classes that rows were answered with both ways, in the window of that number."""
        for name, one, other in zip(ids, on, off, strict=True):
            if one != other:
                self._rows[name] = (window, one, other)
        while len(self._rows) > REMEMBERED:
            self._rows.popitem(last=False)

    def judge(self, name: str, label: int) -> None:
        """Take in the label of a row, if it is remembered."""
        found = self._rows.pop(name, None)
        if found is None:
            return
        window, on, off = found
        if window > self._window:
            self._close()
            self._window = window
        self.silent = 0
        self.compared += 1
        if label not in (on, off):
            return
        won = label == on
        self._won, self._lost = self._won + won, self._lost + (not won)
        self._decided += 1
        self.won += max(1 / LATE, 1 / (self._decided + 1)) * (won - self.won)

    def _close(self) -> None:
        """Wager on the block."""
        rows = self._won + self._lost
        if rows:
            better, worse = self._wagers
            usual = min(max(self._square**0.5, 1.0), self._most) if self._square else self._most
            found = (self._won - self._lost) / max(rows, usual)
            better.see(found, self._called_for)
            worse.see(-found, self._called_for)
            self._square += (LATE_BLOCKS if self._square else 1.0) * (rows**2 - self._square)
        self._won = self._lost = 0

    @property
    def _called_for(self) -> float:
        """Wealth that it takes for ``on``."""
        return SURE * 2.0 ** min(self.vetoes, 10)

    def decide(self, on: bool) -> bool | None:
        """What is to be in force after one more window where ``on`` is or is not; None where labels leave it open."""
        self.silent += 1
        self.resting = max(0, self.resting - 1)
        better, worse = (wager.wealth for wager in self._wagers)
        self.why = f"labels: {self.won:.3g} of the rows that one way alone had right, of {self.compared} compared"
        if on and worse >= UNSURE:
            self.resting = self._rest * 2 ** min(self.vetoes, 10)
            self.vetoes += 1
            self.licensed = False
            return False
        if self.silent > FRESH:
            return self._unheard()
        if better >= self._called_for:
            self.licensed |= not on
            return True
        return self.licensed or (False if self.resting else None)

    def _unheard(self) -> bool | None:
        """What to do where labels have stopped coming: what they alone called for ends, what they said is past."""
        ended, self.licensed = self.licensed, False
        for wager in self._wagers:
            wager.reset()
        self.why = "labels have stopped"
        return False if ended or self.resting else None

    def state_dict(self) -> State:
        """All numbers, and the rows remembered, the oldest first."""
        counts = [self._window, self._won, self._lost, self.compared, self._decided]
        counts += [int(self.licensed), self.vetoes, self.resting, self.silent]
        rows = [[name, *found] for name, found in self._rows.items()]
        purses = [list(wager.purses) for wager in self._wagers]
        return {"rows": rows, "purses": purses, "counts": counts, "means": [self.won, self._square]}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self._rows = OrderedDict((name, (window, on, off)) for name, window, on, off in state["rows"])
        for wager, purses in zip(self._wagers, state["purses"], strict=True):
            wager.purses = list(map(float, purses))
        self._window, self._won, self._lost, self.compared, self._decided, *rest = map(int, state["counts"])
        licensed, self.vetoes, self.resting, self.silent = rest
        self.licensed = bool(licensed)
        self.won, self._square = map(float, state["means"])


class Hindsight:
    """What labels say of auto's two choices: whether to adapt, and whether to answer from the chain of classes.

    Nothing is decided when a label comes: `Question.decide` is asked once a window. Rows are remembered while labels
    arrive alone.

    Args:
        window: Rows of a window.
        rest: See `Question`.

    Attributes:
        adapting: Adapting against the source model's statistics and the weights of before any step. Labelled learning
            moves both, so both have what it taught. Rows of probes and trials; while labels arrive one row in `EVERY`
            besides.
        chain: The chain's answers against those of the model in force, on all rows.
    """

    def __init__(self, window: int, rest: int) -> None:
        self._size = window
        self.adapting = Question(max(1, window // 16), rest)
        self.chain = Question(max(1, window // 4), rest)
        self._fresh = self._passed = 0

    @property
    def _questions(self) -> dict[str, Question]:
        return {"adapting": self.adapting, "chain": self.chain}

    def reset(self) -> None:
        """Forget all."""
        for question in self._questions.values():
            question.reset()
        self._fresh = self._passed = 0

    @property
    def arriving(self) -> bool:
        """Whether labels arrive."""
        return self._fresh > 0

    def hear(self, ids: Sequence[str], labels: Sequence[int]) -> None:
        """Take in labels of rows, in the order in which they came; ids that are not remembered say nothing."""
        for name, label in zip(ids, labels, strict=True):
            for question in (self.adapting, self.chain):
                question.judge(name, label)
        self._fresh = FRESH

    def window_passed(self) -> bool:
        """A window has passed; whether labels have stopped arriving with it."""
        stopped = self._fresh == 1
        self._fresh -= self.arriving
        return stopped

    def choose(self, rows: int) -> slice:
        """Which of the next so many rows to answer both ways for their labels."""
        first = -self._passed % EVERY
        return slice(first, rows, EVERY)

    def answered(self, rows: int) -> None:
        """So many rows were answered."""
        self._passed += rows

    def compare(self, ids: Sequence[str], on: Tensor, off: Tensor) -> None:
        """While labels arrive, remember rows by their logits ``(n, K)``: adapting, and otherwise."""
        if self.arriving:
            self.adapting.note(ids, _classes(on), _classes(off), self._passed // self._size)

    def compare_chain(self, ids: Sequence[str], on: Array, off: Array) -> None:
        """While labels arrive, remember rows by their probabilities ``(n, K)``: with the chain, and without."""
        if self.arriving:
            self.chain.note(ids, on.argmax(1).tolist(), off.argmax(1).tolist(), self._passed // self._size)

    @property
    def gauges(self) -> dict[str, float]:
        """Rows compared and the share won, for both questions."""
        return {
            "labels_adapting": self.adapting.compared,
            "labels_adapting_won": self.adapting.won,
            "labels_chain": self.chain.compared,
            "labels_chain_won": self.chain.won,
            "labels_vetoes": self.adapting.vetoes + self.chain.vetoes,
        }

    def state_dict(self) -> State:
        """The state of both questions and the rows passed."""
        states = {name: question.state_dict() for name, question in self._questions.items()}
        return states | {"counts": [self._fresh, self._passed]}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        for name, question in self._questions.items():
            question.load_state_dict(state[name])
        self._fresh, self._passed = map(int, state["counts"])


def _classes(logits: Tensor) -> list[int]:
    """The class of each row; -1, which is never right, where logits are not finite."""
    good = logits.isfinite().all(1)
    return torch.where(good, logits.argmax(1), -1).tolist()
