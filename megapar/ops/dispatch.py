"""Which body of an op runs: the kernel for the tensor's device, or the plain PyTorch reference.

    MEGAPAR_BACKEND   CPU tensors            CUDA tensors
    (unset)           compiled C++           Triton
    cpu               compiled C++           raises
    triton            raises, see below      Triton
    cuda              raises                 compiled CUDA; ops that have no such body raise
    reference         plain PyTorch          plain PyTorch

float64, which no kernel knows, is always the reference's. Where there is no body an op raises and says how to get one: a slower one is
never taken silently. With TRITON_INTERPRET=1 and MEGAPAR_BACKEND=triton, Triton's interpreter runs the kernels on CPU tensors: for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megapar.ops import schema

BACKENDS = ("reference", "cpu", "triton", "cuda")
BUILD = "pip install --no-build-isolation -e ."
CUDA_OPS = ("adamw_", "grad_norm_", "step_state_")
"""The ops that have a body in csrc/cuda."""


def _load(module: str, what: str, needs: str) -> str | None:
    """Imports compiled kernels, which registers them with torch; why there are none, if so."""
    if importlib.util.find_spec(module) is None:
        return f"the {what} kernels are not built: install {needs} and run {BUILD}, or set MEGAPAR_BACKEND=reference"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"the {what} kernels were built for another torch ({error}): run {BUILD} again, or set MEGAPAR_BACKEND=reference"
    return None


def _forced() -> str | None:
    asked = os.environ.get("MEGAPAR_BACKEND") or None
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"MEGAPAR_BACKEND={asked} must be one of {', '.join(BACKENDS)}: correct it or unset it")
    return asked


def _later(op: str, module: str) -> Callable[..., Any]:
    """A body that is imported when it is first called: importing triton takes longer than the rest of megapar."""

    def body(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), op)(*args, **options)

    return body


def _no_body(op: str) -> Callable[..., Any]:
    def body(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(
            f"megapar::{op} has no CUDA body, MEGAPAR_BACKEND=cuda has {', '.join(CUDA_OPS)} alone: unset it, and the op is Triton's"
        )

    return body


def _cpu_only(op: str) -> Callable[..., Any]:
    def body(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"megapar::{op} is compiled for CPUs alone: use torch.nn.functional.scaled_dot_product_attention here")

    return body


def _register(forced: str | None, interpreted: bool) -> dict[str, str | None]:
    """Registers every body that this process may run; for each device why its tensors have none, or None."""
    no_gpu = f"MEGAPAR_BACKEND={forced} has no kernels for cuda: unset it"
    no_cpu = f"MEGAPAR_BACKEND={forced} has no kernels for cpu: unset it, or use tensors on a GPU"
    why: dict[str, str | None] = {"meta": None, "cpu": no_cpu, "cuda": no_gpu}
    if forced in (None, "cpu"):
        why["cpu"] = _load("megapar._C", "CPU", "g++ 12 or newer")
    if forced in (None, "triton"):
        missing = None if importlib.util.find_spec("triton") else "Triton is not installed: pip install 'megapar[gpu]'"
        device = "cpu" if forced and interpreted else "cuda"
        why[device] = missing
        for op, file in schema.FILES.items():
            schema.LIBRARY.impl(op, _later(op, f"megapar.ops.triton.{file}"), device.upper())
    for op in schema.CPU_ONLY:
        for key in ("CUDA",) if forced in (None, "cpu") else ("CUDA", "CPU"):
            schema.LIBRARY.impl(op, _cpu_only(op), key)
    if forced == "cuda":
        why["cuda"] = _load("megapar._CUDA", "CUDA", "the CUDA toolkit of this torch")
        for op in schema.FILES:
            schema.LIBRARY.impl(op, _later(op, "megapar.ops.cuda") if op in CUDA_OPS else _no_body(op), "CUDA")
    return why


FORCED = _forced()
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
MISSING = _register(FORCED, INTERPRETED)
"""For each device why its tensors have no kernels; None where they have."""


def use_reference(x: Tensor) -> bool:
    """Whether an op on `x` is the reference's. Raises RuntimeError where neither it nor a kernel may run."""
    return x.dtype == torch.float64 or use_reference_on(x.device.type)


def use_reference_on(device: str) -> bool:
    """The same for an op whose float64 arguments are numbers of its own, and not what it is computed in."""
    if FORCED == "reference":
        return True
    if device not in MISSING:
        raise RuntimeError(f"megapar's ops have no kernels for {device}: set MEGAPAR_BACKEND=reference to compute with plain PyTorch")
    why = MISSING[device]
    if why is not None:
        raise RuntimeError(why)
    return False
