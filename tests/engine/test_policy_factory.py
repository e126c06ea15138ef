import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.errors import PolicyFileError
from engine.factory import build_model, load_weights, resolve_factory
from engine.policy import Model

LINEAR = "from torch import nn\ndef build():\n    return nn.Linear(4, 3)\n"


def write(directory: Path, text: str = LINEAR, name: str = "model.py") -> Path:
    file = directory / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def refusal(spec: str, base: Path, *prefixes: str) -> str:
    with pytest.raises(PolicyFileError) as caught:
        resolve_factory(spec, base, prefixes)()
    assert caught.value.exit_code == 78
    assert str(caught.value).startswith("model.factory: ")
    return str(caught.value)


def test_a_factory_beside_the_policy_builds_the_same_model_for_the_same_seed(tmp_path: Path) -> None:
    write(tmp_path)
    build = resolve_factory("./model.py:build", tmp_path, seed=3)
    before = torch.get_rng_state()
    one, two = build(), build()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.state_dict()["weight"], two.state_dict()["weight"])
    other = resolve_factory("./model.py:build", tmp_path, seed=4)()
    assert not torch.equal(one.state_dict()["weight"], other.state_dict()["weight"])


def test_a_factory_may_import_its_siblings_and_leaves_none_of_them_behind(tmp_path: Path) -> None:
    write(tmp_path, LINEAR, "adaptd_test_sibling.py")
    write(tmp_path, "def build():\n    from adaptd_test_sibling import build as b\n    return b()\n")
    path = list(sys.path)
    assert isinstance(resolve_factory("./model.py:build", tmp_path)(), nn.Linear)
    assert "adaptd_test_sibling" not in sys.modules
    assert sys.path == path


def test_a_sibling_never_hides_an_installed_module(tmp_path: Path) -> None:
    write(tmp_path, "raise RuntimeError('hidden')\n", "colorsys.py")
    write(tmp_path, "import colorsys\n" + LINEAR)
    sys.modules.pop("colorsys", None)
    assert isinstance(resolve_factory("./model.py:build", tmp_path)(), nn.Linear)


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path)
    resolve_factory("./model.py:build", tmp_path)
    write(tmp_path, LINEAR.replace("4, 3", "9, 3"))
    model = resolve_factory("./model.py:build", tmp_path)()
    assert model.state_dict()["weight"].shape == (3, 9)
    assert not (tmp_path / "__pycache__").exists()


def test_a_dataclass_in_the_file_of_a_factory_works(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Sizes:\n    x: int\n"
    )
    write(tmp_path, text + LINEAR)
    assert isinstance(resolve_factory("./model.py:build", tmp_path)(), nn.Linear)


@pytest.mark.parametrize(
    "spec",
    [
        "os:system",
        "builtins:exec",
        "subprocess:Popen",
        "torch.nn:Identity",
        "torch_evil:build",
        "./../model.py:build",
        "./a/../../model.py:build",
        "../model.py:build",
        "/etc/model.py:build",
        ".//etc/model.py:build",
        "model.py:build",
        "./model.py",
        "./model.py:",
        "./model.py:build()",
        "./model.py:os.system",
        "./model.txt:build",
        "./model.py:b\N{CYRILLIC SMALL LETTER U}ild",
        "\N{ONE DOT LEADER}/model.py:build",
        "t\N{CYRILLIC SMALL LETTER O}rch.nn:Identity",
        "\N{FULLWIDTH LATIN SMALL LETTER O}s:system",
        "./model.py:build\n",
        "os :system",
        "",
        ":",
    ],
)
def test_a_hostile_or_careless_factory_is_refused(tmp_path: Path, spec: str) -> None:
    base = tmp_path / "policy"
    write(tmp_path)
    write(base)
    refusal(spec, base, "torch.nn.modules", "torch_ev")


def test_a_refused_module_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, LINEAR, "adaptd_test_refused.py")
    monkeypatch.syspath_prepend(tmp_path)
    told = refusal("adaptd_test_refused:build", tmp_path, "another")
    assert "may not be imported; list its package in model.allowed_prefixes (now: another)" in told
    assert "adaptd_test_refused" not in sys.modules


