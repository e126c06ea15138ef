from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from policies.adaptation.nhl import NHL, hebbian
from policies.interfaces import PolicyError
from tests.policies.models import applied, build, context_for, drive, source_model, stream, weights_of


def point() -> nn.Conv2d:
    """A convolution over single pixels whose weight is the identity."""
    conv = nn.Conv2d(2, 2, 1, bias=False)
    nn.init.dirac_(conv.weight)
    return conv


def nhl(model: str = "conv_bn", **params: Any) -> NHL:
    method: NHL = build("adaptation", "nhl", params, source_model(model))
    return method


@pytest.mark.parametrize(("anti", "sign"), [(False, 1), (True, -1)])
def test_the_local_rule_of_a_worked_patch(anti: bool, sign: int) -> None:
    conv = point()
    x = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    change = hebbian(conv, conv(x), 1.0, anti=anti)
    wanted = torch.tensor([[0.0, 0.0], [sign * 0.268941, 0.0]])
    torch.testing.assert_close(change.view(2, 2), wanted, atol=1e-6, rtol=0)


def test_the_local_rule_sums_over_rows_and_positions_and_ignores_the_bias() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect")
    x = torch.randn(2, 3, 6, 6)
    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    patches = nn.functional.unfold(padded, 3, stride=2).transpose(1, 2).reshape(-1, 27)
    flat = conv.weight.detach().flatten(1)
    u = patches @ flat.T
    y = (u / 0.5).softmax(1)
    wanted = torch.stack([(y[:, c, None] * (patches - u[:, c, None] * flat[c])).sum(0) for c in range(4)])
    torch.testing.assert_close(hebbian(conv, conv(x), 0.5, anti=False).flatten(1), wanted, atol=1e-4, rtol=1e-4)


def test_only_the_first_convolution_and_its_modulator_move() -> None:
    method = nhl(lr=0.01)
    before = weights_of(method.context.model)
    drive(method, stream("conv_bn", 1))
    after = weights_of(method.context.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == method.adapted == {"0.weight", "1.weight", "1.bias"}
    largest = float((after["0.weight"] - before["0.weight"]).abs().max())
    assert largest == pytest.approx(method.params.eta, rel=1e-2)


def test_a_convolution_without_normalisation_behind_it_is_modulated_by_its_bias() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)).eval()
    method = NHL(NHL.Params(), context_for(model))
    assert method.adapted == {"0.weight", "0.bias"}
    before = weights_of(method.context.model)
    drive(method, stream("conv_bn", 2))
    assert not torch.equal(weights_of(method.context.model)["0.bias"], before["0.bias"])


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(6, 4)), "needs a convolution"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(144, 4)), "nothing can modulate"),
    ],
)
def test_a_model_that_lacks_a_part_is_refused(model: nn.Module, why: str) -> None:
    with pytest.raises(PolicyError, match=f"{why}.*choose"):
        NHL(NHL.Params(), context_for(model.eval()))


def test_a_convolution_too_far_from_the_source_returns_to_it() -> None:
    method = nhl(eta=1.0, lr=0.0)
    source = weights_of(method.context.source)["0.weight"]
    drive(method, stream("conv_bn", 1))
    assert method.gauges["distance"] > 0.05
    assert method.gauges["returns"] == 1
    assert torch.equal(weights_of(method.context.model)["0.weight"], source)


def test_no_local_step_without_the_entropy_step() -> None:
    method = nhl()
    before = weights_of(method.context.model)
    batch = next(stream("conv_bn", 1))
    with torch.no_grad():
        method.context.model.get_parameter("9.bias").fill_(float("nan"))
    method.adapt(batch)
    assert not applied(method.update())
    assert torch.equal(weights_of(method.context.model)["0.weight"], before["0.weight"])


def test_labelled_learning_moves_where_it_returns_to() -> None:
    method = nhl()
    shape = method.context.model.get_parameter("0.weight").shape
    method.learned({"0.weight": torch.zeros(shape)}, {"0.weight": torch.ones(shape)})
    source = weights_of(method.context.source)["0.weight"]
    torch.testing.assert_close(method.state_dict()["anchor"]["0.weight"], source + 1)
