from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.build import build_core, build_sink, build_sources, inputs_of, spec_of, stream_name
from engine.core import Core
from engine.errors import PolicyFileError
from engine.policy import Policy
from engine.policyfile import load
from streams.files import FileSink, FileSource
from streams.journal import Kind
from tests.engine.cores import tiny_model
from tests.engine.policies import BASE, KAFKA, write


def policy_of(directory: Path, text: str = "") -> Policy:
    return load(write(directory, BASE + text), environ={}).policy


def core_of(directory: Path, text: str = "", model: nn.Module | None = None) -> Core:
    return build_core(policy_of(directory, text), model or tiny_model(), background=False, directory=None)


def streams(directory: Path, **more: dict[str, Any]) -> Policy:
    given = {"data": {"file": "./d.jsonl"}, "predictions": {"file": "./p.jsonl"}, **more}
    return policy_of(directory, f"streams: {json.dumps(given)}\n")


@pytest.mark.parametrize(
    ("learning", "names"),
    [
        ("parameters: all", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        ("parameters: norm", ["1.weight", "1.bias"]),
        ("parameters: head", ["3.weight", "3.bias"]),
        ("include: [weight], exclude: ['^0']", ["1.weight", "3.weight"]),
        ("parameters: norm, include: [bias]", ["1.bias"]),
    ],
)
def test_a_policy_says_which_parameters_learn(tmp_path: Path, learning: str, names: list[str]) -> None:
    learner = core_of(tmp_path, f"learning: {{{learning}}}\n").learner
    assert list(learner.names) == names
    own = dict(learner.host.learner.named_parameters())
    held = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    assert [id(parameter) for parameter in held] == [id(own[name]) for name in names]


def test_where_no_parameter_is_left_to_learn_the_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"^learning: no parameter of the model matches; widen"):
        core_of(tmp_path, "learning: {include: [nothing]}\n")


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_a_policy_says_how_steps_are_taken(tmp_path: Path, optimizer: str, kind: type[torch.optim.Optimizer]) -> None:
    text = f"learning: {{optimizer: {optimizer}, lr: 0.02, weight_decay: 0.01, momentum: 0.8}}\n"
    built = core_of(tmp_path, text).learner.optimizer
    (group,) = built.param_groups
    assert isinstance(built, kind)
    assert type(built).__name__ == kind.__name__
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.01)
    assert group.get("momentum", group.get("betas", (0,))[0]) == 0.8


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2]


def test_a_model_without_parameters_serves_and_does_not_learn(tmp_path: Path) -> None:
    core = core_of(tmp_path, "learning: {enabled: false}\n", Fixed())
    assert core.host.num_classes == 2
    assert not core.learner.enabled


def test_a_method_that_does_not_suit_the_model_is_refused_with_its_key(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(PolicyFileError, match=r"^adaptation: rotta: .*choose"):
        core_of(tmp_path, "adaptation: {method: rotta}\n", model)


def test_settings_come_from_the_policy(tmp_path: Path) -> None:
    text = (
        "learning: {batch_size: 3, max_delay: 7s}\naudit: {share: 0.3}\nrelease: {every: 9}\njoin: {mode: inline}\n"
        "interpolation: {method: linear}\ngate: {method: flips}\n"
    )
    settings = core_of(tmp_path, text).settings
    assert (settings.batch_size, settings.max_delay, settings.audit_share) == (3, 7.0, 0.3)
    assert (settings.release_every, settings.store_inputs, settings.background) == (9, False, False)
    assert core_of(tmp_path, "release: {every: 9}\n").settings.release_every == 0, "without a gate nothing is released"
    assert not settings.all_inputs
    assert core_of(tmp_path, "join: {keep: all}\n").settings.all_inputs


def test_seeds_differ_from_method_to_method_and_follow_from_the_policy(tmp_path: Path) -> None:
    text = "safeguards: [{method: ewc}, {method: restore}]\nseed: "
    seeds = [[m.context.seed for m in core_of(tmp_path, f"{text}{seed}\n").methods.safeguards] for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len({*seeds[0], *seeds[2]}) == 4


def test_inputs_are_described_as_the_model_and_as_records_have_them(tmp_path: Path) -> None:
    policy = load(write(tmp_path, KAFKA), environ={}).policy
    inputs, spec = inputs_of(policy), spec_of(policy)
    assert (inputs.shape, inputs.channels_last, inputs.scale) == ((3, 32, 32), True, 1 / 255)
    assert (spec.shape, spec.dtype) == ((32, 32, 3), np.dtype("uint8"))


def test_files_that_end_are_read_by_one_source_and_files_that_grow_by_another(tmp_path: Path) -> None:
    policy = streams(tmp_path, feedback={"file": "./f.jsonl"})
    (only,) = build_sources(policy, tmp_path.joinpath, tmp_path / "state")
    assert isinstance(only[0], FileSource)
    assert (only[0].bounded, only[1]) == (True, {"data": Kind.DATA, "feedback": Kind.FEEDBACK})
    policy = streams(tmp_path, feedback={"file": "./f.jsonl", "follow": True})
    ended, growing = build_sources(policy, tmp_path.joinpath, tmp_path / "state")
    assert (ended[0].bounded, ended[1]) == (True, {"data": Kind.DATA})
    assert (growing[0].bounded, growing[1]) == (False, {"feedback": Kind.FEEDBACK})


def test_topics_are_named_as_they_are_and_read_by_one_client(tmp_path: Path) -> None:
    policy = load(write(tmp_path, KAFKA), environ={}).policy
    state = tmp_path / "state"
    state.mkdir()
    (only,) = build_sources(policy, tmp_path.joinpath, state)
    assert only[0].streams == ("events", "feedback")
    assert only[1] == {"events": Kind.DATA, "feedback": Kind.FEEDBACK}
    assert policy.streams is not None
    assert stream_name(Kind.DATA, policy.streams.data) == "events"


def test_sinks_are_built_where_they_are_named(tmp_path: Path) -> None:
    policy = streams(tmp_path)
    assert policy.streams is not None
    assert build_sink(policy, None, tmp_path.joinpath, letters=True) is None
    sink = build_sink(policy, policy.streams.predictions, tmp_path.joinpath, letters=False)
    assert isinstance(sink, FileSink)
    assert sink.name == "p.jsonl"
