"""Every Triton kernel meets the bounds of its op: the op's tests again, in a process in which Triton's interpreter runs them on the CPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from megapar.ops import dispatch

TESTS = Path(__file__).parents[1]
FILES = (
    "ops/test_rms_norm.py",
    "ops/test_layer_norm.py",
    "ops/test_swiglu.py",
    "ops/test_rope.py",
    "ops/test_cross_entropy.py",
    "ops/test_dropout.py",
    "ops/test_linear.py",
    "ops/test_linear_numbers.py",
    "ops/test_linear_bad_input.py",
    "ops/test_grad_norm.py",
    "ops/test_step_state.py",
    "ops/test_adamw.py",
    "ops/test_memory.py",
    "layers/test_linear_cross_entropy.py",
)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """One process a file, two at a time."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "MEGAPAR_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    environment.pop("MEGAPAR_TEST_DEVICE", None)

    def run(file: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-W", "ignore", str(TESTS / file)]
        return subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300, check=False)

    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.skipif(dispatch.INTERPRETED or dispatch.FORCED is not None, reason="starts a process with other bodies than this one's")
@pytest.mark.parametrize("file", FILES)
def test_tests_pass(file, outcomes):
    done = outcomes[file].result()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
