from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policies.reweighting.loss import Loss
from tests.policies.builders import context_of, labelled, linear_model


def method(**params: object) -> Loss:
    return Loss(Loss.Params.model_validate({"warmup": 0, "min_batch": 0} | params), context_of(linear_model()))


def weigh(loss: Loss, losses: Tensor) -> Tensor:
    return loss.weigh(labelled(torch.zeros(len(losses), 3), [0] * len(losses)), losses)


@pytest.mark.parametrize(
    ("strategy", "temperature", "shares"),
    [
        ("linupper", 0.4, (0.039424, 0.480288, 0.480288)),
        ("quadratic", 0.4, (0.070509, 0.858981, 0.070509)),
        ("extremes", 0.4, (0.480288, 0.039424, 0.480288)),
        ("linupper", 1.0, (0.155362, 0.422319, 0.422319)),
        ("linupper", 100.0, (0.331115, 0.334443, 0.334443)),
    ],
)
def test_shares_of_three_losses_equal_the_reference(
    strategy: str, temperature: float, shares: tuple[float, float, float]
) -> None:
    weights = weigh(method(strategy=strategy, temperature=temperature), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.allclose(weights / 3, torch.tensor(shares), atol=1e-6)


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
def test_weights_ignore_shift_and_scale_of_the_losses(strategy: str) -> None:
    losses = torch.tensor([0.1, 0.5, 0.7, 2.0])
    assert torch.allclose(
        weigh(method(strategy=strategy), losses), weigh(method(strategy=strategy), 10 * losses + 3), atol=1e-5
    )


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
@pytest.mark.parametrize("small", [0, 32])
def test_equal_losses_and_single_rows_weigh_exactly_one(strategy: str, small: int) -> None:
    for rows in (1, 7, 49):
        assert torch.equal(
            weigh(method(strategy=strategy, min_batch=small), torch.full((rows,), 0.4)), torch.ones(rows)
        )


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "extremes"])
@pytest.mark.parametrize("small", [0, 32])
def test_extreme_losses_give_finite_weights_of_mean_one(strategy: str, small: int) -> None:
    weights = weigh(method(strategy=strategy, min_batch=small, temperature=1e-3), torch.tensor([0.0, 1e-12, 1.0, 1e12]))
    assert bool((weights.isfinite() & (weights >= 0)).all())
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)


def test_harder_rows_never_weigh_less_under_linupper() -> None:
    weights = weigh(method(min_batch=32), torch.linspace(0, 5, 20))
    assert bool((weights.diff() >= 0).all())


def test_the_warm_up_is_all_but_uniform() -> None:
    loss, losses = method(warmup=1), torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(weigh(loss, losses) / 3, torch.tensor([0.331115, 0.334443, 0.334443]), atol=1e-6)
    assert torch.allclose(weigh(loss, losses) / 3, torch.tensor([0.039424, 0.480288, 0.480288]), atol=1e-6)


def test_a_small_batch_compares_with_the_losses_before_it() -> None:
    loss = method(min_batch=32, strategy="linupper")
    weigh(loss, torch.linspace(0, 10, 200))
    weights = weigh(loss, torch.tensor([9.0, 9.5]))
    assert torch.equal(weights, torch.ones(2))
    assert float(weigh(method(min_batch=0), torch.tensor([9.0, 9.5]))[0]) < 0.2


def test_the_window_forgets_the_oldest_losses() -> None:
    loss = method(min_batch=32, window=16)
    weigh(loss, torch.full((64,), 1e6))
    weigh(loss, torch.linspace(0, 1, 16))
    assert float(loss.state_dict()["recent"].max()) == 1.0


@pytest.mark.parametrize("seen", [0, 5, 40])
def test_a_restored_method_goes_on_bit_for_bit(seen: int) -> None:
    one, two = method(min_batch=32, window=16, warmup=1), method(min_batch=32, window=16, warmup=1)
    if seen:
        weigh(one, torch.linspace(0, 3, seen))
    two.load_state_dict(one.state_dict())
    for losses in (torch.tensor([0.5, 1.5, 2.5]), torch.tensor([4.0, 0.1])):
        assert torch.equal(weigh(one, losses), weigh(two, losses))


def test_a_smaller_window_keeps_the_newest_losses() -> None:
    one, two = method(min_batch=32, window=16), method(min_batch=32, window=8)
    weigh(one, torch.arange(20.0))
    two.load_state_dict(one.state_dict())
    assert sorted(two.state_dict()["recent"].tolist()) == list(range(12, 20))
