"""Moments of what reaches BatchNorm layers, row by row, and their split into a common part and offsets of classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from policies.interfaces import Context, State
from policies.norm import BlendedBatchNorm, Blending

TRUST = 4.0
"""Rows of a class at which its mean within a window counts half: a mean of few rows is mostly noise."""

LEAST_VARIANCE = 1e-3
"""Floor of an estimated variance, in units of the source model's."""

LARGEST = 1e4
"""A row most of whose moments are larger than this, in units of the source model's, tells nothing of the stream."""


FARTHEST = 30.0
"""Larger moments of the first layer are taken for this, in the same units, so that a few rows tell little."""


class MeasuredBatchNorm(BlendedBatchNorm):
    """A `BlendedBatchNorm` that keeps the moments of each row of a forward while `measuring`.

    Attributes:
        measuring: Whether to keep them.
        rows: ``(B, 2 C)``: means of ``z`` and of ``z^2`` over positions, for ``z = (x - mean) / sqrt(var + eps)`` with
            the source model's statistics; None where nothing was measured.
    """

    measuring = False
    rows: Tensor | None = None

    def anchor(self, source: nn.Module) -> None:
        """Take the statistics of the source model's layer as the unit of measurement."""
        mean, var = source.running_mean, source.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        self.source_mean = mean.detach().float().clone()
        self.source_scale = (var.detach().float() + self.eps).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, ...)`` channel by channel, and measure."""
        if self.measuring:
            with torch.no_grad():
                self.rows = self._measure(x.detach())
        return super().forward(x)

    def _measure(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        places = tuple(range(2, x.dim()))
        mean, square = (x.mean(places), (x * x).mean(places)) if places else (x, x * x)
        first = (mean - self.source_mean) * self.source_scale
        second = (square - (2 * mean - self.source_mean) * self.source_mean) * self.source_scale.square()
        return torch.cat([first, second], 1)

    def write(self, first: Tensor, second: Tensor) -> None:
        """Store the statistics that the moments ``(C,)`` stand for, and normalise with them from now on."""
        inverse = 1 / self.source_scale
        var = (second - first.square()).clamp_min(LEAST_VARIANCE) * inverse.square() - self.eps
        self.running_mean.copy_(self.source_mean + first * inverse)
        self.running_var.copy_(var.clamp_min(0))


class ClassMoments:
    """Moments of a stream as a common part plus an offset for each class, the offsets summing to zero.

    What a window tells of the common part does then not depend on which classes it happens to hold. For the moments
    ``r`` of rows with class ``c``, ``n_c`` of them with mean ``m_c``, ``w_c = n_c / (n_c + 4)``:

        g <- g + e_g sum_c w_c (m_c - g - o_c) / sum_c w_c
        o_c <- o_c + e_o w_c (m_c - g - o_c);   then   g <- g + mean_c o_c,  o_c <- o_c - mean_c o_c

    Args:
        start: ``g`` to begin with ``(D,)``.
        num_classes: ``K``.
        offsets: Whether to learn offsets at all; without them, only the weighing by class remains.
    """

    def __init__(self, start: Tensor, num_classes: int, *, offsets: bool) -> None:
        self._start = start
        self.common = start.clone()
        self.offsets = start.new_zeros(num_classes if offsets else 0, len(start))

    def learn(self, rows: Tensor, classes: Tensor, common_rate: float, offset_rate: float) -> None:
        """Take in the moments ``(n, D)`` of rows of classes ``(n,)`` int64."""
        present, where, counts = classes.unique(return_inverse=True, return_counts=True)
        means = rows.new_zeros(len(present), rows.shape[1]).index_add_(0, where, rows) / counts[:, None]
        trust = (counts / (counts + TRUST)).to(rows.dtype)[:, None]
        held = self.offsets[present] if len(self.offsets) else 0
        self.common += common_rate * (trust * (means - self.common - held)).sum(0) / trust.sum()
        if len(self.offsets):
            self.offsets[present] += offset_rate * trust * (means - self.common - held)
            middle = self.offsets.mean(0)
            self.offsets -= middle
            self.common += middle

    def reset(self) -> None:
        """Forget all."""
        self.common.copy_(self._start)
        self.offsets.zero_()

    def state_dict(self) -> State:
        """The common part and the offsets, not copied."""
        return {"common": self.common, "offsets": self.offsets}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy; offsets of another number of classes start afresh."""
        self.common.copy_(state["common"])
        if state["offsets"].shape == self.offsets.shape:
            self.offsets.copy_(state["offsets"])
        else:
            self.offsets.zero_()


