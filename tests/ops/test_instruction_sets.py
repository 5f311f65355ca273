"""Every body of the memory-bound kernels meets the bounds: their tests again, where MEGAPAR_CPU_ISA allows fewer instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapar.ops import dispatch

HERE = Path(__file__).parent
OPS = ("rms_norm", "layer_norm", "swiglu", "rope", "cross_entropy", "dropout", "attention")
NUMBERS = "against_fp64 or wide or large or range or denormals or exp or every_gate or is_its_reference or not_finite"
BODIES = ("portable", "avx2", "avx512")


@pytest.mark.parametrize("isa", BODIES)
def test_tests_pass(isa):
    """The best body is what all other tests run, if this processor has it."""
    assert dispatch.MISSING["cpu"] is None
    best = torch.ops.megapar.cpu_isa()
    if best.startswith(isa):
        pytest.skip(f"{best} is what the tests ran already")
    environment = os.environ | {"MEGAPAR_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    files = [str(HERE / f"test_{op}.py") for op in OPS]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", NUMBERS, *files]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300, check=False)
    if "names instructions that this processor lacks" in done.stdout:
        pytest.skip(f"this processor has {best}")
    assert done.returncode == 0, done.stdout[-3000:]
