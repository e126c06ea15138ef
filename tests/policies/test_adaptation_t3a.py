from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from policies.adaptation.adanpc import AdaNPC
from policies.adaptation.t3a import T3A, surest
from policies.interfaces import Adaptation, PolicyError
from policies.registry import find
from tests.policies.models import batch_of, context_for, drive


def identity() -> nn.Module:
    """A linear classifier whose templates are the axes."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).eval()
    nn.init.eye_(model.get_parameter("0.weight"))
    return model


def t3a(**params: int) -> T3A:
    return T3A(T3A.Params.model_validate(params), context_for(identity(), classes=2))


def adanpc(**params: float) -> AdaNPC:
    return AdaNPC(AdaNPC.Params.model_validate(params), context_for(identity(), classes=2))


def test_a_row_moves_the_template_of_its_class() -> None:
    method = t3a(supports=100)
    scores = drive(method, [batch_of(torch.tensor([[2.0, 1.0]]))])[0]
    torch.testing.assert_close(scores, torch.tensor([[2.176251, 1.0]]), atol=1e-6, rtol=0)


def test_the_surest_of_each_class_stay() -> None:
    labels = torch.tensor([1, 0, 1, 1, 0])
    entropies = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.05])
    assert surest(labels, entropies, 1, 3).tolist() == [2, 4]
    assert surest(labels, entropies, 2, 3).tolist() == [1, 2, 3, 4]
    assert surest(labels[:0], entropies[:0], 2, 3).tolist() == []


def test_sure_but_wrong_rows_cannot_drive_a_template_out() -> None:
    method = t3a(supports=1)
    drive(method, [batch_of(torch.tensor([[90.0, 80.0]] * 4))])
    assert method.adapt(batch_of(torch.tensor([[3.0, 1.0]]))).argmax().item() == 0


def test_rows_without_direction_join_nothing() -> None:
    method = t3a()
    drive(method, [batch_of(torch.zeros(2, 2))])
    assert method.gauges["supports"] == 0


@pytest.mark.parametrize("name", ["t3a", "adanpc"])
def test_a_classifier_that_is_not_linear_is_refused(name: str) -> None:
    for model in (nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Conv1d(1, 1, 1))):
        method: type[Adaptation] = find("adaptation", name)
        context = context_for(model.eval(), classes=2)
        with pytest.raises(PolicyError, match="choose"):
            method(method.Params(), context)
        assert not any(module._forward_pre_hooks for module in context.model.modules())


def test_neighbours_vote_by_their_likeness() -> None:
    method = adanpc(neighbours=2, temperature=0.5, confidence=2.0)
    row = torch.tensor([[0.6, 0.8]])
    votes = drive(method, [batch_of(row)])[0].exp()
    wanted = torch.tensor([[math.exp(1.2), math.exp(1.6)]])
    torch.testing.assert_close(votes, wanted / wanted.sum())
    assert method.gauges["memory_rows"] == 0


def test_sure_rows_join_and_vote() -> None:
    method = adanpc(neighbours=1, confidence=0.54)
    drive(method, [batch_of(torch.tensor([[0.8, 0.6], [0.75, 0.65]]))])
    assert method.gauges["memory_rows"] == 1
    votes = drive(method, [batch_of(torch.tensor([[0.69, 0.72]]))])[0]
    assert votes.argmax().item() == 0, "nearer to the remembered row than to the template of class 1"


def test_the_oldest_rows_give_way() -> None:
    method = adanpc(confidence=0.0, capacity=3)
    for angle in range(5):
        drive(method, [batch_of(torch.tensor([[math.cos(angle / 4), math.sin(angle / 4)]]))])
    angles = sorted(4 * math.atan2(y, x) for x, y in method.state_dict()["memory"].tolist())
    assert angles == pytest.approx([2, 3, 4])
    smaller = adanpc(confidence=0.0, capacity=2)
    smaller.load_state_dict(method.state_dict())
    angles = sorted(4 * math.atan2(y, x) for x, y in smaller.state_dict()["memory"].tolist())
    assert angles == pytest.approx([3, 4])
