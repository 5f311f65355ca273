"""What this installation can do: versions, devices, instruction sets, active kernels, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megapar import __version__
from megapar.ops import dispatch

ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
LIBRARIES = ("numpy", "tokenizers", "safetensors", "rich", "tyro", "matplotlib")
EXTRAS = {
    "gpu": ("triton",),
    "tensorboard": ("tensorboard",),
    "data": ("pyarrow", "zstandard"),
    "dev": ("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "transformers", "triton", "pyarrow", "zstandard"),
}


def doctor() -> str:
    """The report, one fact a line."""
    sections = {
        "megapar": _versions(),
        "machine": _machine(),
        "devices": _devices(),
        "communication": _communication(),
        "kernels": _kernels(),
        "extras": _extras(),
    }
    lines = []
    for title, facts in sections.items():
        lines.append(title)
        lines += [f"   {name:<14} {fact}" for name, fact in facts.items()]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    found = {"megapar": __version__, "python": f"{platform.python_version()} ({sys.executable})", "torch": torch.__version__}
    return found | {name: _version(name) or "missing: pip install megapar again" for name in LIBRARIES}


def _machine() -> dict[str, str]:
    flags = _cpu_flags()
    isa = ", ".join(flag for flag in ISA_FLAGS if flag in flags) or "none that matters here"
    threads = f"{torch.get_num_threads()} in torch, {len(os.sched_getaffinity(0))} cores usable"
    return {"cpu": platform.machine(), "instructions": isa, "threads": threads}


def _devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "the driver or the GPU is missing"
        return {"cpu": "used for everything", "cuda": f"none: {why}"}
    return {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}


def _communication() -> dict[str, str]:
    return {
        "gloo": "available" if dist.is_gloo_available() else "missing from this torch",
        "nccl": "available" if dist.is_nccl_available() else "missing from this torch (needed for GPUs only)",
    }


def _kernels() -> dict[str, str]:
    compiler = shutil.which("c++") or shutil.which("g++")
    reference = "every op, MEGAPAR_BACKEND=reference says so" if dispatch.FORCED == "reference" else "float64 only"
    return {
        "cpu": _cpu_kernels(),
        "reference": f"plain PyTorch: {reference}",
        "gpu": dispatch.MISSING["cuda"] or f"{'CUDA' if dispatch.FORCED == 'cuda' else 'Triton'} (MEGAPAR_BACKEND chooses)",
        "compiler": compiler or "no C++ compiler found: install g++ 12 or newer",
    }


def _cpu_kernels() -> str:
    if dispatch.MISSING["cpu"] is not None:
        return dispatch.MISSING["cpu"]
    try:
        return f"built, {torch.ops.megapar.cpu_isa()} bodies (MEGAPAR_CPU_ISA chooses lower ones)"
    except ValueError as error:
        return str(error)


def _extras() -> dict[str, str]:
    smallest = {name: extra for extra, names in reversed(EXTRAS.items()) for name in names}
    return {name: _version(name) or f"missing: pip install 'megapar[{extra}]'" for name, extra in smallest.items()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    for line in path.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
