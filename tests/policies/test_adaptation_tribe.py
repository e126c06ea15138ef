from __future__ import annotations

import torch
from torch import nn

from policies.adaptation.tribe import TRIBE
from policies.balanced import BalancedBatchNorm, move, overall
from tests.policies.models import batch_of, context_for, drive, source_model, stream, weights_of
from tests.policies.scores import logits_of, on_scores


def start(classes: int = 2, channels: int = 1) -> torch.Tensor:
    """Means of 0 and variances of 1."""
    return torch.stack([torch.zeros(classes, channels), torch.ones(classes, channels)])


def test_a_class_moves_by_its_share_of_each_row() -> None:
    local = start()
    move(local, torch.tensor([[2.0], [2.0]]), torch.tensor([0, 0]), 0.5)
    torch.testing.assert_close(local[:, :, 0], torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    mean, var = overall(local)
    assert (mean.item(), var.item()) == (1.0, 2.5)


def test_a_rare_class_counts_as_much_as_a_frequent_one() -> None:
    local = start()
    rows = torch.tensor([[2.0]] * 9 + [[-2.0]])
    move(local, rows, torch.tensor([0] * 9 + [1]), 1.0)
    mean, var = overall(local)
    assert (mean.item(), var.item()) == (0.0, 8.0)
    assert rows.mean().item() == 1.600000023841858


def test_one_row_moves_one_class_by_eta() -> None:
    local = start(3)
    move(local, torch.tensor([[4.0]]), torch.tensor([1]), 0.25)
    torch.testing.assert_close(local[0, :, 0], torch.tensor([0.0, 1.0, 0.0]))
    # (1 - .25) * 1 + .25 * 16 - 1
    torch.testing.assert_close(local[1, :, 0], torch.tensor([1.0, 3.75, 1.0]))


def test_positions_count_into_the_variance_of_their_row() -> None:
    local = start(1)
    move(local, torch.tensor([[[1.0, 3.0]]]), torch.tensor([0]), 1.0)
    torch.testing.assert_close(local[:, 0, 0], torch.tensor([2.0, 1.0]))


def test_no_gradient_flows_through_the_statistics() -> None:
    layer = BalancedBatchNorm(nn.BatchNorm1d(1, eps=0.0).eval(), share=0.0, unbiased=False, store=False)
    layer.blending, layer.eta, layer.labels, layer.local = True, 1.0, torch.tensor([0, 1]), start()
    rows = torch.tensor([[2.0], [-2.0]], requires_grad=True)
    out = layer(rows)
    torch.testing.assert_close(out, rows / 8**0.5)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), rows)[0], torch.full((2, 1), 1 / 8**0.5))


def test_the_stored_statistics_are_those_of_all_classes() -> None:
    method = TRIBE(TRIBE.Params(margin=1.0), context_for(source_model("conv_bn")))
    drive(method, stream("conv_bn", 3))
    mean, var = overall(method.state_dict()["local"]["live"][0])
    torch.testing.assert_close(weights_of(method.context.model)["1.running_mean"], mean)
    torch.testing.assert_close(weights_of(method.context.model)["1.running_var"], var)


def test_sure_rows_teach_the_student_their_label() -> None:
    method = on_scores("tribe", lr=0.1, margin=0.5, anchor=0.0, augmentation="none")
    row = logits_of([0.95, 0.05], [0.5, 0.5])
    drive(method, [batch_of(row)])
    assert method.gauges["kept_ratio"] == 0.5
    torch.testing.assert_close(torch.tensor(method.gauges["loss"]), -torch.tensor(0.95).log())
    bias = weights_of(method.context.model)["norm.bias"]
    assert bias[0] > 0 > bias[1]


def test_the_anchor_holds_the_logits_back() -> None:
    method = on_scores("tribe", lr=0.0, margin=0.9, anchor=0.5, augmentation="none")
    with torch.no_grad():
        method.context.model.get_parameter("norm.bias").copy_(torch.tensor([0.2, 0.0]))
    row = logits_of([0.95, 0.05])
    drive(method, [batch_of(row)])
    moved = (row + torch.tensor([0.2, 0.0])).log_softmax(1)
    torch.testing.assert_close(torch.tensor(method.gauges["loss"]), -moved[0, 0] + 0.5 * 0.2**2 / 2)
