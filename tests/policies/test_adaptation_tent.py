from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from policies.adaptation.tent import Tent
from policies.interfaces import Context, PolicyError
from tests.policies.models import applied, batch_of, context_for, drive, source_model, stream, weights_of


class Scores(nn.Module):
    """Logits ``weight * x + bias``: the identity until TENT moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.norm.weight + self.norm.bias


def tent(model: nn.Module, **params: object) -> tuple[Tent, Context]:
    context = context_for(model, classes=2)
    return Tent(Tent.Params.model_validate(params), context), context


def test_one_step_follows_the_gradient_of_the_entropy() -> None:
    method, context = tent(Scores(), optimizer="sgd", lr=1.0)
    drive(method, [batch_of(torch.tensor([[3.0, 1.0]]).log())])
    assert method.gauges["loss"] == pytest.approx(0.562335, abs=1e-6)
    wanted = torch.tensor([0.205990, -0.205990])
    torch.testing.assert_close(context.model.state_dict()["norm.bias"], wanted, atol=1e-6, rtol=0)


def test_a_tie_is_a_stationary_point() -> None:
    method, context = tent(Scores(), optimizer="sgd", lr=1.0)
    drive(method, [batch_of(torch.zeros(3, 2))])
    torch.testing.assert_close(context.model.state_dict()["norm.bias"], torch.zeros(2))


def test_nothing_left_means_no_step_though_there_is_momentum() -> None:
    method, context = tent(Scores(), optimizer="sgd", lr=0.1)
    drive(method, [batch_of(torch.tensor([[1.0, 0.0]]))])
    state = method.state_dict()["optimizer"]
    momentum = {key: held["momentum_buffer"].clone() for key, held in state.items()}
    with torch.no_grad():
        context.model.get_parameter("norm.weight").fill_(10.0)
    before = weights_of(context.model)
    method.adapt(batch_of(torch.tensor([[1e38, -1e38]])))
    outcome = method.update()
    assert outcome is not None
    assert outcome.reason == "empty"
    assert all(torch.equal(t, before[key]) for key, t in context.model.state_dict().items())
    after = method.state_dict()["optimizer"]
    assert all(torch.equal(held["momentum_buffer"], momentum[key]) for key, held in after.items())


def test_rows_without_finite_logits_are_left_out() -> None:
    method, context = tent(Scores(), optimizer="sgd", lr=1.0)
    with torch.no_grad():
        context.model.get_parameter("norm.weight").fill_(10.0)
    logits = drive(method, [batch_of(torch.tensor([[1e38, -1e38], [0.1, 0.0]]))])[0]
    assert torch.equal(logits[0], torch.zeros(2))
    assert method.gauges["rows_rejected"] == 1
    assert all(bool(t.isfinite().all()) for t in context.model.state_dict().values())


def test_the_answer_is_that_of_before_the_step() -> None:
    method, _ = tent(Scores(), lr=0.5)
    inputs = torch.tensor([[1.0, 0.0]])
    assert torch.equal(drive(method, [batch_of(inputs)])[0], inputs)
    assert not torch.equal(method.adapt(batch_of(inputs)), inputs)


def test_a_step_goes_on_after_weights_moved_in_between() -> None:
    method, context = tent(Scores(), optimizer="sgd", lr=1.0)
    method.adapt(batch_of(torch.tensor([[3.0, 1.0]]).log()))
    before = weights_of(context.model)
    with torch.no_grad():
        context.model.get_parameter("norm.bias").add_(torch.tensor([1.0, 1.0]))
    method.learned(before, weights_of(context.model))
    assert applied(method.update())
    wanted = torch.tensor([1.205990, 0.794010])
    torch.testing.assert_close(context.model.state_dict()["norm.bias"], wanted, atol=1e-6, rtol=0)


def test_batch_norm_uses_the_batch_and_dropout_stays_off() -> None:
    source = source_model("conv_bn")
    method = Tent(Tent.Params(lr=0.0), context_for(source))
    batch = next(stream("conv_bn", 1))
    source.train()
    source.get_submodule("8").eval()
    with torch.no_grad():
        wanted = source(batch.inputs)
    torch.testing.assert_close(method.adapt(batch), wanted)


def test_layers_are_chosen_by_type_and_name() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.Linear(2, 2)).eval()
    chosen = tent(model)[0]
    assert chosen.adapted == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert chosen.gauges["adapted_values"] == 12
    assert tent(model, layers=["layer"])[0].adapted == {"1.weight", "1.bias"}
    assert tent(model, include="^[01]$", exclude="0")[0].adapted == {"1.weight", "1.bias"}
    with pytest.raises(PolicyError, match="match include and exclude"):
        tent(model, include="nowhere")


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(ValidationError, match="not a regular expression"):
        Tent.Params(include="(")


def test_a_model_without_norm_layers_is_refused() -> None:
    with pytest.raises(PolicyError, match="no affine parameters"):
        tent(nn.Sequential(nn.Linear(2, 2)))
