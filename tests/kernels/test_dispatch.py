import logging
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import kernels
from kernels import dispatch, pytorch
from tests.kernels.conftest import NEEDS_TRITON


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    yield
    dispatch._off.clear()
    dispatch._chosen.clear()


def wrong_lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weight: float) -> None:
    """Wrong in the last element alone, and only beyond one vector register."""
    pytorch_lerp_(targets, sources, weight)
    for target in targets:
        if target.numel() > 1000:
            target.view(-1)[-1] += 1


pytorch_lerp_ = pytorch.lerp_


def test_a_sound_installation_passes_the_check_and_falls_back_nowhere() -> None:
    assert kernels.self_check("cpu") == ()
    assert kernels.fallbacks() == {}
    assert [kernels.backend(op) for op in kernels.OPS] == ["pytorch", "pytorch"]


def test_cuda_tensors_go_to_triton_first() -> None:
    assert [kernels.backend(op, torch.device("cuda", 0)) for op in kernels.OPS] == ["triton", "triton"]


def test_a_wrong_kernel_is_switched_off_and_its_answers_are_right_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pytorch, "lerp_", wrong_lerp_)
    with caplog.at_level(logging.WARNING):
        (found,) = kernels.self_check("cpu")
        kernels.self_check("cpu")
    assert (found.op, found.backend) == ("lerp_", "pytorch")
    assert "1271 elements" in found.reason
    assert kernels.fallbacks() == {"lerp_": found.reason}
    assert (kernels.backend("lerp_"), kernels.backend("softmax_entropy")) == ("reference", "pytorch")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    target = torch.zeros(1271)
    kernels.lerp_([target], [torch.ones(1271)], 0.5)
    assert bool((target == 0.5).all())


def test_a_kernel_that_raises_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(pytorch, "softmax_entropy", broken)
    (found,) = kernels.self_check("cpu")
    assert found == ("softmax_entropy", "pytorch", "RuntimeError: no kernel image is available")
    assert kernels.softmax_entropy(torch.zeros(1, 4)).argmax.item() == 0


def test_a_kernel_with_a_wrong_gradient_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = pytorch.softmax_entropy

    def doubled(logits: Tensor) -> kernels.SoftmaxEntropy:
        result = sound(logits)
        return result._replace(entropy=2 * result.entropy - result.entropy.detach())

    monkeypatch.setattr(pytorch, "softmax_entropy", doubled)
    (found,) = kernels.self_check("cpu")
    assert found.reason.startswith("gradient of torch.float32 logits (7, 10)")


def test_a_kernel_that_agrees_again_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pytorch, "lerp_", wrong_lerp_)
        kernels.self_check("cpu")
    assert kernels.self_check("cpu") == ()
    assert (kernels.fallbacks(), kernels.backend("lerp_")) == ({}, "pytorch")


def test_the_check_leaves_the_random_state_and_gradient_mode_alone() -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        assert kernels.self_check("cpu") == ()
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@NEEDS_TRITON
def test_the_triton_kernels_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setitem(dispatch._FAST_FIRST, device, ("triton", "reference"))
    assert kernels.self_check(device) == ()
    assert [kernels.backend(op, device) for op in kernels.OPS] == ["triton", "triton"]


@NEEDS_TRITON
def test_a_wrong_triton_kernel_gives_way_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setitem(dispatch._FAST_FIRST, device, ("triton", "pytorch", "reference"))
    monkeypatch.setattr("kernels.triton_ops.lerp_", wrong_lerp_)
    (found,) = kernels.self_check(device)
    assert (found.op, found.backend, kernels.backend("lerp_", device)) == ("lerp_", "triton", "pytorch")


def test_without_triton_pytorch_takes_over_visibly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(dispatch._FAST_FIRST, "cpu", ("triton", "pytorch", "reference"))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    kernels.lerp_([torch.zeros(1)], [torch.ones(1)], 0.5)
    assert kernels.fallbacks() == {"lerp_": "Triton is not installed"}
    assert kernels.backend("lerp_") == "pytorch"
    assert "Triton is not installed" in caplog.text
