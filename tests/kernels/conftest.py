import importlib
import os
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, while it is imported: without a GPU its kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(
    params=["kernels.reference", "kernels.pytorch", pytest.param("kernels.triton_ops", marks=NEEDS_TRITON)],
    ids=["reference", "pytorch", "triton"],
)
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


@pytest.fixture
def device(kernels: ModuleType) -> str:
    return "cuda" if kernels.__name__ == "kernels.triton_ops" and torch.cuda.is_available() else "cpu"
