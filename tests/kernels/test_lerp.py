from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels as public

SIZES = [(1,), (41,), (1271,), (4096,), (3, 4097), (), (0,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def pair(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("weight", [0.0, 0.001, 0.3, 0.5, 0.999, 1.0, -0.2, 1.5])
def test_moves_every_target_by_its_share_of_the_way(kernels: ModuleType, device: str, weight: float) -> None:
    pairs = [pair(shape, seed) for seed, shape in enumerate(SIZES)]
    targets, sources = [start.to(device, copy=True) for start, _ in pairs], [end.to(device) for _, end in pairs]
    kernels.lerp_(targets, sources, weight)
    for (start, end), target, source in zip(pairs, targets, sources, strict=True):
        expected = start.double() + weight * (end.double() - start.double())
        torch.testing.assert_close(target.cpu().double(), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(source.cpu(), end)


def test_weights_of_zero_and_one_are_exact(kernels: ModuleType, device: str) -> None:
    start, end = torch.tensor([1e8, -3.0, 0.1], device=device), torch.tensor([1e-8, 7.0, 0.3], device=device)
    for weight, expected in ((0.0, start), (1.0, end)):
        target = start.clone()
        kernels.lerp_([target], [end], weight)
        assert torch.equal(target, expected)


@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once_from_a_wide_result(
    kernels: ModuleType, device: str, dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    start, end = pair((41,), 5)
    start, end = start.to(dtype), end.to(source_dtype)
    target = start.to(device, copy=True)
    kernels.lerp_([target], [end.to(device)], 0.3)
    assert target.dtype == dtype
    expected = start.double() + 0.3 * (end.double() - start.double())
    # Half a unit in the last place, and what float32 leaves unsure around it.
    near = max(torch.finfo(dtype).eps / 2 * 1.001, 1e-6 if torch.float64 not in (dtype, source_dtype) else 1e-15)
    torch.testing.assert_close(target.cpu().double(), expected, atol=near, rtol=near)


def test_takes_lists_of_several_dtypes(kernels: ModuleType, device: str) -> None:
    targets = [torch.zeros(3, dtype=dtype, device=device) for dtype in DTYPES]
    sources = [torch.ones(3, dtype=dtype, device=device) for dtype in reversed(DTYPES)]
    kernels.lerp_(targets, sources, 0.25)
    assert [target.tolist() for target in targets] == [[0.25] * 3] * 4


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "one_only", "offset"])
def test_takes_tensors_of_any_layout(kernels: ModuleType, device: str, layout: str) -> None:
    start, end = (tensor.to(device) for tensor in pair((2, 3, 4, 5), 9))
    expected = torch.lerp(start, end, 0.4)
    last = torch.channels_last
    target, source = {
        "channels_last": lambda: (start.to(memory_format=last), end.to(memory_format=last)),
        "transposed": lambda: (start.mT.contiguous().mT, end.mT.contiguous().mT),
        "strided": lambda: (torch.zeros(2, 3, 4, 10, device=device)[..., ::2].copy_(start), end),
        "one_only": lambda: (start.clone(), end.to(memory_format=last)),
        "offset": lambda: (torch.zeros(121, device=device)[1:].view(2, 3, 4, 5).copy_(start), end),
    }[layout]()
    kernels.lerp_([target], [source], 0.4)
    torch.testing.assert_close(target, expected)


def test_moves_parameters_without_a_gradient_and_lets_autograd_know(kernels: ModuleType, device: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, device=device))
    squared = (parameter * parameter).sum()
    kernels.lerp_([parameter], [torch.ones(3, device=device)], 0.5)
    assert parameter.grad_fn is None
    assert parameter.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def test_follows_tensors_to_new_places(kernels: ModuleType, device: str) -> None:
    kept = []
    for size in (5, 7, 5):
        target = torch.zeros(size, device=device)
        kernels.lerp_([target], [torch.ones(size, device=device)], 0.5)
        kept.append(target)
    assert all(bool((target == 0.5).all()) for target in kept)


def test_repeated_steps_are_a_moving_average(kernels: ModuleType, device: str) -> None:
    average, value = torch.zeros(1, device=device), torch.ones(1, device=device)
    for _ in range(10):
        kernels.lerp_([average], [value], 0.1)
    assert average.item() == pytest.approx(1 - 0.9**10, rel=1e-6)


def test_nothing_to_do_is_no_error() -> None:
    public.lerp_([], [], 0.5)


@pytest.mark.parametrize(
    ("targets", "sources", "weight", "error", "message"),
    [
        ([torch.zeros(1, dtype=torch.int64)], [torch.zeros(1)], 0.5, TypeError, "pair 0 is torch.int64"),
        ([torch.zeros(1)], [torch.zeros(1, dtype=torch.bool)], 0.5, TypeError, "copy integer buffers instead"),
        ([torch.zeros(2)], [torch.zeros(1)], 0.5, ValueError, r"pair 0 is \(2,\) and \(1,\)"),
        ([torch.zeros(2)], [], 0.5, ValueError, "as many sources as targets, got 0 and 1"),
        ([torch.zeros(1)], [torch.zeros(1, device="meta")], 0.5, ValueError, "one device"),
        ([torch.zeros(1)], [torch.zeros(1)], float("nan"), ValueError, "finite weight, got nan"),
    ],
)
def test_refuses_what_it_cannot_combine(
    targets: list[Tensor], sources: list[Tensor], weight: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        public.lerp_(targets, sources, weight)
