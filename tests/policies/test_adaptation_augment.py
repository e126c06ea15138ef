from __future__ import annotations

import pytest
import torch

from policies.augment import _blur, _colour_matrix, _warp, augment, strong_image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_of_any_channels_stay_images(channels: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    images = torch.rand(5, channels, 9, 7).contiguous(memory_format=layout)
    before = images.clone()
    views = strong_image(images, generator(), 0.005)
    assert views.shape == images.shape
    assert views.is_contiguous(memory_format=layout)
    assert 0 <= float(views.min()) <= float(views.max()) <= 1
    assert not torch.equal(views, images)
    assert torch.equal(images, before)


def test_rows_get_parameters_of_their_own_and_the_generator_decides() -> None:
    images = torch.rand(1, 3, 8, 8, generator=generator()).expand(4, -1, -1, -1)
    views = strong_image(images, generator(1), 0.0)
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views, strong_image(images, generator(1), 0.0))
    assert not torch.equal(views, strong_image(images, generator(2), 0.0))


def test_strength_scales_how_far_views_are_from_the_images() -> None:
    grey = torch.full((16, 3, 8, 8), 0.4)
    views = [strong_image(grey, generator(1), 0.0, strength) for strength in (0.0, 0.5, 1.0)]
    far = [float((view - grey).abs().mean()) for view in views]
    assert far[0] == pytest.approx(0, abs=1e-5)
    assert 0.4 * far[2] < far[1] < 0.6 * far[2]


def test_kinds_are_found_by_the_inputs() -> None:
    rows, tokens = torch.randn(50, 3), torch.arange(6).view(2, 3)
    assert augment("auto", tokens, generator(), image_noise=0.1, noise=0.1) is tokens
    assert augment("none", rows, generator(), image_noise=0.1, noise=0.1) is rows
    noisy = augment("auto", rows * torch.tensor([0.0, 1.0, 100.0]), generator(), image_noise=0.1, noise=0.1)
    spread = (noisy - rows * torch.tensor([0.0, 1.0, 100.0])).std(0)
    assert float(spread[0]) == 0
    assert float(spread[1]) == pytest.approx(0.1, rel=0.4)
    assert float(spread[2]) == pytest.approx(10, rel=0.4)


def test_an_affine_map_at_its_middle_is_the_identity_and_flips_exactly() -> None:
    image = torch.rand(2, 3, 6, 6, generator=generator())
    none = torch.zeros(2)
    got = _warp(image, none, none + 1, (none, none), flip=torch.tensor([False, True]))
    torch.testing.assert_close(got[0], image[0])
    torch.testing.assert_close(got[1], image[1].flip(2))


def test_no_change_of_saturation_and_hue_keeps_colours_and_any_keeps_grey() -> None:
    same = _colour_matrix(torch.ones(1), torch.zeros(1))
    torch.testing.assert_close(same[0], torch.eye(3), atol=1e-5, rtol=0)
    turned = _colour_matrix(torch.tensor([1.4]), torch.tensor([0.3]))
    torch.testing.assert_close(turned[0] @ torch.ones(3), torch.ones(3), atol=1e-3, rtol=0)


def test_a_blur_keeps_the_mean_of_flat_images_and_spreads_a_point() -> None:
    flat = torch.full((1, 1, 7, 7), 0.3)
    torch.testing.assert_close(_blur(flat, torch.tensor([0.5])), flat)
    point = torch.zeros(1, 1, 7, 7)
    point[0, 0, 3, 3] = 1
    spread = _blur(point, torch.tensor([0.5]))
    weight = torch.softmax(-2.0 * torch.arange(-2, 3).square(), 0)
    torch.testing.assert_close(spread[0, 0, 3, 1:6], weight[2] * weight)
    torch.testing.assert_close(_blur(point, torch.tensor([0.001])), point)
