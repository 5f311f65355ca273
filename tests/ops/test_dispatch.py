"""Which body runs, and what is said where none can."""

import importlib
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

from megapar import ops
from megapar.ops import dispatch, schema


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=60)


def test_reference_for_float64_and_where_asked(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", None)
    assert dispatch.use_reference(torch.zeros(1, dtype=torch.float64))
    assert not dispatch.use_reference(torch.zeros(1))
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    assert dispatch.use_reference(torch.zeros(1))


def test_no_kernels(monkeypatch):
    """Nothing slower is taken silently."""
    monkeypatch.setattr(dispatch, "FORCED", None)
    monkeypatch.setattr(dispatch, "MISSING", {"cpu": "the CPU kernels are not built: do this", "cuda": None})
    with pytest.raises(RuntimeError, match="the CPU kernels are not built: do this"):
        dispatch.use_reference(torch.zeros(1, device="cpu"))
    assert not dispatch.use_reference_on("cuda")
    with pytest.raises(RuntimeError, match="no kernels for mps: set MEGAPAR_BACKEND=reference"):
        dispatch.use_reference_on("mps")
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    assert dispatch.use_reference(torch.zeros(1))


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cuda"), ("triton", "cpu"), ("cuda", "cpu")])
def test_a_backend_has_no_kernels_for_the_other_device(backend, device):
    told = in_process(
        f"from megapar.ops import dispatch; dispatch.use_reference_on('{device}')", MEGAPAR_BACKEND=backend, TRITON_INTERPRET="0"
    ).stderr
    assert f"MEGAPAR_BACKEND={backend} has no kernels for {device}: unset it" in told


def test_bodies_of_a_gpu():
    """Triton has every op but attention, and is imported at the first call. csrc/cuda has three, and the others say so."""
    code = """
import sys, torch
from megapar.ops import dispatch, schema
has = [torch._C._dispatch_has_kernel_for_dispatch_key(f"megapar::{op}", "CUDA") for op in schema.FILES]
print(all(has), len(has) == len(schema.SCHEMAS) - 1 - len(schema.CPU_ONLY), "megapar.ops.triton" in sys.modules, dispatch.MISSING["cuda"])
"""
    assert in_process(code, MEGAPAR_BACKEND="").stdout == "True True False None\n"
    code = "from megapar.ops.attention import attention; import torch; attention(*torch.zeros(3, 1, 1, 2, 4))"
    told = in_process(code, MEGAPAR_BACKEND="triton", TRITON_INTERPRET="1").stderr
    assert "megapar::attention is compiled for CPUs alone: use torch.nn.functional.scaled_dot_product_attention here" in told
    code = "from megapar.ops import dispatch; dispatch._no_body('swiglu')(1)"
    told = in_process(code, MEGAPAR_BACKEND="cuda").stderr
    assert "megapar::swiglu has no CUDA body, MEGAPAR_BACKEND=cuda has adamw_, grad_norm_, step_state_ alone: unset it" in told


def test_kernels_of_another_torch(monkeypatch):
    def fails(name: str) -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(dispatch.importlib, "import_module", fails)
    told = dispatch._load("megapar._C", "CPU", "g++")
    assert told is not None and "built for another torch (undefined symbol: x)" in told and dispatch.BUILD in told


def test_environment_is_checked():
    told = in_process("import megapar", MEGAPAR_BACKEND="fast").stderr
    assert "MEGAPAR_BACKEND=fast must be one of reference, cpu, triton, cuda: correct it or unset it" in told
    code = "import torch; from megapar.ops.swiglu import swiglu; swiglu(torch.zeros(1, 2))"
    told = in_process(code, MEGAPAR_CPU_ISA="sse9", MEGAPAR_BACKEND="").stderr
    assert "ValueError: MEGAPAR_CPU_ISA=sse9 must be one of portable, avx2, avx512, avx512_bf16, amx" in told
    best = in_process("import megapar, torch; print(torch.ops.megapar.cpu_isa())", MEGAPAR_CPU_ISA="").stdout.strip()
    if best != "amx":
        told = in_process(code, MEGAPAR_CPU_ISA="amx", MEGAPAR_BACKEND="").stderr
        assert f"MEGAPAR_CPU_ISA=amx names instructions that this processor lacks, its best are {best}: unset it" in told


def test_every_op_has_a_body_and_a_fake():
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"megapar.ops.{module.name}")
    for name in schema.SCHEMAS:
        if name == "cpu_isa":
            continue
        keys = {key: torch._C._dispatch_has_kernel_for_dispatch_key(f"megapar::{name}", key) for key in ("CPU", "Meta")}
        fake = torch._library.simple_registry.singleton.find(f"megapar::{name}").fake_impl.kernel is not None
        assert keys["CPU"] and (keys["Meta"] or fake), name