def test_an_allowed_module_and_those_below_it_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "", "adaptd_test_zoo/__init__.py")
    write(tmp_path, LINEAR, "adaptd_test_zoo/nets.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(resolve_factory("adaptd_test_zoo.nets:build", tmp_path, ["adaptd_test_zoo"])(), nn.Linear)
    assert "no module is named 'adaptd_test_zoo.gone'" in refusal("adaptd_test_zoo.gone:b", tmp_path, "adaptd_test_zoo")


def test_a_link_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside")
    base = tmp_path / "policy"
    base.mkdir()
    (base / "model.py").symlink_to(outside)
    assert "outside the directory of the policy file" in refusal("./model.py:build", base)


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "model.py").symlink_to(write(tmp_path / "versions" / "3"))
    assert isinstance(resolve_factory("./model.py:build", tmp_path)(), nn.Linear)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no function build in model.py"),
        ("build = 3\n", "build is int; expected a function"),
        (
            "def build(size):\n    return size\n",
            "./model.py:build needs arguments; expected a function that takes none",
        ),
        ("def build():\n    return 3\n", "gave int; expected a torch.nn.Module"),
        ("def build():\n    raise ValueError('too small')\n", "raised ValueError: too small (model.py, line 2)"),
        (
            "from torch import nn\ndef build():\n    return nn.Sequential(\n        nn.Conv2d(3, 4, 2, groups=2))\n",
            "in_channels must be divisible by groups (model.py, line 4)",
        ),
        ("import adaptd_test_absent\n", "no module is named 'adaptd_test_absent'"),
        ("def build(:\n", "model.py raised SyntaxError: "),
        ("1 / 0\n", "model.py raised ZeroDivisionError: division by zero (model.py, line 1)"),
    ],
)
def test_a_factory_that_fails_is_told(tmp_path: Path, text: str, told: str) -> None:
    write(tmp_path, text)
    assert told in refusal("./model.py:build", tmp_path)


@pytest.mark.parametrize("spec", ["../mine/model.py:build", "/etc/model.py:build"])
def test_a_file_that_is_not_beside_the_policy_is_told_to_be_put_there(tmp_path: Path, spec: str) -> None:
    told = refusal(spec, tmp_path)
    assert f"'{spec}' lies outside the directory of the policy file; put the file there, './model.py:build'" in told


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    assert f"there is no file {tmp_path / 'gone.py'}" in refusal("./gone.py:build", tmp_path)


def test_weights_are_loaded(tmp_path: Path) -> None:
    write(tmp_path)
    weights = {"weight": torch.full((3, 4), 2.0), "bias": torch.ones(3)}
    save_file(weights, tmp_path / "w.safetensors")
    model = Model.model_validate(
        {"factory": "./model.py:build", "weights": "w.safetensors", "inputs": {"shape": [4]}},
    )
    built = build_model(model, tmp_path)
    assert torch.equal(built.state_dict()["weight"], weights["weight"])


def test_shared_tensors_and_batch_counters_may_be_left_out_of_a_weights_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    left_out = ("2.weight", "1.num_batches_tracked")
    save_file({k: v for k, v in model.state_dict().items() if k not in left_out}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"weight": torch.zeros(3, 4)}, "bias is not in it; save the weights of the model that"),
        (
            {"net.weight": torch.zeros(3, 4), "net.bias": torch.zeros(3)},
            "bias is not in it, but net.bias is (4 names differ); save the weights of the model",
        ),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "more": torch.zeros(1)}, "the model has no more"),
        ({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, "size mismatch for weight"),
    ],
)
def test_weights_of_another_model_are_told(tmp_path: Path, tensors: dict[str, torch.Tensor], told: str) -> None:
    file = tmp_path / "w.safetensors"
    save_file(tensors, file)
    with pytest.raises(PolicyFileError) as caught:
        load_weights(nn.Linear(4, 3), file)
    assert str(caught.value).startswith(f"model.weights: {file} does not fit the model: {told}")


def test_a_weights_file_that_is_missing_or_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match=r"model\.weights: there is no file .*; check the path"):
        load_weights(nn.Linear(4, 3), tmp_path / "gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors here, and long enough to have a header")
    with pytest.raises(PolicyFileError, match=r"bad\.safetensors is not a .*save_file\(model\.state_dict\(\)"):
        load_weights(nn.Linear(4, 3), tmp_path / "bad.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_of_a_file_that_torch_saved_the_way_to_safetensors_is_told(tmp_path: Path, *, zipped: bool) -> None:
    model = nn.Linear(4, 3)
    torch.save(model.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(PolicyFileError) as caught:
        load_weights(model, tmp_path / "w.pt")
    how = "make one with safetensors.torch.save_file(torch.load('w.pt', weights_only=True), 'model.safetensors')"
    assert str(caught.value).endswith(how)
