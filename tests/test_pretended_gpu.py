"""What the pretended GPU refuses, and a file of tests that passes on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
START = "import torch, tests.pretended_gpu as gpu; gpu.pretend('cuda'); x = torch.ones(3); assert x.is_cuda and not x.cpu().is_cuda; "


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("x + torch.ones(3, device='cpu')", "expected all tensors to be on the same device"),
        ("torch.randn(3, generator=torch.Generator())", "expected a cuda device type for generator"),
        ("x.numpy()", "copy it to host memory first"),
        ("(2 * x)[0].pin_memory()", "only dense CPU tensors can be pinned"),
    ],
)
def test_refusals(code, told):
    done = subprocess.run([sys.executable, "-c", START + code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and told in done.stderr, done.stderr


@pytest.mark.skipif(any(os.environ.get(f"MEGAPAR_{x}") for x in ("BACKEND", "TEST_DEVICE")), reason="starts a process of its own")
def test_a_file():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "tests.pretended_gpu"]
    command.append("tests/ops/test_multi_tensor.py")
    environment = os.environ | {"MEGAPAR_TEST_DEVICE": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
