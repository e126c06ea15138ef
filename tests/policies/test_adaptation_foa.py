from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from policies.adaptation.foa import FOA
from policies.interfaces import PolicyError
from tests.policies.models import batch_of, context_for, drive


def identity(mean: Tensor | None = None) -> nn.Module:
    """A classifier that answers with its features."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    nn.init.eye_(model.get_parameter("0.weight"))
    if mean is not None:
        model.register_buffer("feature_mean", mean)
    return model


def foa(mean: Tensor | None = None, **params: float) -> FOA:
    return FOA(FOA.Params.model_validate(params), context_for(identity(mean), classes=2))


def test_features_are_moved_by_what_the_running_mean_lacks() -> None:
    method = foa(torch.zeros(2), window=1)
    first, second = drive(method, [batch_of(torch.tensor([[1.0, -2.0]])), batch_of(torch.tensor([[3.0, 3.0]]))])
    assert first.tolist() == [[1.0, -2.0]], "nothing is known before the first batch"
    torch.testing.assert_close(second, torch.tensor([[2.0, 5.0]]))


def test_the_running_mean_takes_a_tenth_of_a_window() -> None:
    method = foa(torch.zeros(2), window=2)
    drive(method, [batch_of(torch.tensor([[1.0, 0.0], [3.0, 0.0]])), batch_of(torch.tensor([[4.0, 2.0], [8.0, 2.0]]))])
    assert method.state_dict()["running"].tolist() == pytest.approx([0.9 * 2 + 0.1 * 6, 0.1 * 2])


def test_batches_of_one_move_the_mean_as_fast_as_whole_windows() -> None:
    rows = torch.cat([torch.zeros(4, 2), torch.ones(4, 2)])
    whole, single = foa(torch.zeros(2), window=4), foa(torch.zeros(2), window=4)
    drive(whole, [batch_of(part) for part in rows.split(4)])
    drive(single, [batch_of(part) for part in rows.split(1)])
    torch.testing.assert_close(single.state_dict()["running"], whole.state_dict()["running"])


def test_without_a_mean_in_the_model_the_first_rows_stand_for_the_source() -> None:
    method = foa(window=2, reference_rows=4)
    answers = drive(method, [batch_of(torch.full((2, 2), value)) for value in (1.0, 2.0, 5.0, 5.0)])
    assert [float(answer[0, 0]) for answer in answers[:2]] == [1.0, 2.0]
    running = [1.1, 0.9 * 1.1 + 0.1 * 5]
    assert [float(answer[0, 0]) for answer in answers[2:]] == pytest.approx([5 + 1.5 - mean for mean in running])
    assert method.gauges["reference_rows"] == 4


def test_rows_that_overflow_or_are_far_longer_than_others_do_not_count() -> None:
    method = foa(window=4, reference_rows=4)
    rows = torch.ones(4, 2)
    rows[1] = 1e6
    drive(method, [batch_of(rows)])
    assert method.state_dict()["rows"] == 3
    assert method.state_dict()["source"].tolist() == [1.0, 1.0]
    with torch.no_grad():
        method.context.model.get_parameter("0.weight").mul_(4)
    drive(method, [batch_of(torch.tensor([[3e38, 3e38]]))])
    assert method.state_dict()["rows"] == 3


def test_a_mean_of_another_size_is_refused() -> None:
    with pytest.raises(PolicyError, match="feature_mean is \\(3,\\) where the classifier takes 2 features"):
        foa(torch.zeros(3))
