import os
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, while it is imported: without a GPU its kernels run in the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

from kernels import pytorch, reference, triton_ops


@pytest.fixture(params=[reference, pytorch, triton_ops], ids=["reference", "pytorch", "triton"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture
def device(kernels: ModuleType) -> str:
    return "cuda" if kernels is triton_ops and torch.cuda.is_available() else "cpu"
