import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels as public
from kernels import pytorch, reference


def gradient(kernels: ModuleType, logits: Tensor, upstream: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    (result,) = torch.autograd.grad((kernels.softmax_entropy(leaf).entropy * upstream).sum(), leaf)
    return result


def test_gives_the_values_and_gradients_worked_out_by_hand(kernels: ModuleType, device: str) -> None:
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], device=device)
    result = kernels.softmax_entropy(logits)
    torch.testing.assert_close(result.entropy.cpu(), torch.tensor([0.562335, math.log(2)]), atol=1e-6, rtol=0)
    torch.testing.assert_close(result.confidence.cpu(), torch.tensor([0.75, 0.5]))
    assert result.argmax.tolist() == [0, 0]
    expected = torch.tensor([[-0.205990, 0.205990], [0.0, 0.0]])
    actual = gradient(kernels, logits, torch.ones(2, device=device))
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("classes", [1, 2, 10, 41, 1000, 1271, 2049])
@pytest.mark.parametrize("rows", [1, 7])
def test_agrees_with_the_definition_in_double_precision(
    kernels: ModuleType, device: str, rows: int, classes: int
) -> None:
    logits = 4 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))
    upstream = torch.arange(1.0, rows + 1)
    probabilities = logits.double().softmax(1)
    entropy = torch.special.entr(probabilities).sum(1)
    slope = -upstream[:, None] * probabilities * (probabilities.log() + entropy[:, None])
    result = kernels.softmax_entropy(logits.to(device))
    torch.testing.assert_close(result.entropy.cpu().double(), entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.confidence.cpu().double(), probabilities.amax(1), atol=1e-6, rtol=1e-5)
    assert result.argmax.tolist() == logits.argmax(1).tolist()
    found = gradient(kernels, logits.to(device), upstream.to(device))
    torch.testing.assert_close(found.cpu().double(), slope, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_accumulates_wide_and_returns_gradients_of_the_dtype_of_the_logits(
    kernels: ModuleType, device: str, dtype: torch.dtype
) -> None:
    logits = torch.randn(5, 41, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result, expected = kernels.softmax_entropy(logits), reference.softmax_entropy(logits.double())
    assert (result.entropy.dtype, result.confidence.dtype, result.argmax.dtype) == (wide, wide, torch.int64)
    exact = 1e-12 if wide == torch.float64 else 1e-5
    torch.testing.assert_close(result.entropy.double(), expected.entropy, atol=exact, rtol=exact)
    slope = gradient(kernels, logits, torch.ones(5, device=device))
    assert slope.dtype == dtype
    near = torch.finfo(dtype).eps
    wanted = gradient(reference, logits.double(), torch.ones(5, device=device))
    torch.testing.assert_close(slope.double(), wanted, atol=4 * near, rtol=4 * near)


@pytest.mark.parametrize("size", [1e4, 1e8, 1e38])
def test_stays_exact_for_huge_logits(kernels: ModuleType, device: str, size: float) -> None:
    logits = torch.tensor([[size, size, -size], [-size, -size, -size]], device=device)
    result = kernels.softmax_entropy(logits)
    torch.testing.assert_close(result.entropy.cpu(), torch.tensor([math.log(2), math.log(3)]))
    torch.testing.assert_close(result.confidence.cpu(), torch.tensor([1 / 2, 1 / 3]))
    slope = gradient(kernels, logits, torch.ones(2, device=device))
    torch.testing.assert_close(slope.cpu(), torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_counts_a_logit_of_minus_infinity_as_an_impossible_class(kernels: ModuleType, device: str) -> None:
    # The impossible classes fill the whole first tile that a kernel reads.
    logits = torch.full((2, 2049), -torch.inf, device=device)
    logits[:, 2047:] = torch.tensor([math.log(3), 0.0])
    logits[1, 2048] = -torch.inf
    result = kernels.softmax_entropy(logits)
    torch.testing.assert_close(result.entropy.cpu(), torch.tensor([0.562335, 0.0]), atol=1e-6, rtol=0)
    assert result.argmax.tolist() == [2047, 2047]
    slope = gradient(kernels, logits, torch.ones(2, device=device)).cpu()
    assert not slope[:, :2047].any()
    torch.testing.assert_close(slope[0, 2047:], torch.tensor([-0.205990, 0.205990]), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy under the interpreter, on purpose here
def test_a_row_without_a_distribution_gives_nan_and_leaves_the_others_alone(kernels: ModuleType, device: str) -> None:
    bad = [[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf]]
    result = kernels.softmax_entropy(torch.tensor([*bad, [0.0, 0.0]], device=device))
    assert result.entropy.isnan().tolist() == [True, True, True, False]
    assert result.confidence.isnan().tolist() == [True, True, True, False]
    assert set(result.argmax.tolist()) <= {0, 1}
    assert result.entropy[3].item() == pytest.approx(math.log(2))


def test_names_the_first_of_equal_classes(kernels: ModuleType, device: str) -> None:
    logits = torch.zeros(1, 2049, device=device)
    assert kernels.softmax_entropy(logits).argmax.item() == 0
    logits[0, [700, 1500]] = 1.0
    assert kernels.softmax_entropy(logits).argmax.item() == 700


def test_an_empty_batch_gives_empty_results_and_an_empty_gradient(kernels: ModuleType, device: str) -> None:
    logits = torch.zeros(0, 10, device=device)
    result = kernels.softmax_entropy(logits)
    assert [part.shape for part in result] == [(0,), (0,), (0,)]
    assert gradient(kernels, logits, torch.ones(0, device=device)).shape == (0, 10)


def test_reads_logits_that_are_not_contiguous(kernels: ModuleType, device: str) -> None:
    logits = torch.randn(41, 14, generator=torch.Generator().manual_seed(3)).to(device)[:, ::2].T
    upstream = torch.ones(1, device=device).expand(7)
    packed = logits.contiguous()
    torch.testing.assert_close(kernels.softmax_entropy(logits).entropy, kernels.softmax_entropy(packed).entropy)
    torch.testing.assert_close(gradient(kernels, logits, upstream), gradient(kernels, packed, upstream))


def test_one_class_is_certain(kernels: ModuleType, device: str) -> None:
    result = kernels.softmax_entropy(torch.tensor([[3.0], [-1e9]], device=device))
    assert result.entropy.tolist() == [0, 0]
    assert result.confidence.tolist() == [1, 1]


@pytest.mark.parametrize("module", [reference, pytorch], ids=["reference", "pytorch"])
def test_gradients_pass_the_numerical_check(module: ModuleType) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: module.softmax_entropy(z).entropy, logits)


def test_only_the_entropy_carries_a_gradient(kernels: ModuleType, device: str) -> None:
    result = kernels.softmax_entropy(torch.zeros(2, 3, device=device, requires_grad=True))
    assert [part.requires_grad for part in result] == [True, False, False]


def test_logits_themselves_are_left_as_they_were(kernels: ModuleType, device: str) -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).to(device)
    before = logits.clone()
    kernels.softmax_entropy(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "floating-point logits, got torch.int64"),
        (torch.zeros(3), ValueError, r"got shape \(3,\)"),
        (torch.zeros(2, 0), ValueError, r"K >= 1, got shape \(2, 0\)"),
    ],
)
def test_refuses_what_are_no_logits(logits: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        public.softmax_entropy(logits)
