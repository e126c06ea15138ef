"""Groups kept apart: ten of them interleaved are ten streams."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from policies.adaptation.per_group import PerGroup
from policies.interfaces import Adaptation, Batch, PolicyError
from tests.policies.models import build, carried, drive, source_model, weights_of

GROUPS = 10
SOURCE = source_model("conv_bn")
INNER: list[tuple[str, dict[str, Any]]] = [
    ("class_bn", {"window": 6}),
    ("bn", {"mode": "ema"}),
    ("lame", {"affinity": "knn"}),
    ("t3a", {}),
    ("auto", {"every": 0, "window": 6, "patience": 1, "worse": 9.0}),
]


def made(of: str, params: dict[str, Any], groups: int = 64) -> Adaptation:
    method: Adaptation = build("adaptation", "per_group", {"of": of, "params": params, "groups": groups}, SOURCE)
    return method


def mixed(batches: int, rows: int = 40) -> list[Batch]:
    """Batches of rows that come from ten groups, each brighter than the one before."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(batches):
        group = torch.randint(GROUPS, (rows,), generator=generator)
        inputs = torch.rand(rows, 3, 8, 8, generator=generator) * 0.3 + 0.2 * group[:, None, None, None]
        ids = tuple(str(number * rows + row) for row in range(rows))
        names = tuple(None if g == 0 else f"tenant-{g}" for g in group.tolist())
        found.append(Batch(ids, inputs, torch.arange(rows).double(), names, float(number)))
    return found


def only(batch: Batch, group: str | None) -> tuple[Batch, Tensor]:
    keep = torch.tensor([row for row, name in enumerate(batch.groups) if name == group])
    return batch.rows(keep), keep


@pytest.mark.parametrize(("of", "params"), INNER)
def test_ten_groups_interleaved_equal_ten_separate_runs(of: str, params: dict[str, Any]) -> None:
    batches = mixed(8)
    together = drive(made(of, params), batches)
    for group in sorted({name for batch in batches for name in batch.groups}, key=str):
        alone: Adaptation = build("adaptation", of, params, SOURCE)
        for batch, answered in zip(batches, together, strict=True):
            rows, keep = only(batch, group)
            if len(rows):
                assert torch.equal(alone.adapt(rows), answered[keep])
                alone.update()


def test_groups_learn_for_themselves_alone() -> None:
    method = made("class_bn", {"window": 6})
    drive(method, mixed(8))
    assert method.gauges["groups"] == GROUPS
    assert method.gauges["drift"] > 0
    live = weights_of(method.context.model)
    assert all(torch.equal(live[name], value) for name, value in SOURCE.state_dict().items())


def held(method: Adaptation) -> dict[str | None, Adaptation]:
    assert isinstance(method, PerGroup)
    return method._held


def test_gauges_are_means_over_the_groups_held_while_groups_come_and_go() -> None:
    method = made("class_bn", {"window": 6}, groups=4)
    for batch in mixed(6):
        drive(method, [batch])
        found = [one.gauges for one in held(method).values()]
        means = {name: sum(gauges[name] for gauges in found) / 4 for name in found[0]}
        assert means == {name: pytest.approx(method.gauges[name]) for name in means}
    assert method.gauges["evictions"] > 0


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), 1e300])
def test_what_a_group_shows_is_looked_at_when_it_has_a_batch_and_what_is_no_number_is_left_out(
    strange: float,
) -> None:
    method, batch = made("bn", {"mode": "ema"}), mixed(1)[0]
    one, two = (only(batch, f"tenant-{number}")[0] for number in (1, 2))
    drive(method, [one, two])
    for name, value in (("tenant-1", 10.0), ("tenant-2", 100.0)):
        held(method)[name].gauges = {"shown": value, "strange": strange}
    drive(method, [one])
    assert method.gauges["shown"] == 10.0
    drive(method, [two])
    assert method.gauges["shown"] == 55.0
    assert "strange" not in method.gauges
    for name in ("tenant-1", "tenant-2"):
        held(method)[name].gauges = {"shown": float("nan")}
    drive(method, [one, two])
    assert math.isnan(method.gauges["shown"]), "the last value would go on being exported"
    method.reset()
    shown = {name: value for name, value in method.gauges.items() if not math.isnan(value)}
    assert shown == {"groups": 0, "evictions": 0}
    assert "shown" in method.gauges


def test_a_restored_run_goes_on_as_before() -> None:
    batches = mixed(8)
    one, two = (made("auto", INNER[-1][1], groups=7) for _ in range(2))
    drive(one, batches[:4])
    one.adapt(batches[4])
    two.load_state_dict(carried(one.state_dict()))
    one.update()
    two.update()
    assert all(torch.equal(a, b) for a, b in zip(drive(one, batches[5:]), drive(two, batches[5:]), strict=True))
    assert one.gauges == two.gauges


def test_a_labelled_step_reaches_every_group() -> None:
    method, other = made("class_bn", {}), made("class_bn", {})
    batches = mixed(3)
    drive(method, batches[:2])
    drive(other, batches[:2])
    with torch.no_grad():
        for parameter in method.context.model.parameters():
            parameter.add_(0.1)
    assert not torch.equal(method.adapt(batches[2]), other.adapt(batches[2]))


def test_the_group_unused_for_longest_is_forgotten_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    method = made("class_bn", {"window": 6}, groups=2)
    batch = mixed(1)[0]
    names = [name for name in dict.fromkeys(batch.groups) if name is not None][:3]
    with caplog.at_level(logging.WARNING, logger="policies"):
        drive(method, [only(batch, name)[0] for name in (names[0], names[1], names[0], names[2], names[1])])
    assert method.state_dict()["names"] == [names[2], names[1]]
    assert method.gauges["evictions"] == 2
    assert sum("forgets groups" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("of", ["tent", "auto", "rotta", "mezo"])
def test_a_method_that_changes_weights_is_refused(of: str) -> None:
    with pytest.raises(PolicyError, match=f"'{of}' changes weights, which all groups share: choose"):
        made(of, {})


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"of": "clas_bn"}, "did you mean 'class_bn'"),
        ({"of": "class_bn", "params": {"windows": 3}}, "params.windows: Extra inputs are not permitted"),
        ({"of": "per_group"}, "kept apart once"),
    ],
)
def test_a_wrong_choice_gets_a_sentence(params: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build("adaptation", "per_group", params, SOURCE)


def test_groups_of_another_method_are_not_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    one, two = made("class_bn", {"window": 6}), made("t3a", {})
    drive(one, mixed(2))
    with caplog.at_level(logging.WARNING):
        two.load_state_dict(carried(one.state_dict()))
    assert "begins afresh: its groups were of 'class_bn'" in caplog.text
    assert two.state_dict()["names"] == []


def test_labels_reach_the_method_of_their_group_alone() -> None:
    method = made("auto", {"every": 0})
    drive(method, mixed(4))
    heard: list[tuple[str, ...]] = []
    for group, member in method._held.items():  # type: ignore[attr-defined]
        member.labelled = lambda ids, labels, groups, of=group: heard.append(
            (str(of), *ids, *map(str, labels), *groups)
        )
    method.labelled(["a", "b", "c", "d"], [0, 1, 2, 3], ["tenant-1", None, "tenant-1", "nobody"])
    assert sorted(map(str, heard)) == sorted(
        [
            str(("tenant-1", "a", "c", "0", "2", "tenant-1", "tenant-1")),
            str(("None", "b", "1", None)),
        ]
    )
