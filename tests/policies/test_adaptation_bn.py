from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.adaptation.bn import BatchNormAdaptation
from policies.interfaces import PolicyError
from policies.norm import BlendedBatchNorm, Blending
from tests.policies.models import batch_of, context_for, drive


def one_channel(mean: float = 0.0, var: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval()
    layer = model[0]
    assert isinstance(layer, nn.BatchNorm2d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(var)
    return model


def answers(rows: list[float], params: dict[str, Any], model: nn.Module | None = None) -> tuple[Tensor, nn.Module]:
    context = context_for(model or one_channel(), classes=1)
    method = BatchNormAdaptation(BatchNormAdaptation.Params(**params), context)
    logits = drive(method, [batch_of(torch.tensor(rows).view(-1, 1, 1, 1))])[0]
    return logits.flatten(), context.model


def test_alpha_one_is_a_forward_in_training_mode() -> None:
    logits, _ = answers([1.0, 3.0], {"alpha": 1.0})
    wanted = one_channel().train()(torch.tensor([1.0, 3.0]).view(-1, 1, 1, 1)).flatten()
    torch.testing.assert_close(logits, wanted.detach())
    assert logits[1] == pytest.approx(0.999995, abs=1e-6)


def test_alpha_zero_is_the_source_model() -> None:
    logits, _ = answers([1.0, 3.0], {"alpha": 0.0})
    torch.testing.assert_close(logits, torch.tensor([1.0, 3.0]), atol=2e-5, rtol=0)


def test_a_prior_of_two_rows_blends_two_rows_by_half() -> None:
    logits, _ = answers([1.0, 3.0], {"mode": "prior", "prior_strength": 2})
    torch.testing.assert_close(logits, torch.tensor([0.0, 1.63299]), atol=1e-5, rtol=0)


def test_ema_keeps_the_blend_with_the_unbiased_variance() -> None:
    logits, model = answers([1.0, 3.0], {"mode": "ema", "momentum": 0.5})
    torch.testing.assert_close(logits, torch.tensor([0.0, 1.63299]), atol=1e-5, rtol=0)
    state = model.state_dict()
    assert float(state["0.running_mean"]) == 1.0
    assert float(state["0.running_var"]) == 1.5
    torch_layer = one_channel().train()
    layer = torch_layer[0]  # type: ignore[index]
    layer.momentum = 0.5
    torch_layer(torch.tensor([1.0, 3.0]).view(-1, 1, 1, 1))
    assert torch.equal(state["0.running_var"], layer.running_var)


def test_alpha_keeps_nothing() -> None:
    _, model = answers([1.0, 3.0], {"alpha": 0.5})
    assert float(model.state_dict()["0.running_mean"]) == 0.0


def test_a_single_value_uses_the_stored_statistics() -> None:
    logits, model = answers([5.0], {"mode": "ema", "momentum": 1.0})
    torch.testing.assert_close(logits, torch.tensor([5.0]), atol=1e-4, rtol=0)
    assert float(model.state_dict()["0.running_mean"]) == 0.0


def test_a_single_image_of_several_pixels_has_statistics() -> None:
    context = context_for(one_channel(), classes=2)
    method = BatchNormAdaptation(BatchNormAdaptation.Params(alpha=1.0), context)
    logits = method.adapt(batch_of(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)))
    torch.testing.assert_close(logits, torch.tensor([[-1.0, 1.0]]), atol=1e-5, rtol=0)


def test_statistics_that_overflow_are_put_back() -> None:
    context = context_for(one_channel(), classes=1)
    method = BatchNormAdaptation(BatchNormAdaptation.Params(mode="ema"), context)
    drive(method, [batch_of(torch.tensor([1e30, -1e30]).view(-1, 1, 1, 1))])
    assert float(context.model.state_dict()["0.running_var"]) == 1.0
    assert method.gauges["batches_rejected"] == 1


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(PolicyError, match="no BatchNorm layer"):
        BatchNormAdaptation(BatchNormAdaptation.Params(), context_for(nn.Sequential(nn.Linear(2, 2)), classes=2))


def test_a_layer_used_twice_is_replaced_everywhere_and_put_back() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(norm, nn.Linear(3, 3), norm).eval()
    blending = Blending(model, share=0.5, unbiased=False, store=False)
    assert len(blending) == 1
    assert isinstance(model[0], BlendedBatchNorm)
    assert [id(layer) for layer in model[::2]] == [id(blending.layers[0])] * 2
    blending.undo()
    assert [id(layer) for layer in model[::2]] == [id(norm)] * 2


def test_weights_given_to_the_model_survive_detach() -> None:
    context = context_for(one_channel(), classes=1)
    method = BatchNormAdaptation(BatchNormAdaptation.Params(), context)
    context.model.load_state_dict({key: t + 2 for key, t in context.model.state_dict().items()})
    method.detach()
    assert float(context.model.state_dict()["0.weight"]) == 3.0


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 2), (2, 3, 4, 2)])
def test_gradients_through_the_blend_are_exact(unbiased: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3) if len(shape) == 4 else nn.BatchNorm1d(3)).double().eval()
    blending = Blending(model, share=0.3, unbiased=unbiased, store=False)
    layer = blending.layers[0]
    layer.running_mean.copy_(torch.randn(3))
    layer.running_var.copy_(torch.rand(3) + 0.5)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.func.functional_call(model, {"0.weight": weight, "0.bias": bias}, (x,))
        assert isinstance(out, Tensor)
        return out

    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    with blending.active():
        assert torch.autograd.gradcheck(run, (inputs, weight, bias))


def test_the_blend_equals_plain_tensor_operations_in_both_layouts() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5) * 3 + 1
    for layout in (torch.contiguous_format, torch.channels_last):
        model = nn.Sequential(nn.BatchNorm2d(3)).eval()
        blending = Blending(model, share=0.05, unbiased=False, store=True)
        inputs = x.contiguous(memory_format=layout).requires_grad_()
        mean, var = 0.05 * inputs.mean((0, 2, 3)), 0.95 + 0.05 * inputs.var((0, 2, 3), correction=0)
        wanted = (inputs - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
        with blending.active():
            got = model(inputs)
        torch.testing.assert_close(got, wanted)
        upstream = torch.randn_like(got)
        one, two = (torch.autograd.grad(out, inputs, upstream, retain_graph=True)[0] for out in (got, wanted))
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(blending.layers[0].running_var, var.detach())
