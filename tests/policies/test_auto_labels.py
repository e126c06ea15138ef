"""Auto where labels arrive late: what they end, what they call for, and what they leave alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from policies.adaptation.auto import Auto
from policies.hindsight import FRESH, REMEMBERED, SURE, Hindsight, Question, Wager
from policies.interfaces import Adaptation, Batch
from tests.policies import test_adaptation_auto
from tests.policies.models import batch_of, build, carried
from tests.policies.test_adaptation_auto import CLASSES, points

source = test_adaptation_auto.source  # a fixture
ROWS = 64
Stream = Sequence[tuple[Batch, Tensor]]


def cut(inputs: Tensor, classes: Tensor) -> Stream:
    starts = range(0, len(classes), ROWS)
    return [(batch_of(inputs[at : at + ROWS], at), classes[at : at + ROWS]) for at in starts]


def alike(batches: int, shift: float, seed: int = 3) -> Stream:
    """Mixed classes whose rows wander slowly, all together, around a place that has moved by ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    rows = ROWS * batches
    classes = torch.randint(CLASSES, (rows,), generator=generator)
    steps, wandering = torch.randn(rows, 8, generator=generator), torch.zeros(rows, 8)
    for t in range(1, rows):
        wandering[t] = 0.95 * wandering[t - 1] + 0.3 * steps[t]
    direction = torch.tensor([2.0, -2.0, 1.0, 0.0, 2.0, -2.0, 1.0, 0.0])
    inputs = 0.3 * points(classes, 0.0, generator) + 1.75 * torch.eye(CLASSES).repeat(1, 2)[classes]
    return cut(inputs + wandering + shift * direction, classes)


def lopsided(batches: int, seed: int = 5) -> Stream:
    """No drift, but one class in nine rows of ten, another one every forty windows."""
    generator = torch.Generator().manual_seed(seed)
    rows = ROWS * batches
    usual = torch.arange(rows) // (40 * ROWS) % CLASSES
    mixed = torch.randint(CLASSES, (rows,), generator=generator)
    classes = torch.where(torch.rand(rows, generator=generator) < 0.9, usual, mixed)
    return cut(points(classes, 0.0, generator), classes)


class Postman:
    """Brings labels, ``delay`` rows late, of one row in ``every``."""

    def __init__(self, delay: int = 100, every: int = 1) -> None:
        self._delay, self._every = delay, every
        self._held: list[tuple[str, int]] = []
        self._rows = 0

    def due(self, batch: Batch, classes: Tensor) -> list[tuple[str, int]]:
        self._held += zip(batch.ids, classes.tolist(), strict=True)
        ready = len(self._held) - self._delay
        out, self._held = self._held[: max(ready, 0)], self._held[max(ready, 0) :]
        self._rows += len(out)
        return [item for place, item in enumerate(out, self._rows - len(out)) if place % self._every == 0]


def told(method: Adaptation, labels: Sequence[tuple[str, int]]) -> None:
    if labels:
        ids, classes = zip(*labels, strict=True)
        method.labelled(ids, classes, [None] * len(ids))


def errors(method: Adaptation, stream: Stream, postman: Postman | None = None) -> float:
    """Share of wrong answers."""
    wrong = count = 0
    for batch, classes in stream:
        wrong += int((method.adapt(batch).argmax(1) != classes).sum())
        method.update()
        count += len(classes)
        if postman is not None:
            told(method, postman.due(batch, classes))
    return wrong / count


def auto(source: nn.Module, **params: Any) -> Auto:
    method: Auto = build("adaptation", "auto", params, source)
    return method


def plainly(source: nn.Module, stream: Stream) -> float:
    return errors(build("adaptation", "none", {}, source), stream)


def hindsight(method: Auto) -> Hindsight:
    return method._hindsight


def test_labels_call_for_adapting_that_likeness_held_back(source: nn.Module) -> None:
    stream = alike(40, 1.2)
    without, method = auto(source, every=0, alike=0.15), auto(source, every=0, alike=0.15)
    held_back = errors(without, stream)
    assert not without.gauges["adapting"]
    assert errors(method, stream, Postman()) < 0.7 * held_back
    assert method.gauges["adapting"]
    assert method.gauges["labels_adapting_won"] > 0.8


def test_few_rows_go_through_twice_while_labels_may_call_for_adapting(source: nn.Module) -> None:
    method, count = auto(source), [0]
    for model in (method.context.model, method.context.source):
        model.register_forward_pre_hook(lambda _, inputs: count.__setitem__(0, count[0] + len(inputs[0])))
    stream = alike(40, 0.0)
    errors(method, stream, Postman())
    assert not method.gauges["adapting"]
    assert 1.1 * 40 * ROWS < count[0] <= 1.2 * 40 * ROWS


