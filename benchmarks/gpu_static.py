"""What the Triton kernels are, compiled for GPUs that need not be there: read from the binaries, and computed; nothing here is a time.

    python -m benchmarks.gpu_static

registers, shared   of a thread; of a program, bytes
occupancy           the share of a multiprocessor's warps that registers and shared memory leave room for
128-bit             loads and stores of global memory of 128 bits, of all of them (the rest: tables, scalars, gains of a row)
tensor cores        the matrix instructions of a GEMM: HMMA (sm_75, sm_80), HGMMA (sm_90), UTCHMMA (sm_100)
floor               bytes that the formula must move, FLOPs that it must compute
moved / floor       bytes loaded and stored at small sizes, each as often as it is, counted by the interpreter; what a GPU's cache saves of
                    them it does not know (of a GEMM's tiles most, of a norm's gain all)
A100, H100          the roofline's time, the larger of floor / bandwidth and FLOPs / peak: computed, not measured; no kernel has run

Datasheets: A100 SXM 80 GB 2,039 GB/s and 312 TFLOP/s of bf16; H100 SXM 3,350 GB/s and 989 TFLOP/s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import tyro

from benchmarks.common import Grid, report
from benchmarks.gpu_cases import Case, Sizes, all_cases
from megapar.ops.triton.ahead_of_time import Compiled, compile_launch
from megapar.ops.triton.launch import A100, H100, recording

DATASHEETS = {"A100": (2.039e12, 312e12), "H100": (3.35e12, 989e12)}
"""Bytes a second, bf16 FLOPs a second."""
TARGETS = {80: A100, 90: H100}


def kernels(case: Case, arch: int) -> list[Compiled]:
    """One for each launch of megapar's way, at the case's sizes."""
    inputs = case.make("meta")
    with recording(TARGETS[arch]) as launches:
        case.ours(inputs)
    return [compile_launch(launch, arch) for launch in launches]


def moved() -> dict[str, float]:
    """By title of the case, from a process in which the interpreter runs the kernels."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "MEGAPAR_BACKEND": "triton"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.watched"]
    told: dict[str, float] = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return told


def roofline(case: Case, datasheet: str) -> float:
    """Seconds that no kernel can be below."""
    bandwidth, peak = DATASHEETS[datasheet]
    return max(case.bytes / bandwidth, case.flops / peak)


def _row(title: str, kernel: Compiled) -> list[str]:
    accesses, wide = kernel.count("LDG|STG|LDGSTS"), kernel.count(r"(LDG|STG|LDGSTS)\.E\S*\.128")
    matrix = kernel.count("HMMA|HGMMA|UTCHMMA")
    return [
        title,
        kernel.name,
        str(kernel.registers),
        str(kernel.spills + kernel.local),
        f"{kernel.shared:,}",
        f"{kernel.occupancy():.0%}",
        f"{wide} / {accesses}",
        str(matrix or "-"),
    ]


def main(small: bool = False) -> None:
    """Compiles, prints, writes results/gpu_static.json.

    Args:
        small: few and small tensors, for a test.
    """
    sizes = Sizes(t=64, h=64, f=128, v=256, q_heads=4, kv_heads=2, tensors=2, numel=4096) if small else Sizes()
    cases, grids = all_cases(sizes), list[Grid]()
    ratios = moved()
    samples: dict[str, Any] = {"moved": ratios}
    for arch in TARGETS:
        rows = []
        for case in cases:
            found = kernels(case, arch)
            rows += [_row(case.title if i == 0 else "", kernel) for i, kernel in enumerate(found)]
            samples[f"{case.title}, sm_{arch}"] = [vars(kernel) | {"instructions": dict(kernel.instructions)} for kernel in found]
        columns = ["", "kernel", "registers", "spills", "shared", "occupancy", "128-bit", "tensor cores"]
        grids.append(Grid(f"Read from the binary, sm_{arch}", columns, rows))
    times = []
    for case in cases:
        microseconds = (f"{roofline(case, datasheet) * 1e6:,.1f}" for datasheet in DATASHEETS)
        ratio = f"{ratios[case.title]:.2f}" if case.bytes else "-"
        times.append([case.title, f"{case.bytes / 1e6:,.0f} MB", ratio, f"{case.flops / 1e9:,.0f} G", *microseconds])
    columns = ["", "floor", "moved / floor", "FLOPs", *(f"{name}, µs" for name in DATASHEETS)]
    grids.append(Grid(f"Computed, not measured: roofline at {sizes}", columns, times))
    report("gpu_static", grids, [], {"a measured time": "no GPU has run these kernels: make gpu-check on one that has"}, samples)


if __name__ == "__main__":
    tyro.cli(main)
