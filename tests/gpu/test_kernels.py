import math
from collections.abc import Iterator

import pytest
import torch

import kernels
from kernels import dispatch, reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    yield
    dispatch._off.clear()
    dispatch._chosen.clear()


def test_every_kernel_agrees_with_the_reference_on_this_device() -> None:
    assert kernels.self_check("cuda") == ()
    assert [kernels.backend(op, "cuda") for op in kernels.OPS] == ["triton", "triton"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [0.001, 0.75, 1.0])
def test_lerp_moves_a_whole_models_worth_of_tensors(dtype: torch.dtype, weight: float) -> None:
    sizes = [1, 41, 1271, 4096, 4097, 100_003]
    starts = [torch.randn(size, device="cuda", dtype=dtype) for size in sizes]
    ends = [torch.randn(size, device="cuda") for size in sizes]
    expected = [start.clone() for start in starts]
    kernels.lerp_(starts, ends, weight)
    reference.lerp_(expected, ends, weight)
    for actual, wanted in zip(starts, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_lerp_takes_views_that_are_not_aligned() -> None:
    memory = torch.zeros(5000, device="cuda")
    kernels.lerp_([memory[1:4998]], [torch.ones(4997, device="cuda")], 0.25)
    assert memory[0].item() == 0
    assert bool((memory[1:4998] == 0.25).all())
    assert memory[4998:].tolist() == [0, 0]


def test_lerp_is_ordered_with_the_work_of_its_stream() -> None:
    side = torch.cuda.Stream()
    average = torch.zeros(1 << 20, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(10):
            kernels.lerp_([average], [torch.ones(1 << 20, device="cuda")], 0.1)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(average, torch.full_like(average, 1 - 0.9**10))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 10, 41, 1000, 1271, 50_257])
def test_softmax_entropy_and_its_gradient_agree_with_the_reference(classes: int, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(65, classes, device="cuda")).to(dtype).requires_grad_()
    actual, expected = kernels.softmax_entropy(logits), reference.softmax_entropy(logits)
    torch.testing.assert_close(actual.entropy, expected.entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual.confidence, expected.confidence, atol=1e-5, rtol=1e-4)
    assert torch.equal(actual.argmax, expected.argmax)
    (found,) = torch.autograd.grad(actual.entropy.sum(), logits)
    (wanted,) = torch.autograd.grad(expected.entropy.sum(), logits)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_softmax_entropy_gives_the_values_worked_out_by_hand() -> None:
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], device="cuda", requires_grad=True)
    entropy = kernels.softmax_entropy(logits).entropy
    torch.testing.assert_close(entropy.cpu(), torch.tensor([0.562335, math.log(2)]), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(slope.cpu(), torch.tensor([[-0.205990, 0.205990], [0, 0]]), atol=1e-6, rtol=0)


def test_rows_beyond_32_bit_offsets_are_read_where_they_are() -> None:
    rows, classes = 2**21 + 3, 1025
    logits = torch.zeros(rows, classes, device="cuda", dtype=torch.float16)
    logits[-1, 7] = 20
    result = kernels.softmax_entropy(logits)
    assert result.argmax[-1].item() == 7
    assert result.entropy[-1].item() < 1e-4
    assert result.entropy[-2].item() == pytest.approx(math.log(classes), rel=1e-5)
