from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from engine.errors import PolicyFileError
from engine.host import Inputs, ModelHost, choose_device, clone, trainable
from tests.engine.cores import CLASSES, FEATURES, tiny_model

CPU = torch.device("cpu")
FLAT = Inputs((FEATURES,), np.dtype("<f4"))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_rows_of_any_type_become_scaled_floats(dtype: str) -> None:
    values = np.array([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    inputs = Inputs((3,), values.dtype.newbyteorder("<"), scale=0.5, offset=1.0)
    stacked = inputs.stack([row.tobytes() for row in values], CPU)
    assert stacked.dtype == torch.float32
    assert torch.equal(stacked, torch.tensor([[1.5, 2.0, 2.5], [3.0, 3.5, 4.0]]))


def test_whole_numbers_stay_as_they_are_where_nothing_is_scaled() -> None:
    values = np.array([[7, 2**62]], dtype="<i8")
    stacked = Inputs((2,), values.dtype).stack([values.tobytes()], CPU)
    assert stacked.dtype == torch.int64
    assert stacked.tolist() == values.tolist()


def test_channels_come_first_for_the_model_and_last_in_records() -> None:
    inputs = Inputs((3, 2, 4), np.dtype("uint8"), channels_last=True)
    assert inputs.record_shape == (2, 4, 3)
    row = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    stacked = inputs.stack([row.tobytes()], CPU)
    assert stacked.shape == (1, 3, 2, 4)
    assert stacked.is_contiguous()
    assert np.array_equal(stacked[0].numpy(), row.transpose(2, 0, 1).astype(np.float32))


def test_stacked_rows_share_nothing_with_the_bytes_they_came_from() -> None:
    raw = np.ones(FEATURES, dtype="<f4")
    data = raw.tobytes()
    FLAT.stack([data], CPU).mul_(7)
    assert data == raw.tobytes()


def test_the_copies_of_a_host_share_nothing() -> None:
    host = ModelHost(tiny_model(), FLAT, CPU)
    before = clone(host.source.state_dict())
    for model in (host.live, host.learner, host.scratch):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    for weights in (host.source.state_dict(), host.release):
        assert all(torch.equal(weights[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in host.source.parameters())
    assert all(parameter.requires_grad for parameter in host.live.parameters())
    assert not any(model.training for model in (host.source, host.live, host.learner, host.scratch))
    assert host.num_classes == CLASSES


def test_prediction_in_chunks_is_prediction() -> None:
    host = ModelHost(tiny_model(), FLAT, CPU)
    x = torch.randn(70, FEATURES)
    expected = host.source(x).argmax(1)
    assert torch.equal(host.predict(host.source, x, chunk=16), expected)
    assert host.predict(host.source, x[:0]).shape == (0,)


def test_other_weights_are_tried_without_touching_the_models_that_serve() -> None:
    host = ModelHost(tiny_model(), FLAT, CPU)
    x = torch.randn(50, FEATURES)
    other = clone(tiny_model(seed=5).state_dict())
    live = clone(host.live.state_dict())
    expected = tiny_model(seed=5).eval()(x).argmax(1)
    assert torch.equal(host.predict_with(other, x), expected)
    assert torch.equal(host.predict_with(host.release, x), host.predict(host.source, x))
    assert all(torch.equal(host.live.state_dict()[name], live[name]) for name in live)


class Gives(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(2, 3), r"\(2, 3\)"),
        (torch.zeros(1, 3, 4), r"\(1, 3, 4\)"),
        ({"logits": torch.zeros(1, 3)}, "dict"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused(result: object, found: str) -> None:
    with pytest.raises(PolicyFileError, match=rf"model\.factory: the model must give logits .* it gave {found}"):
        ModelHost(Gives(result), FLAT, CPU)


def test_a_model_with_a_single_output_is_refused_since_it_would_be_certain_of_everything() -> None:
    with pytest.raises(PolicyFileError, match=r"model\.factory: the model gives 1 output; give two logits or more"):
        ModelHost(nn.Linear(FEATURES, 1), FLAT, CPU)


@pytest.mark.parametrize(("last", "warned"), [(nn.Softmax(1), True), (nn.LogSoftmax(1), False), (nn.ReLU(), False)])
def test_a_model_that_ends_in_a_softmax_is_warned_of(last: nn.Module, *, warned: bool) -> None:
    with capture_logs() as logs:
        ModelHost(nn.Sequential(tiny_model(), last), FLAT, CPU)
    assert [entry["event"] for entry in logs] == ["probabilities_for_logits"] * warned


def test_a_model_that_cannot_take_the_inputs_is_refused() -> None:
    with pytest.raises(PolicyFileError, match=r"model\.inputs: the model cannot take a row of shape \[5\]: .*mat1"):
        ModelHost(tiny_model(), Inputs((5,), np.dtype("<f4")), CPU)


def test_a_model_is_tried_with_the_type_that_it_will_be_given() -> None:
    words = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 3))
    assert ModelHost(words, Inputs((2,), np.dtype("<i8")), CPU).num_classes == 3
    shifted = Inputs((FEATURES,), np.dtype("<i8"), offset=1.0)
    assert ModelHost(tiny_model(), shifted, CPU).num_classes == CLASSES


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(PolicyFileError, match=r"model\.device: cuda:99 is not on this machine"):
        choose_device("cuda:99")


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["."], [], ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        ([r"^1\."], [], ["1.weight", "1.bias"]),
        (["weight", r"^3"], [r"^0"], ["1.weight", "3.weight", "3.bias"]),
        (["nothing"], [], []),
    ],
)
def test_parameters_are_chosen_by_pattern(include: Sequence[str], exclude: Sequence[str], expected: list[str]) -> None:
    assert trainable(tiny_model(), include, exclude) == expected
