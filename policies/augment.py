"""Strong augmentation in batched tensor operations: every row gets parameters of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from policies.interfaces import MethodParams

Augmentation = Literal["auto", "image", "noise", "none"]


class ViewParams(MethodParams):
    """How a method makes views of its inputs.

    Attributes:
        augmentation: How views are made, see `policies.augment.augment`.
        image_noise: Standard deviation of the pixel noise of ``image``.
        noise: Standard deviation of ``noise`` in units of each feature's own.
    """

    augmentation: Augmentation = "auto"
    image_noise: float = Field(default=0.005, ge=0)
    noise: float = Field(default=0.1, ge=0)

    def view(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """A strongly augmented copy of ``inputs (N, *shape)``."""
        return augment(self.augmentation, inputs, generator, image_noise=self.image_noise, noise=self.noise)


_GREY = (0.299, 0.587, 0.114)
"""Luma of red, green and blue (ITU-R BT.601)."""


def augment(
    kind: Augmentation,
    inputs: Tensor,
    generator: torch.Generator,
    *,
    image_noise: float,
    noise: float,
    strength: float = 1.0,
) -> Tensor:
    """An augmented copy of ``inputs``, strongly so by default.

    Args:
        kind: ``image`` for images ``(N, C, H, W)`` in [0, 1]; ``noise`` for any floating rows; ``none``; ``auto`` takes
            ``image`` for four-dimensional floating inputs, ``noise`` for other floating ones and ``none`` for the rest.
        inputs: ``(N, *shape)``, not changed.
        generator: On the device of ``inputs``; its state moves on.
        image_noise: Standard deviation of the pixel noise of ``image``.
        noise: Standard deviation of ``noise`` in units of each feature's own over the rows.
        strength: Of ``image``, see `strong_image`.

    Returns:
        ``(N, *shape)``; ``inputs`` itself where nothing is to be done.
    """
    if kind == "none" or not inputs.is_floating_point():
        return inputs
    if kind == "noise" or (kind == "auto" and inputs.dim() != 4):
        return feature_noise(inputs, generator, noise)
    return strong_image(inputs, generator, image_noise, strength)


def feature_noise(inputs: Tensor, generator: torch.Generator, noise: float) -> Tensor:
    """Add Gaussian noise of ``noise`` standard deviations of each feature over the rows ``(N, *shape)``."""
    drawn = torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
    return torch.addcmul(inputs, drawn, inputs.std(0, correction=0, keepdim=True), value=noise)


def shuffled(inputs: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """A copy of ``inputs (N, *shape)`` whose parts have changed places, another way for every row.

    Images ``(N, C, H, W)`` are cut into ``patches x patches`` pieces, other rows along their first dimension into at
    most ``patches ** 2`` blocks; what a cut leaves over stays in place.
    """
    out = inputs.clone()
    if inputs.dim() == 4 and min(inputs.shape[2:]) >= patches:
        count, channels = inputs.shape[:2]
        high, wide = inputs.shape[2] // patches, inputs.shape[3] // patches
        view = inputs[:, :, : high * patches, : wide * patches].reshape(count, channels, patches, high, patches, wide)
        pieces = _moved(view.permute(0, 2, 4, 1, 3, 5).flatten(1, 2), generator)
        whole = pieces.unflatten(1, (patches, patches)).permute(0, 3, 1, 4, 2, 5)
        out[:, :, : high * patches, : wide * patches] = whole.reshape(count, channels, high * patches, wide * patches)
    elif inputs.dim() > 1:
        blocks = min(patches * patches, inputs.shape[1])
        length = inputs.shape[1] // blocks
        view = inputs[:, : blocks * length].unflatten(1, (blocks, length))
        out[:, : blocks * length] = _moved(view, generator).flatten(1, 2)
    return out


def _moved(pieces: Tensor, generator: torch.Generator) -> Tensor:
    """Pieces ``(N, P, ...)`` in an order of its own for every row."""
    drawn = torch.rand(pieces.shape[:2], generator=generator, device=pieces.device)
    order = drawn.argsort(1).view(*pieces.shape[:2], *[1] * (pieces.dim() - 2))
    return pieces.gather(1, order.expand_as(pieces))


def strong_image(images: Tensor, generator: torch.Generator, noise: float, strength: float = 1.0) -> Tensor:
    """The strong augmentation of CoTTA and RoTTA for images ``(N, C, H, W)`` in [0, 1].

    Colour jitter (brightness 0.6 to 1.4, contrast 0.7 to 1.3, saturation 0.5 to 1.5, hue -0.06 to 0.06 of a turn,
    gamma 0.7 to 1.3), affine map with the edge repeated (15 degrees, shift of 1/16, scale 0.9 to 1.1), horizontal flip
    of every second image on average, Gaussian blur over 5 pixels (sigma 0.001 to 0.5), noise, all clipped to [0, 1].

    ``strength`` scales all these ranges around no change, but for the flip, the shift and the noise; 0.5 is the mild
    form that ROID uses.

    Deviations: parameters are drawn per image, not per batch; the jitter's order is fixed; hue turns in YIQ instead of
    HSV space; images without three channels keep saturation and hue.
    """
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    drawn = torch.rand(11, len(images), generator=generator, device=images.device, dtype=images.dtype)

    def between(index: int, low: float, high: float) -> Tensor:
        return torch.lerp(drawn.new_tensor(low), drawn.new_tensor(high), drawn[index])

    def around(index: int, middle: float, reach: float) -> Tensor:
        return between(index, middle - reach * strength, middle + reach * strength)

    # The clone in plain layout: channel planes are what the jitter and the resampling walk along.
    out: Tensor = images.contiguous().clamp(0, 1)
    out = _jitter(out, around)
    out = _warp(
        out,
        around(5, 0, math.pi / 12),
        around(6, 1, 0.1),
        (between(7, -0.125, 0.125), between(10, -0.125, 0.125)),
        flip=drawn[8] < 0.5,
    )
    out = _blur(out, between(9, 0.001, 0.5 * strength))
    grain = torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)
    return out.add_(grain, alpha=noise).clamp_(0, 1).contiguous(memory_format=layout)


def _jitter(out: Tensor, around: Callable[[int, float, float], Tensor]) -> Tensor:
    """Brightness, contrast, saturation and hue, gamma; ``out`` is changed in place or replaced."""
    rows = (-1, 1, 1, 1)
    out = out.mul_(around(0, 1, 0.4).view(rows)).clamp_(0, 1)
    colour = out.shape[1] == 3
    grey = torch.einsum("nchw,c->n", out, out.new_tensor(_GREY)) if colour else out.sum((1, 2, 3)) / out.shape[1]
    contrast = around(1, 1, 0.3)
    shift = (1 - contrast) * grey / (out.shape[2] * out.shape[3])
    out = torch.addcmul(shift.view(rows), out, contrast.view(rows)).clamp_(0, 1)
    if colour:
        turn = _colour_matrix(around(2, 1, 0.5), around(3, 0, 0.06) * (2 * math.pi))
        out = torch.bmm(turn, out.flatten(2)).view(out.shape).clamp_(0, 1)
    # 0 ** gamma has an infinite slope but no gradient ever goes this way.
    return out.pow_(around(4, 1, 0.3).view(rows))


def _colour_matrix(saturation: Tensor, angle: Tensor) -> Tensor:
    """``(n, 3, 3)`` matrices on RGB that turn and scale chroma around the grey axis and keep luma."""
    to_yiq = saturation.new_tensor([_GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    cosine, sine = saturation * angle.cos(), saturation * angle.sin()
    middle = torch.zeros(len(angle), 3, 3, device=angle.device, dtype=angle.dtype)
    middle[:, 0, 0] = 1
    middle[:, 1, 1] = middle[:, 2, 2] = cosine
    middle[:, 1, 2], middle[:, 2, 1] = -sine, sine
    turn: Tensor = torch.linalg.inv(to_yiq) @ middle @ to_yiq
    return turn


def _warp(images: Tensor, angle: Tensor, scale: Tensor, shift: tuple[Tensor, Tensor], flip: Tensor) -> Tensor:
    """Rotate, scale, shift (in half widths and heights) and flip in one bilinear resampling that repeats the edge."""
    (across, down), (height, width) = shift, images.shape[2:]
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    mirror = torch.where(flip, -1.0, 1.0).to(images.dtype)
    # grid_sample maps output to input in units of half the width and height; rotation acts on pixels.
    theta = torch.stack(
        [
            torch.stack([cosine * mirror, sine * (height / width), across], 1),
            torch.stack([-sine * mirror * (width / height), cosine, down], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur over 5 pixels with ``sigma (n,)`` per image; edges repeat."""
    offsets = torch.arange(-2, 3, device=sigma.device, dtype=sigma.dtype)
    taps = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), 1)
    for dim in (2, 3):
        padded = F.pad(images, (0, 0, 2, 2) if dim == 2 else (2, 2, 0, 0), mode="replicate")
        length = images.shape[dim]
        images = images * taps[:, 2].view(-1, 1, 1, 1)
        for tap in (0, 1, 3, 4):
            images.addcmul_(padded.narrow(dim, tap, length), taps[:, tap].view(-1, 1, 1, 1))
    return images
