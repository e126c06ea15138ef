from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from policies.adaptation.drm import DRM, steered
from policies.interfaces import PolicyError
from tests.policies.models import applied, batch_of, context_for, drive, source_model, stream, weights_of

TWO = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()


def drm(model: nn.Module | None = None, **params: float | str) -> DRM:
    return DRM(DRM.Params.model_validate(params), context_for(model or source_model("mlp_heads")))


@pytest.mark.parametrize(("gamma", "wanted"), [(1.0, 0.772295), (0.0, 0.7), (-1.0, 0.9), (40.0, 0.9)])
def test_surer_heads_count_more(gamma: float, wanted: float) -> None:
    mixed = steered(TWO, gamma).exp()
    torch.testing.assert_close(mixed, torch.tensor([[wanted, 1 - wanted]]), atol=1e-5, rtol=0)


def test_rows_choose_their_heads_one_by_one() -> None:
    rows = torch.cat([TWO, TWO.flip(0)], 1)
    torch.testing.assert_close(steered(rows, -1.0).exp(), torch.tensor([[0.9, 0.1], [0.9, 0.1]]))


def test_a_head_that_is_not_finite_is_done_without() -> None:
    bad = torch.tensor([[[float("nan"), 0.0]], [[0.2, 0.8]]])
    bad[1] = bad[1].log()
    for gamma in (-1.0, 0.0, 1.0):
        torch.testing.assert_close(steered(bad, gamma).exp(), torch.tensor([[0.2, 0.8]]))
    assert steered(torch.full((2, 1, 2), float("nan")), 1.0).exp().tolist() == [[0.5, 0.5]]


def test_without_teaching_nothing_moves_and_nothing_waits() -> None:
    method = drm()
    before = weights_of(method.context.model)
    drive(method, stream("mlp_heads", 3))
    assert method.adapted == frozenset()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(method.context.model).items())


def test_sure_rows_teach_the_heads_and_the_heads_alone() -> None:
    method = drm(confidence=0.0, lr=0.01)
    before = weights_of(method.context.model)
    batch = next(stream("mlp_heads", 1))
    first = method.adapt(batch)
    assert applied(method.update())
    moved = {name for name, tensor in weights_of(method.context.model).items() if not torch.equal(tensor, before[name])}
    assert moved == method.adapted
    assert {name.split(".")[0] for name in moved} == {"heads"}
    again = method.adapt(batch).softmax(1)
    labels = first.argmax(1, keepdim=True)
    assert float(again.gather(1, labels).mean()) > float(first.softmax(1).gather(1, labels).mean())


def test_heads_are_chosen_by_name() -> None:
    assert drm(heads=r"heads\.[01]$").gauges["heads"] == 2
    with pytest.raises(PolicyError, match="this model has 1; name them"):
        drm(heads=r"heads\.0$")
    with pytest.raises(PolicyError, match="over the same features"):
        drm(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4)))
    with pytest.raises(ValidationError, match="not a regular expression"):
        DRM.Params(heads="(")


def test_heads_that_never_run_are_told_of() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(6, 4)
            self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    method = drm(Idle().eval(), heads=r"heads\.")
    with pytest.raises(PolicyError, match="none of its heads ran"):
        method.adapt(batch_of(torch.zeros(1, 6)))


def test_the_surest_rows_of_half_precision_keep_their_answers() -> None:
    sure = torch.tensor([[[30.0, -30.0]], [[1.0, 0.0]]], dtype=torch.float16)
    assert steered(sure, 1.0).exp().argmax(1).tolist() == [0]
    assert steered(sure, 1.0).isfinite().all()