def test_labels_leave_the_source_model_alone_where_nothing_beats_it(source: nn.Module) -> None:
    stream = alike(60, 0.0)
    method = auto(source)
    assert errors(method, stream, Postman()) <= plainly(source, stream)
    assert method.gauges["changes"] == 0
    assert method.gauges["labels_adapting"] > 0


def test_labels_end_what_information_wrongly_speaks_for(source: nn.Module) -> None:
    stream = lopsided(80)
    without, method, few = auto(source), auto(source), auto(source)
    misled = errors(without, stream)
    assert misled > plainly(source, stream) + 0.03
    assert errors(method, stream, Postman()) < misled - 0.01
    assert errors(few, stream, Postman(every=5)) <= misled
    assert without.gauges["adapting"]
    for told_of in (method, few):
        assert not told_of.gauges["adapting"]
        assert told_of.gauges["labels_vetoes"] > 0


def test_every_change_that_labels_make_is_logged_and_counted(
    source: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    method = auto(source)
    with caplog.at_level("INFO", logger="policies"):
        errors(method, lopsided(80), Postman())
    changes = [record.message for record in caplog.records if "'auto': " in record.message]
    assert len(changes) == method.gauges["changes"]
    assert any("adapting off (labels: " in message and " compared)" in message for message in changes)


def test_without_labels_nothing_is_remembered_or_answered_twice_for_them(
    source: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = alike(20, 1.2)
    method = auto(source)
    whole = []
    for batch, _ in stream:
        whole.append(method.adapt(batch))
        method.update()
    fresh = Hindsight(64, 16).state_dict()
    state = hindsight(method).state_dict()
    assert state["chain"]["rows"] == state["adapting"]["rows"] == []
    assert state["chain"]["purses"] == state["adapting"]["purses"] == fresh["chain"]["purses"]

    def asked(*_: object) -> None:
        raise AssertionError("no label has come")

    other = auto(source)
    for name in ("note", "judge"):
        monkeypatch.setattr(Question, name, asked)
    monkeypatch.setattr(Question, "decide", lambda *_: None)
    for (batch, _), answer in zip(stream, whole, strict=True):
        assert torch.equal(other.adapt(batch), answer)
        other.update()


def test_labels_of_unknown_rows_say_nothing(source: nn.Module) -> None:
    stream = alike(40, 0.0)
    method = auto(source)
    generator = random.Random(0)
    wrong = 0
    for number, (batch, classes) in enumerate(stream):
        wrong += int((method.adapt(batch).argmax(1) != classes).sum())
        method.update()
        told(method, [(f"stranger-{number}-{row}", generator.randrange(CLASSES)) for row in range(ROWS)])
    assert wrong / (40 * ROWS) <= plainly(source, stream)
    assert method.gauges["labels_adapting"] == method.gauges["labels_chain"] == 0
    assert method.gauges["changes"] == 0


def test_a_label_that_comes_twice_counts_once_and_one_that_comes_too_late_not_at_all() -> None:
    question = Question(4, 16)
    question.note(["a", "b"], [0, 0], [1, 0], 0)
    for _ in range(3):
        question.judge("a", 0)
        question.judge("b", 0)  # both ways had it, so it was never kept
    assert question.compared == 1
    question.note(["late"], [0], [1], 0)
    many = [str(row) for row in range(REMEMBERED)]
    question.note(many, [0] * REMEMBERED, [1] * REMEMBERED, 1)
    assert len(question) == REMEMBERED
    question.judge("late", 0)
    assert question.compared == 1


def test_memory_stays_bounded_where_labels_stop_short_of_all_rows(source: nn.Module) -> None:
    method = auto(source, persistence=1.0)
    generator = torch.Generator().manual_seed(0)
    for number in range(120):
        inputs = 0.3 * torch.randn(ROWS, 8, generator=generator)
        method.adapt(batch_of(inputs, number * ROWS))
        method.update()
        told(method, [("nobody", 0)])
    state = hindsight(method).state_dict()
    assert 0 < len(state["chain"]["rows"]) <= REMEMBERED
    assert 0 < len(state["adapting"]["rows"]) <= REMEMBERED


@pytest.mark.parametrize("at", [9, 25])
def test_a_run_restored_in_the_middle_goes_on_bit_for_bit(source: nn.Module, at: int) -> None:
    stream, postman = alike(40, 1.2), Postman()
    one, two = auto(source, alike=0.15), auto(source, alike=0.15)
    errors(one, stream[:at], postman)
    one.adapt(stream[at][0])
    two.context.model.load_state_dict(carried(one.context.model.state_dict()))
    two.load_state_dict(carried(one.state_dict()))
    labels = postman.due(*stream[at])
    for method in (one, two):
        method.update()
        told(method, labels)
    for batch, classes in stream[at + 1 :]:
        assert torch.equal(one.adapt(batch), two.adapt(batch))
        labels = postman.due(batch, classes)
        for method in (one, two):
            method.update()
            told(method, labels)
    assert one.gauges == two.gauges
    assert one.gauges["labels_adapting"] > 0


def test_a_state_of_before_labels_were_heard_is_taken_over(source: nn.Module) -> None:
    stream = alike(12, 1.2)
    one, two = auto(source), auto(source)
    errors(one, stream)
    state = carried(one.state_dict())
    passes = state.pop("passes")
    del state["parts"]["hindsight"]
    state["parts"]["anchor"] = passes.pop("anchor")
    two.context.model.load_state_dict(carried(one.context.model.state_dict()))
    two.load_state_dict(state | passes)
    for batch, _ in alike(4, 1.2, seed=9):
        assert torch.equal(one.adapt(batch), two.adapt(batch))
        one.update()
        two.update()


def answered(question: Question, won: Callable[[int], bool | None], windows: int, rows: int = 8) -> Iterator[bool]:
    """Windows of rows, each with its label; what is in force after each."""
    on = False
    for window in range(windows):
        names = [f"{window}-{row}" for row in range(rows)]
        question.note(names, [1] * rows, [0] * rows, window)
        for name in names:
            found = won(window)
            question.judge(name, 2 if found is None else int(found))
        on = bool(question.decide(on))
        yield on


def test_labels_begin_and_end_a_way_within_some_windows() -> None:
    course = list(answered(Question(4, 16), lambda window: window < 40, 80))
    began, ended = course.index(True), course.index(False, course.index(True))
    assert 8 <= began <= 15
    assert 44 <= ended <= 50
    assert course == [began <= window < ended for window in range(80)]


def test_ways_that_are_as_good_as_each_other_are_seldom_taken_for_different() -> None:
    generator = random.Random(0)
    changes = 0
    for _ in range(20):
        question = Question(4, 16)
        changes += sum(answered(question, lambda _: generator.random() < 0.5, 100)) > 0
    assert changes <= 3


def test_many_rows_of_one_window_are_one_block() -> None:
    question = Question(4, 16)
    for number in range(50):
        question.note([str(number)], [1], [0], 7)
        question.judge(str(number), 1)
    question.note(["next"], [1], [0], 8)
    question.judge("next", 1)
    assert question.decide(False) is None
    for purse in question.state_dict()["purses"][0]:
        assert purse <= 1.8


def test_labels_out_of_order_make_no_more_blocks_than_windows() -> None:
    question, generator = Question(1, 16), random.Random(0)
    names = [(str(row), row // 8) for row in range(80)]
    for name, window in names:
        question.note([name], [1], [0], window)
    generator.shuffle(names)
    for name, _ in names:
        question.judge(name, 1)
    assert question.state_dict()["purses"][0][-1] <= 1.8**10


def test_few_rows_won_do_not_outweigh_many_lost_at_once() -> None:
    generator = random.Random(0)
    question, on = Question(4, 16), False
    for window in range(200):
        lost = generator.random() < 0.3
        rows = 8 if lost else 1
        names = [f"{window}-{row}" for row in range(rows)]
        question.note(names, [1] * rows, [0] * rows, window)
        for name in names:
            question.judge(name, 0 if lost else 1)
        on = bool(question.decide(on))
        assert not on


def test_a_way_that_labels_called_for_ends_when_none_come_any_more() -> None:
    question = Question(4, 16)
    assert list(answered(question, lambda _: True, 20))[-1]
    course = [question.decide(True) for _ in range(FRESH + 2)]
    assert course == [True] * (FRESH - 1) + [False, None, None]
    assert question.decide(False) is None


def test_a_way_that_labels_ended_rests_twice_as_long_each_time() -> None:
    question = Question(4, 3)
    rests = []
    for turn in range(3):
        for window in range(100 * turn, 100 * turn + 10):
            question.note([str(window)], [1], [0], window)
            question.judge(str(window), 0)
        assert question.decide(True) is False
        rests.append(sum(question.decide(False) is False for _ in range(30)))
        assert question.decide(False) is None
    assert rests == [2, 5, 11]
    assert question.vetoes == 3


def test_wealth_grows_without_end_only_up_to_what_a_change_takes() -> None:
    wager = Wager((0.1, 0.8))
    for _ in range(1000):
        wager.see(1.0, SURE)
    assert wager.wealth <= SURE * 4
    for _ in range(60):
        wager.see(-1.0, SURE)
    assert wager.wealth < 1
