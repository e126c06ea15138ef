import json
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.conftest import NEEDS_TRITON


@NEEDS_TRITON
def test_every_triton_kernel_compiles_and_lerp_reads_as_wide_as_a_thread_can(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    done = subprocess.run(
        program,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loads = json.loads(done.stdout)
    assert len(loads) == 4
    assert all("ld.global.v4.b32" in found for found in loads.values())
