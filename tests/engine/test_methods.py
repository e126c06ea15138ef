"""States that methods take over, and those that they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from engine.checkpoint.state import flatten, unflatten
from engine.core import Core
from policies.adaptation.rotta import RoTTA
from policies.interfaces import State
from tests.engine.cores import drive
from tests.engine.lives import Life
from tests.engine.test_keeper import maker


def copied(core: Core) -> State:
    return unflatten(*flatten(core.methods.state_dict()))


def bits(core: Core, place: str) -> tuple[dict[str, bytes], Any]:
    tensors, tree = flatten(core.methods.state_dict()[place]["state"])
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, tree


@pytest.mark.parametrize("policy", ["everything", "tent with everything", "bn", "lame"])
def test_a_method_whose_state_lacks_anything_starts_afresh_and_the_others_go_on(policy: str) -> None:
    make = maker(policy, False)
    driven, fresh = make(), make()
    drive(driven, range(8))
    state = copied(driven)
    refused = 0
    for place, key in [(place, key) for place, one in state.items() for key in one["state"]]:
        short = {name: {**one, "state": dict(one["state"])} for name, one in state.items()}
        del short[place]["state"][key]
        core = make()
        unused = core.methods.load_state_dict(short)
        assert unused.keys() <= {place}
        if unused:
            refused += 1
            with pytest.raises(KeyError):
                make().methods.load_state_dict(short, strict=True)
            assert f"KeyError: '{key}'" in unused[place]
            assert bits(core, place) == bits(fresh, place)
        for other in state.keys() - {place}:
            assert bits(core, other) == bits(driven, other)
        drive(core, range(1))
    assert refused >= len(state) / 2


def test_a_start_says_which_state_was_not_used_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, own = maker("everything", False), RoTTA.state_dict

    def older(method: RoTTA) -> dict[str, Any]:
        state = own(method)
        del state["bank"]
        return state

    with monkeypatch.context() as before:
        before.setattr(RoTTA, "state_dict", older)
        life = Life(tmp_path, make).run(6)
        life.save()
        life.crash()
    with capture_logs() as logs:
        again = Life(tmp_path, make)
    (told,) = [entry for entry in logs if entry["event"] == "method_state_not_used"]
    assert told["methods"] == ["adaptation"]
    assert "rotta cannot take it over" in told["reason"]
    assert again.core.step == life.core.step
    again.finish().crash()


def test_a_device_that_fails_is_not_taken_for_a_state_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(method: RoTTA, state: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    core = maker("everything", False)()
    state = copied(core)
    monkeypatch.setattr(RoTTA, "load_state_dict", fail)
    with pytest.raises(RuntimeError, match="CUDA"):
        core.methods.load_state_dict(state)
