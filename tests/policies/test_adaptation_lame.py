from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from policies.adaptation.lame import LAME, adjust, affinity
from policies.interfaces import PolicyError
from tests.policies.models import batch_of, context_for, source_model, stream


def adjusted(rows: list[list[float]], weights: Tensor, iterations: int = 100) -> Tensor:
    return adjust(torch.tensor(rows, dtype=torch.float64), weights.double(), 1.0, iterations)[0].exp().float()


def test_agreement_with_itself_and_another_sharpens() -> None:
    got = adjusted([[0.6, 0.4]] * 2, torch.ones(2, 2))
    torch.testing.assert_close(got, torch.tensor([[0.866737, 0.133263]] * 2), atol=1e-6, rtol=0)


def test_agreement_with_the_other_alone_sharpens_less() -> None:
    got = adjusted([[0.6, 0.4]] * 2, 1 - torch.eye(2))
    torch.testing.assert_close(got, torch.tensor([[0.684475, 0.315525]] * 2), atol=1e-6, rtol=0)


def test_no_agreement_leaves_the_prediction() -> None:
    got = adjusted([[0.6, 0.4]] * 2, torch.zeros(2, 2))
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.4]] * 2), atol=1e-6, rtol=0)


def test_one_step_and_the_fixed_point_of_two_rows_that_differ() -> None:
    rows = [[0.9, 0.1], [0.4, 0.6]]
    one = torch.tensor([[0.880505, 0.119495], [0.597374, 0.402626]])
    torch.testing.assert_close(adjusted(rows, 1 - torch.eye(2), 1), one, atol=1e-6, rtol=0)
    end = torch.tensor([[0.917491, 0.082509], [0.605759, 0.394241]])
    torch.testing.assert_close(adjusted(rows, 1 - torch.eye(2)), end, atol=2e-6, rtol=0)


def test_knn_takes_the_nearest_others_and_is_not_symmetric() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3])
    weights = affinity("knn", torch.stack([angles.cos(), angles.sin()], 1), 1)
    assert weights.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]


def test_knn_never_counts_a_row_as_its_own_neighbour() -> None:
    weights = affinity("knn", torch.ones(4, 3), 2)
    assert weights.diagonal().tolist() == [0, 0, 0, 0]
    assert weights.sum(1).tolist() == [2, 2, 2, 2]
    assert affinity("knn", torch.ones(1, 3), 5).tolist() == [[0]]


def test_rbf_is_as_wide_as_the_kth_nearest_row_self_counted() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weights = affinity("rbf", rows, 2)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.60653066], [0.60653066, 1.0]]).double())


def test_linear_is_the_cosine() -> None:
    weights = affinity("linear", torch.tensor([[2.0, 0.0], [3.0, 3.0]]), 5)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.70710678], [0.70710678, 1.0]]).double())


def test_the_features_are_the_input_of_the_classifier() -> None:
    source = source_model("mlp")
    method = LAME(LAME.Params(), context_for(source))
    batch = next(stream("mlp", 1))
    assert isinstance(source, nn.Sequential)
    features, logits = source[:2](batch.inputs).detach(), source(batch.inputs).detach()
    wanted, _, _ = adjust(logits.double().softmax(1), affinity("rbf", features, 5), 1.0, 100)
    torch.testing.assert_close(method.adapt(batch), wanted.float())


class Headless(nn.Module):
    """A model whose classifier is no `nn.Linear`."""

    def features(self, x: Tensor) -> Tensor:
        return x[:, :2]

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_model_without_linear_layers_may_offer_features() -> None:
    method = LAME(LAME.Params(), context_for(Headless()))
    rows = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    wanted, _, _ = adjust(rows.double().softmax(1), torch.ones(2, 2).double(), 1.0, 100)
    torch.testing.assert_close(method.adapt(batch_of(rows)), wanted.float())
    with pytest.raises(PolicyError, match="needs features"):
        LAME(LAME.Params(), context_for(nn.Sequential(nn.ReLU())))
    with pytest.raises(PolicyError, match="no module named 'nowhere'"):
        LAME(LAME.Params(layer="nowhere"), context_for(Headless()))


def test_a_row_without_finite_logits_takes_no_part() -> None:
    one, two = (LAME(LAME.Params(), context_for(Headless())) for _ in range(2))
    rows = torch.tensor([[1.0, 0.0, 2.0, 0.0], [1.0, 0.5, 0.0, 1.0], [0.0, 1.0, 0.0, 3.0]])
    spoilt = torch.cat([rows, torch.ones(1, 4)])
    hook = one.context.model.register_forward_hook(lambda _m, _a, out: out.index_fill(0, torch.tensor([3]), torch.inf))
    got = one.adapt(batch_of(spoilt))
    hook.remove()
    assert torch.equal(got[:3], two.adapt(batch_of(rows)))
    assert torch.equal(got[3], torch.zeros(4))
