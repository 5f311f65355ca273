"""Every Triton kernel meets the bounds of its op: the op's tests again, in a process in which Triton's interpreter runs them on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megapar.ops import dispatch

HERE = Path(__file__).parent
FILES = (
    "rms_norm",
    "layer_norm",
    "swiglu",
    "rope",
    "cross_entropy",
    "dropout",
    "linear",
    "linear_numbers",
    "linear_bad_input",
    "grad_norm",
    "step_state",
    "adamw",
    "memory",
)
PATHS = [*(HERE / f"test_{file}.py" for file in FILES), HERE.parent / "layers" / "test_linear_cross_entropy.py"]


@pytest.mark.skipif(dispatch.INTERPRETED or dispatch.FORCED is not None, reason="starts a process with other bodies than this one's")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_tests_pass(path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "MEGAPAR_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    environment.pop("MEGAPAR_TEST_DEVICE", None)
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(path)]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
