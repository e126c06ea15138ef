"""The demonstration's stream: phases of real corruption over real digits, classes correlated in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]
Corruption = Callable[[Images, np.random.Generator], Images]


def _clean(x: Images, rng: np.random.Generator) -> Images:
    return x


def _noise(x: Images, rng: np.random.Generator) -> Images:
    return x + rng.normal(scale=0.22, size=x.shape).astype(np.float32)


def _blur(x: Images, rng: np.random.Generator) -> Images:
    from scipy import ndimage

    blurred: Images = ndimage.gaussian_filter(x, (0, 0.7, 0.7))
    return blurred


def _rotation(x: Images, rng: np.random.Generator) -> Images:
    from scipy import ndimage

    rotated: Images = ndimage.rotate(x, 22, axes=(1, 2), reshape=False, order=1)
    return rotated


def _contrast(x: Images, rng: np.random.Generator) -> Images:
    return np.float32(0.12) + np.float32(0.7) * x


CORRUPTIONS: dict[str, Corruption] = {
    "clean": _clean,
    "noise": _noise,
    "blur": _blur,
    "rotation": _rotation,
    "contrast": _contrast,
}

PHASES = ("clean", "noise", "blur", "clean", "rotation", "contrast", "noise", "rotation", "blur", "clean")
"""What happens, in order; drifts come back."""


@dataclass(frozen=True, slots=True)
class Digits:
    """The data set, split: the model is trained on one half and never sees the other.

    Attributes:
        train_x: ``(N, 8, 8)`` float32 in [0, 1].
        train_y: ``(N,)`` int64.
        test_x: ``(M, 8, 8)``.
        test_y: ``(M,)``.
    """

    train_x: Images
    train_y: NDArray[np.int64]
    test_x: Images
    test_y: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stream:
    """A recorded stream.

    Attributes:
        x: ``(N, 8, 8)`` uint8, 255 is full ink.
        y: ``(N,)`` int64.
        t: ``(N,)`` float64 event times in seconds.
        domain: ``(N,)`` int64, index into `PHASES`.
        label_at: ``(N,)`` float64 time at which the label becomes known; infinite where it never does.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    t: NDArray[np.float64]
    domain: NDArray[np.int64]
    label_at: NDArray[np.float64]


def load_digits(seed: int = 0) -> Digits:
    """The 1,797 handwritten digits that come with scikit-learn, split in halves."""
    from sklearn import datasets

    data = datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x, y = (data.images[order] / 16).astype(np.float32), data.target[order].astype(np.int64)
    half = len(y) // 2
    return Digits(x[:half], y[:half], x[half:], y[half:])


def correlated_order(y: NDArray[np.int64], gamma: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of ``y`` in an order in which classes come in bursts.

    Each class is spread over as many slots as there are classes by shares drawn from Dirichlet(gamma); slots follow one
    another, and inside a slot classes follow one another.
    """
    classes = np.unique(y)
    slots: list[list[NDArray[np.int64]]] = [[] for _ in classes]
    for cls, shares in zip(classes, rng.dirichlet([gamma] * len(classes), len(classes)), strict=True):
        rows = rng.permutation(np.flatnonzero(y == cls))
        cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for slot, part in zip(slots, np.split(rows, cuts), strict=True):
            slot.append(part)
    return np.concatenate([slot[i] for slot in slots for i in rng.permutation(len(slot))])


def make_stream(
    digits: Digits,
    events: int = 20_000,
    *,
    seed: int = 0,
    gamma: float = 0.5,
    rate: float = 100.0,
    feedback_share: float = 0.2,
    delay: tuple[float, float] = (0.5, 4.0),
) -> Stream:
    """Draw the stream.

    Args:
        digits: Where images come from; the test half is used.
        events: How many, spread evenly over `PHASES`.
        seed: Seed of every draw.
        gamma: Concentration of the classes in time; small is bursty.
        rate: Events per second of event time.
        feedback_share: Share of the events whose label becomes known.
        delay: Shortest and longest time from event to label, in seconds.
    """
    rng = np.random.default_rng(seed)
    xs, ys, domains = [], [], []
    for number, (phase, rows) in enumerate(zip(PHASES, np.array_split(np.arange(events), len(PHASES)), strict=True)):
        drawn = rng.integers(len(digits.test_y), size=len(rows))
        drawn = drawn[correlated_order(digits.test_y[drawn], gamma, rng)]
        xs.append(CORRUPTIONS[phase](digits.test_x[drawn], rng))
        ys.append(digits.test_y[drawn])
        domains.append(np.full(len(rows), number))
    t = 1_700_000_000.0 + np.arange(events) / rate
    known = rng.random(events) < feedback_share
    label_at = np.where(known, t + rng.uniform(*delay, size=events), np.inf)
    x = (np.clip(np.concatenate(xs), 0, 1) * 255).round().astype(np.uint8)
    return Stream(x, np.concatenate(ys), t, np.concatenate(domains), label_at)
