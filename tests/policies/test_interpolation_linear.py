from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.interfaces import AuditWindow, Proposal, Weights
from policies.interpolation.linear import Linear, measure, mix
from tests.policies.builders import context_of, linear_model, same, weights_of, window_of


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight


def batchnorm_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()


def moved(weights: Weights, by: float = 1.0) -> Weights:
    return {name: t + by if t.is_floating_point() else t + 3 for name, t in weights.items()}


def audit(rows: int = 100, seed: int = 0) -> AuditWindow:
    inputs = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return window_of(torch.zeros(rows).long(), torch.zeros(rows).long(), inputs=inputs)


def propose(model: nn.Module, release: Weights, live: Weights, rows: int = 100, **params: Any) -> list[Proposal]:
    method = Linear(Linear.Params.model_validate(params), context_of(model))
    return list(method.propose(release, live, audit(rows)))


def test_alpha_weighs_the_old_weights_as_in_the_reference() -> None:
    mixed = mix({"w": torch.tensor([2.0])}, {"w": torch.tensor([4.0])}, 0.25)
    assert mixed["w"].tolist() == [3.5]


def test_the_grid_goes_from_the_live_weights_to_the_release_and_both_ends_are_bit_for_bit() -> None:
    model = batchnorm_model()
    release = weights_of(model)
    live = {name: t + torch.randn_like(t) if t.is_floating_point() else t + 3 for name, t in release.items()}
    proposals = propose(model, release, live)
    assert [round(p.alpha, 9) for p in proposals] == [round(i / 10, 9) for i in range(11)]
    assert same(proposals[0].weights, live)
    assert same(proposals[-1].weights, release)


def test_neither_side_is_changed_nor_shared_with_a_candidate() -> None:
    model = batchnorm_model()
    release, live = weights_of(model), moved(weights_of(model))
    before = copy.deepcopy((release, live))
    for proposal in propose(model, release, live):
        for tensor in proposal.weights.values():
            tensor.zero_()
    assert same(before[0], release)
    assert same(before[1], live)


def test_counters_are_taken_from_the_live_weights_and_never_mixed() -> None:
    model = batchnorm_model()
    release = weights_of(model)
    middle = propose(model, release, moved(release), alphas=[0.5])[0].weights
    assert middle["1.num_batches_tracked"] == release["1.num_batches_tracked"] + 3
    assert middle["1.num_batches_tracked"].dtype == torch.int64


def test_tied_tensors_are_mixed_once_and_stay_tied() -> None:
    model, other = Tied(), Tied()
    mixed = mix(model.state_dict(), other.state_dict(), 0.3)
    assert mixed["encode.weight"].data_ptr() == mixed["decode.weight"].data_ptr()
    expected = 0.3 * model.encode.weight + 0.7 * other.encode.weight
    assert torch.allclose(mixed["encode.weight"], expected.detach(), atol=1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    old, new = torch.tensor([1.0, 3.0]).bfloat16(), torch.tensor([1.0078125, 2.0]).bfloat16()
    mixed = mix({"w": old}, {"w": new}, 0.3)["w"]
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, torch.lerp(new.float(), old.float(), 0.3).bfloat16())


def test_statistics_between_the_ends_are_those_of_the_mixed_weights_on_the_audit_inputs() -> None:
    model = batchnorm_model()
    release = weights_of(model)
    live = moved(release, 0.5)
    weights = propose(model, release, live, alphas=[0.5])[0].weights
    hidden = audit().inputs @ weights["0.weight"].T + weights["0.bias"]
    assert torch.allclose(weights["1.running_mean"], hidden.mean(0), atol=1e-5)
    assert torch.allclose(weights["1.running_var"], hidden.var(0), rtol=1e-4)
    kept = propose(model, release, live, alphas=[0.5], batchnorm="interpolate")[0].weights
    assert torch.allclose(kept["1.running_var"], release["1.running_var"] + 0.25)


def test_mixed_activations_have_the_variance_of_the_mixture_and_not_the_mixed_variance() -> None:
    layer = nn.BatchNorm1d(1).eval()
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 10_000, 1, generator=generator)
    measure(layer, 0.5 * old + 0.5 * new)
    assert float(layer.running_var) == pytest.approx(0.5, abs=0.02)  # type: ignore[arg-type]
    assert (layer.training, layer.momentum) == (False, 0.1)


def test_measuring_leaves_dropout_off_and_copes_with_any_number_of_rows() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3)).eval()
    inputs = torch.randn(257, 3, generator=torch.Generator().manual_seed(1))
    measure(model, inputs)
    assert torch.allclose(model.get_buffer("1.running_mean"), inputs.mean(0), atol=2e-3)
    assert not any(module.training for module in model.modules())


def test_a_window_too_small_interpolates_statistics_like_weights() -> None:
    model = batchnorm_model()
    release = weights_of(model)
    weights = propose(model, release, moved(release), rows=63, alphas=[0.5])[0].weights
    assert torch.allclose(weights["1.running_mean"], release["1.running_mean"] + 0.5)


def test_a_model_without_batchnorm_is_mixed_alone() -> None:
    model = linear_model()
    release = weights_of(model)
    weights = propose(model, release, moved(release), alphas=[0.25])[0].weights
    assert all(torch.allclose(tensor, release[name] + 0.75) for name, tensor in weights.items())


def test_the_models_of_the_context_are_left_as_they_are() -> None:
    model = batchnorm_model()
    context = context_of(model)
    before = copy.deepcopy((weights_of(model), weights_of(context.source)))
    list(Linear(Linear.Params(), context).propose(weights_of(model), moved(weights_of(model)), audit()))
    assert same(before[0], weights_of(model))
    assert same(before[1], weights_of(context.source))
    assert not any(module.training for module in context.source.modules())


@pytest.mark.parametrize("alphas", [[], [0.5, 0.2], [0.1, 0.1], [-0.1], [0.0, 1.1]])
def test_a_grid_that_is_no_increasing_set_of_shares_is_refused(alphas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"alphas|at least 1 item"):
        Linear.Params.model_validate({"alphas": alphas})


def test_the_same_inputs_give_the_same_candidates() -> None:
    model = batchnorm_model()
    release = weights_of(model)
    left, right = (propose(model, release, moved(release)) for _ in range(2))
    assert all(same(a.weights, b.weights) for a, b in zip(left, right, strict=True))


def test_values_do_not_depend_on_where_tensors_share_memory() -> None:
    base: Tensor = torch.arange(4.0)
    old = {"a": base[:2], "b": base[2:]}
    new = {"a": torch.zeros(2), "b": torch.ones(2)}
    mixed = mix(old, new, 0.5)
    assert mixed["a"].tolist() == [0.0, 0.5]
    assert mixed["b"].tolist() == [1.5, 2.0]