class StreamStatistics:
    """BatchNorm statistics of a model that follow a stream, whatever classes it brings.

    Forwards inside `measuring` leave moments, `take` collects them with the classes that
    the rows were answered with, and `learn` learns from whole windows and writes what follows into the layers. So
    batches of one add up to the same windows as batches of 64.

    Args:
        context: The live model's layers are replaced; the source model's give the start.
        common_rate: Share of a window in the common part, for a window of 64 rows.
        offset_rate: Share of a window in the offsets.
        window: Rows to learn from at once, at least.
    """

    def __init__(self, context: Context, *, common_rate: float, offset_rate: float, window: int) -> None:
        self.blending = Blending(context.model, share=0.0, unbiased=False, store=False, kind=MeasuredBatchNorm)
        self.layers: list[MeasuredBatchNorm] = []
        for name, layer in context.model.named_modules():
            if isinstance(layer, MeasuredBatchNorm):
                layer.anchor(context.source.get_submodule(name))
                self.layers.append(layer)
        self._rates, self._window = (common_rate, offset_rate), window
        self._sizes = [2 * layer.num_features for layer in self.layers]
        start = torch.zeros(sum(self._sizes), device=context.device)
        for layer, part in zip(self.layers, start.split(self._sizes), strict=True):
            part[layer.num_features :] = 1 - layer.eps * layer.source_scale.square()
        self.start = start
        self.moments = ClassMoments(start, context.num_classes, offsets=offset_rate > 0)
        self._rows: list[Tensor] = []
        self._classes: list[Tensor] = []
        self.rejected = 0

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def measuring(self, on: bool = True) -> Iterator[None]:
        """Let forwards inside the context leave moments for `take`, if ``on``; of the first layer in any case."""
        for number, layer in enumerate(self.layers):
            layer.measuring = on or not number
        try:
            yield
        finally:
            for layer in self.layers:
                layer.measuring = False

    def shallow(self, rows: int) -> Tensor | None:
        """The moments ``(B, 2 C)`` in the first layer of the last forward, if it was of so many rows.

        They are the same whatever is adapted, tell inputs apart far better than classes, and cost next to nothing.
        """
        found = self.layers[0].rows if self.layers else None
        if found is None or len(found) != rows:
            return None
        good = found.isfinite().all(1) & (found.abs().median(1).values < LARGEST)
        return found[good].clamp(-FARTHEST, FARTHEST)

    def take(self, classes: Tensor) -> None:
        """Keep the moments of the last forward, of rows answered with ``classes (B,)``; odd rows are left out."""
        found = [layer.rows for layer in self.layers if layer.rows is not None and len(layer.rows) == len(classes)]
        for layer in self.layers:
            layer.rows = None
        if len(found) < len(self.layers) or not found:
            return  # A layer took no part in the forward, or saw something else than rows.
        rows = torch.cat(found, 1)
        good = rows.isfinite().all(1) & (rows.abs().median(1).values < LARGEST)
        if not bool(good.all()):
            self.rejected += int((~good).sum())
            rows, classes = rows[good], classes[good]
        self._rows.append(rows.clamp(-LARGEST, LARGEST))
        self._classes.append(classes.to(rows.device))

    @torch.no_grad()
    def learn(self, slowness: float = 1.0, each: int = 1) -> int:
        """Learn from what was taken, if it makes a window, at rates so many times smaller; how many rows it was.

        Rows stand for ``each`` rows of the stream.
        """
        count = each * sum(map(len, self._rows))
        if count < self._window:
            return 0
        rows, classes = torch.cat(self._rows), torch.cat(self._classes)
        self._rows, self._classes = [], []
        common, offset = (rate / slowness for rate in self._rates)
        self.moments.learn(rows, classes, 1 - (1 - common) ** (count / 64), offset)
        return count

    @torch.no_grad()
    def write(self, *, source: bool) -> None:
        """Let the layers normalise with the source model's statistics, or with those of the stream."""
        parts = (self.start if source else self.moments.common).split(self._sizes)
        for layer, part in zip(self.layers, parts, strict=True):
            layer.write(*part.split(layer.num_features))

    def drift(self) -> float:
        """How far the stream's statistics are from the source model's: the median of `distances`.

        A layer with channels that hardly vary may be far away on any stream; half of all layers are not.
        """
        return float(self.distances().median()) if self.layers else 0.0

    def distances(self) -> Tensor:
        """How far the stream's statistics are from the source model's, a layer each ``(L,)``.

        The Kullback-Leibler divergence of two normal distributions, channel by channel, and the mean over a layer:
        ``(v + m^2 - 1 - ln v) / 2`` for mean ``m`` and variance ``v`` in units of the source's.
        """
        found = []
        for layer, part in zip(self.layers, self.moments.common.split(self._sizes), strict=True):
            mean, second = part.split(layer.num_features)
            var = (second - mean.square()).clamp_min(LEAST_VARIANCE)
            found.append(((var + mean.square() - 1 - var.log()) / 2).mean())
        return torch.stack(found)

    def reset(self) -> None:
        """Forget all; the caller puts the source model's statistics back."""
        self.moments.reset()
        self._rows, self._classes = [], []
        self.rejected = 0

    def state_dict(self) -> State:
        """Moments and rows that wait for a window."""
        waiting = {"rows": list(self._rows), "classes": list(self._classes)}
        return self.moments.state_dict() | waiting | {"rejected": self.rejected}

    def load_state_dict(self, state: State) -> None:
        """Take over a copy of a state."""
        self.moments.load_state_dict(state)
        self._rows = [rows.to(self.start.device, copy=True) for rows in state["rows"]]
        self._classes = [classes.to(self.start.device, copy=True) for classes in state["classes"]]
        self.rejected = int(state["rejected"])
