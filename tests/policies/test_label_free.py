"""The error estimated without labels, against worked values, and what auto makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from policies.auto_params import AutoParams
from policies.features import found_linear_head
from policies.label_free import (
    ROWS,
    LabelFreeError,
    accuracy_floor,
    corrected_error,
    dropout_masks,
    dropout_rate,
    has_fallen,
    smoothed_error,
    under_dropout,
    windows_apart,
)
from policies.streamview import StreamView
from tests.policies.models import CLASSES, FEATURES, carried, context_for, source_model

LN10 = math.log(10)


def test_the_estimate_equals_the_worked_values() -> None:
    assert smoothed_error(0.2, 0.2, corrected_error(0.2, LN10, LN10, 10)) == pytest.approx(0.2)
    assert corrected_error(0.2, 0.5 * LN10, LN10, 10) == pytest.approx(0.9)
    assert smoothed_error(0.2, 0.2, corrected_error(0.2, 0.5 * LN10, LN10, 10)) == pytest.approx(0.48)
    assert smoothed_error(None, 0.2, 0.9) == 0.2
    assert corrected_error(0.2, 0.5 * LN10, 0.5 * LN10, 10) == pytest.approx(0.2), "beside what is usual of the stream"


def test_an_entropy_of_nothing_gives_the_largest_error_unless_no_answer_differs() -> None:
    assert corrected_error(1e-9, 0.0, LN10, 10) == 0.9
    assert corrected_error(0.0, 0.0, LN10, 10) == 0.0
    assert corrected_error(0.1, 0.0, math.log(2), 2) == 0.5


@pytest.mark.parametrize(("newer", "fallen"), [(0.77, True), (0.785, False), (0.78, False), (0.9, False)])
def test_a_fall_of_over_two_points_between_fives_counts(newer: float, fallen: bool) -> None:
    assert has_fallen([0.8] * 5 + [newer] * 5) is fallen
    assert has_fallen([0.1] * 3 + [0.8] * 5 + [newer] * 5) is fallen
    assert not has_fallen([0.8] * 4 + [newer] * 5), "ten entries are needed"


def test_the_floor_is_relative_to_guessing_and_to_what_is_usual() -> None:
    assert accuracy_floor(10, 0.8) == 0.4
    assert accuracy_floor(10, 0.2) == pytest.approx(0.15)
    assert accuracy_floor(10, None) == pytest.approx(0.15)
    assert accuracy_floor(2, 0.6) == accuracy_floor(2, None) == 0, "two classes have none"
    assert accuracy_floor(10, 0.1) == pytest.approx(0.1)


def test_the_rate_goes_by_the_number_of_classes() -> None:
    assert [dropout_rate(classes) for classes in (2, 10, 11, 100, 200, 1000)] == [0.4, 0.4, 0.3, 0.3, 0.3, 0.2]


def one_feature() -> nn.Linear:
    """Class 1 for a negative feature, else class 0; without it both are as likely."""
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        head.bias.zero_()
    return head


def test_what_dropout_does_to_a_head_of_one_feature() -> None:
    features = torch.cat([torch.full((4000, 1), 2.0), torch.full((4000, 1), -2.0)])
    head, before = one_feature(), torch.get_rng_state()
    masks = masks_for(features, 7)
    differing, answers = under_dropout(head, features, (features[:, 0] < 0).long(), masks)
    assert torch.equal(torch.get_rng_state(), before), "the generator of all is left alone"
    assert not differing[:4000].any(), "class 0 is the answer without the feature too"
    assert float(differing[4000:].mean()) == pytest.approx(0.4, abs=0.01)
    kept = 1 / (1 + math.exp(-2 * 2 / 0.6))
    assert float(answers[:4000, 0].mean()) == pytest.approx(0.6 * kept + 0.4 * 0.5, abs=0.01)
    dropout_masks.cache_clear()
    again = under_dropout(one_feature(), features, (features[:, 0] < 0).long(), masks_for(features, 7))
    assert torch.equal(again[0], differing)


def test_a_seed_of_its_own_drops_other_features() -> None:
    features = torch.full((64, 1), -2.0)
    given = (masks_for(features, seed) for seed in (1, 2))
    one, other = (under_dropout(one_feature(), features, torch.ones(64).long(), masks)[0] for masks in given)
    assert not torch.equal(one, other)


def test_what_is_dropped_is_drawn_once_and_for_each_row_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = dropout_masks(5, 64, 100, 0.4, torch.float32)
    assert masks.shape == (10, 64, 100)
    assert float((masks == 0).float().mean()) == pytest.approx(0.4, abs=0.01)
    assert float(masks.max()) == pytest.approx(1 / 0.6)
    assert len(masks.flatten(0, 1).unique(dim=0)) == 640
    (estimate, model), (other, same) = estimated(), estimated()
    for inputs in windows(1, 64):
        shown(estimate, model, inputs)
        shown(other, same, inputs)
    estimate.look(correlated=False, usual=True)
    monkeypatch.setattr(torch, "rand", None)
    other.look(correlated=False, usual=True)
    assert estimate.error == other.error


def masks_for(features: Tensor, seed: int) -> Tensor:
    return dropout_masks(seed, len(features), features.shape[1], 0.4, torch.float32)


def shown(estimate: LabelFreeError, model: nn.Module, inputs: Tensor) -> None:
    """One batch, answered by the model."""
    estimate.begin()
    estimate.add(model(inputs))


def windows(count: int, rows: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield 3 * torch.randn(rows, FEATURES, generator=generator)


def estimated(kind: str = "mlp_bn1d", window: int = 64) -> tuple[LabelFreeError, nn.Module]:
    """One that looks at every window, as it does where a model is large beside its head."""
    context = context_for(source_model(kind))
    context.model.register_parameter("more", nn.Parameter(torch.zeros(10_000)))
    return LabelFreeError(context, window), context.model


def head_of(model: nn.Module) -> nn.Linear:
    head = found_linear_head(model, CLASSES)
    assert head is not None
    return head


def test_nothing_is_known_before_the_first_window_then_it_is() -> None:
    estimate, model = estimated()
    assert math.isnan(estimate.gauges["estimated_error"])
    estimate.look(correlated=False, usual=True)
    assert math.isnan(estimate.gauges["estimated_error"])
    for inputs in windows(1, 64):
        shown(estimate, model, inputs)
    estimate.look(correlated=False, usual=True)
    assert estimate.error is not None
    assert 0 < estimate.error < 1 - 1 / CLASSES
    assert estimate.usual == 1 - estimate.error


def test_the_model_is_not_passed_again_and_no_other_forward_counts() -> None:
    estimate, model = estimated()
    passes = [0]
    model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for inputs in windows(1, 64):
        shown(estimate, model, inputs)
        first = carried(estimate.state_dict())
        model(inputs + 1)
        model(inputs + 2)
        estimate.add(torch.eye(CLASSES).repeat(16, 1))
    estimate.look(correlated=False, usual=True)
    assert passes == [3]
    assert sum(map(len, first["features"])) == 64
    assert estimate.error is not None


@pytest.mark.parametrize(("rows", "window"), [(1, 64), (7, 64), (1, 1000), (64, 64), (500, 64), (3, 200)])
def test_few_rows_of_a_window_are_held_whatever_comes(rows: int, window: int) -> None:
    estimate, model = estimated(window=window)
    seen = 0
    for inputs in windows(3 * -(-max(window, rows) // rows), rows):
        shown(estimate, model, inputs)
        seen += rows
        held = sum(map(len, estimate.state_dict()["features"]))
        assert held <= ROWS
        assert seen < window or held >= ROWS / 2


def test_fewer_rows_go_through_a_large_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("policies.label_free.LARGE_HEAD", 1)
    estimate, model = estimated()
    for inputs in windows(8, 8):
        shown(estimate, model, inputs)
    assert sum(map(len, estimate.state_dict()["features"])) == 4


def test_fewer_rows_are_looked_at_where_they_are_wide() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(30_000, CLASSES)).eval()
    context = context_for(model)
    estimate = LabelFreeError(context, 64)
    shown(estimate, context.model, torch.zeros(64, 30_000))
    assert sum(map(len, estimate.state_dict()["features"])) == 6


def test_windows_are_left_out_where_the_head_is_much_of_the_model() -> None:
    small, large = source_model("mlp"), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    assert windows_apart(head_of(small), small) == 4
    assert windows_apart(large[1], nn.Sequential(nn.Linear(200, 64), large)) == 2  # type: ignore[arg-type]
    assert windows_apart(large[1], nn.Sequential(nn.Linear(2000, 64), large)) == 1  # type: ignore[arg-type]
    context = context_for(small)
    estimate, held, known = LabelFreeError(context, 64), [], []
    for inputs in windows(6, 64):
        shown(estimate, context.model, inputs)
        held.append(sum(map(len, estimate.state_dict()["features"])))
        estimate.look(correlated=False, usual=True)
        known.append(estimate.error)
    assert held == [64, 0, 0, 0, 64, 0]
    assert known[0] == known[3] != known[4] == known[5]


def test_a_head_that_learns_before_the_window_is_over_is_not_taken_for_another() -> None:
    for learns in (False, True):
        estimate, model = estimated()
        for inputs in windows(4, 16):
            estimate.begin()
            answers = model(inputs)
            estimate.add(answers if learns else -answers)
            if learns:
                with torch.no_grad():
                    head_of(model).weight.neg_()
        two, _ = estimated()
        two.load_state_dict(carried(estimate.state_dict()))
        estimate.look(correlated=False, usual=True)
        assert (estimate.error is not None) is learns
        two.look(correlated=False, usual=True)
        assert (two.error is not None) is learns


def test_a_state_that_held_rows_and_sums_is_taken_over() -> None:
    estimate, model = estimated()
    for inputs in windows(1, 10):
        shown(estimate, model, inputs)
    state = carried(estimate.state_dict())
    del state["moved"]
    other, same = estimated()
    other.load_state_dict(state | {"sums": torch.ones(CLASSES + 3)})
    shown(other, same, inputs)
    other.look(correlated=False, usual=True)
    assert other.error is not None


@pytest.mark.parametrize("kind", ["mlp_heads", "mlp"])
def test_a_head_that_is_not_what_answers_gives_no_estimate(kind: str) -> None:
    estimate, model = estimated(kind)
    for inputs in windows(1, 64):
        estimate.begin()
        estimate.add(model(inputs) if kind == "mlp_heads" else -model(inputs))
    estimate.look(correlated=False, usual=True)
    assert estimate.error is None


def test_a_model_without_a_linear_classifier_has_no_estimate() -> None:
    model = nn.Sequential(nn.Conv1d(1, CLASSES, FEATURES), nn.Flatten()).eval()
    context = context_for(model)
    estimate = LabelFreeError(context, 64)
    shown(estimate, context.model, torch.randn(64, 1, FEATURES))
    estimate.look(correlated=False, usual=True)
    assert estimate.error is None
    assert estimate.low == 0


def test_rows_whose_features_are_not_finite_are_left_out() -> None:
    estimate, model = estimated()
    for inputs in windows(1, 64):
        inputs[:10] = float("nan")
        shown(estimate, model, inputs)
    estimate.look(correlated=False, usual=True)
    assert estimate.error is not None
    assert 0 < estimate.error < 1
    shown(estimate, model, torch.full((64, FEATURES), float("nan")))
    before = estimate.error
    estimate.look(correlated=False, usual=True)
    assert estimate.error == before, "a window of them alone tells nothing"


def test_a_model_that_answers_one_class_is_low_although_it_agrees_with_itself() -> None:
    estimate, model = estimated("mlp")
    with torch.no_grad():
        head_of(model).weight.mul_(8)
    for inputs in windows(6, 64):
        shown(estimate, model, inputs)
        estimate.look(correlated=False, usual=True)
    assert estimate.low == 0
    with torch.no_grad():
        head_of(model).bias[2] += 8
    for number, inputs in enumerate(windows(8, 64, seed=1)):
        shown(estimate, model, inputs)
        estimate.look(correlated=number > 0, usual=False)
    assert estimate.low >= 3
    assert estimate.error is not None
    assert estimate.error > 0.6


def test_windows_of_one_class_each_are_no_collapse_beside_their_own_stream() -> None:
    errors = []
    for correlated in (False, True):
        estimate, model = estimated("mlp")
        with torch.no_grad():
            head_of(model).weight.mul_(4)
        pool = torch.cat(list(windows(40, 64)))
        answers = model(pool).argmax(1)
        for number in range(12):
            shown(estimate, model, pool[answers == int(answers[number])][:64])
            estimate.look(correlated=correlated, usual=True)
        errors.append(estimate.error)
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1] < 0.5 < errors[0]


def test_a_restored_estimate_goes_on_as_before() -> None:
    (one, model), (two, other) = estimated(), estimated()
    for number, inputs in enumerate(windows(40, 10)):
        if number == 22:
            two.load_state_dict(carried(one.state_dict()))
        for estimate, own in ((one, model), (two, other))[: 1 if number < 22 else 2]:
            shown(estimate, own, inputs)
            if number % 6 == 5:
                estimate.look(correlated=False, usual=number < 12)
    assert one.gauges == two.gauges
    assert one.error is not None
    assert carried(one.state_dict())["means"] == carried(two.state_dict())["means"]


def test_an_estimate_that_is_detached_leaves_no_hook() -> None:
    estimate, model = estimated()
    estimate.detach()
    for inputs in windows(1, 64):
        shown(estimate, model, inputs)
    estimate.look(correlated=False, usual=True)
    assert estimate.error is None


def test_the_view_tells_how_many_answers_differ_from_the_source_models() -> None:
    view = StreamView(context_for(source_model("mlp_bn1d")), AutoParams(), own=False)
    assert math.isnan(view.gauges["disagreement"])
    answered, source = torch.eye(CLASSES)[[0, 1, 2, 3]], torch.eye(CLASSES)[[0, 1, 3, 3]]
    source[0, 0] = float("nan")
    view.compare(answered, source)
    again = StreamView(context_for(source_model("mlp_bn1d")), AutoParams(), own=False)
    again.load_state_dict(carried(view.state_dict()))
    for one in (view, again):
        one.add(torch.full((64, CLASSES), 0.25), torch.zeros(64).long(), torch.zeros(64, 3), None)
        one.look(torch.full((CLASSES,), 0.25).double().numpy())
        assert one.gauges["disagreement"] == pytest.approx(1 / 3)
