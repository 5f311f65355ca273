"""The rate of products from registers, which no GEMM can pass: benchmarks/peak.cpp, compiled for this processor when it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peak:
    """GFLOP/s of all threads together."""

    fp32: float
    bf16: float


def measure_peak(threads: int) -> Peak:
    """Raises RuntimeError, which says why, where it cannot be measured."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/peak"
        source = Path(__file__).with_suffix(".cpp")
        command = [compiler, "-std=c++17", "-O2", "-march=native", "-pthread", str(source), "-o", program]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise RuntimeError(f"peak.cpp does not compile: {built.stderr.strip().splitlines()[-1]}")
        done = subprocess.run([program, str(threads)], capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            raise RuntimeError(f"peak.cpp ended with code {done.returncode}")
    return Peak(*map(float, done.stdout.split()))
