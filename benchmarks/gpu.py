"""Every op on a GPU, against torch (its GEMMs are cuBLAS's), torch.compile, apex, Transformer Engine and Liger where they are installed.

    python -m benchmarks.gpu

One process. A repeat runs all contenders of a case, in an order that rotates, each between two events on the stream; the cache is written
over before each. Before timing, what the ways return is compared; optimizer ops return nothing, and tests/gpu checks them. A time is of the
device, or of the host where that takes longer to launch than the cache to be written over: so it is for few and small tensors.

µs          median of the repeats
GB/s        the least bytes that the op must move (benchmarks/gpu_cases.py) over the median
of copy     that, over the bandwidth of copying 1 GiB, measured in the same run
TFLOP/s     the GEMM's FLOPs over the median
x NAME      the peer's time over megapar's, median of the ratios within a repeat
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.common import Grid, report
from benchmarks.gpu_cases import Case, Inputs, Sizes, Way, all_cases
from benchmarks.gpu_peers import compiled, installed

OURS, COPY = "megapar", "copy"
AGREE = 2.0**-5
"""Of the largest number: eager bf16 rounds several times, 2^-8 at most each."""
SMALL = Sizes(t=64, h=64, f=128, v=256, q_heads=4, kv_heads=2, tensors=2, numel=4096)


class Timer:
    """Seconds of a call on the device, which starts with a cold cache."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.cache = torch.empty((256 << 20) if self.cuda else 1, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        self.cache.zero_()
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3


def copy_bandwidth(timer: Timer, device: str, repeats: int) -> float:
    """Bytes a second, read and written."""
    n = (1 << 30) if timer.cuda else 1 << 20
    a, b = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * n / sorted(timer(lambda: b.copy_(a)) for _ in range(repeats))[repeats // 2]


def difference(ours: Any, theirs: Any) -> float:
    """Largest, of the largest number; 0 where a way returns nothing to compare."""
    if theirs is None or ours is None:
        return 0.0
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)) for a, b in pairs)


def measure(case: Case, others: dict[str, Way], device: str, timer: Timer, repeats: int) -> tuple[list[str], Tensor, dict[str, str]]:
    """Names, seconds [repeats, contenders], and why a peer that failed did. Raises AssertionError where one computes something else."""
    inputs = case.make(device)
    ways, failed = {OURS: case.ours}, dict[str, str]()
    wanted = case.ours(inputs)
    for name, way in others.items():
        try:
            error = difference(wanted, way(inputs))
        except Exception as why:  # a peer of another version than this was written for: it is named
            failed[f"{name}, {case.title}"] = f"{type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}"
            continue
        assert error <= AGREE, f"{case.title}: {name} differs from megapar by {error:.1e} of the largest number"
        ways[name] = way
    seconds = torch.zeros(repeats, len(ways), dtype=torch.float64)
    listed = list(ways.values())
    for repeat in range(-2, repeats):
        for i in range(len(listed)):
            at = (i + repeat) % len(listed)
            took = timer(lambda way=listed[at]: way(inputs))
            if repeat >= 0:
                seconds[repeat, at] = took
    return list(ways), seconds, failed


def row(case: Case, names: list[str], seconds: Tensor, bandwidth: float, columns: list[str]) -> list[str]:
    median = float(seconds[:, 0].median())
    moved = case.bytes / median
    cells = [case.title, f"{median * 1e6:,.1f}", f"{moved / 1e9:,.0f}", f"{moved / bandwidth:.2f}"]
    cells.append(f"{case.flops / median / 1e12:,.1f}" if case.flops else "-")
    for name in columns:
        times = float((seconds[:, names.index(name)] / seconds[:, 0]).median()) if name in names else None
        cells.append("-" if times is None else f"{times:.2f}")
    return cells


def inputs_fit(case: Case, device: str) -> bool:
    """Whether the case's inputs and results leave half of the GPU's memory free."""
    return device == "cpu" or 2 * case.bytes < torch.cuda.mem_get_info()[0]


def main(repeats: int = 15, device: str = "cuda", minutes: float = 6.0, compile: bool = True) -> None:
    """Measures, prints, writes results/gpu.json.

    Args:
        repeats: measurements of each contender, at least 7.
        device: cuda; cpu runs tiny cases, to test this file.
        minutes: cases that would begin later are left out and named.
        compile: torch.compile as a peer.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here that this torch can use: python -m benchmarks.gpu_static needs none")
    torch.set_default_device(device)
    end, timer = time.monotonic() + 60 * minutes, Timer(device)
    packages, missing = installed() if device == "cuda" else ({}, {})
    bandwidth = copy_bandwidth(timer, device, max(repeats, 7))
    found: list[tuple[Case, list[str], Tensor]] = []
    for case in all_cases(Sizes() if device == "cuda" else SMALL):
        if time.monotonic() > end or not inputs_fit(case, device):
            missing[case.title] = "the time given was over" if time.monotonic() > end else "it does not fit in this GPU's memory"
            continue
        others = case.peers | packages.get(case.title, {}) | (compiled(case) if compile else {})
        names, seconds, failed = measure(case, others, device, timer, repeats)
        missing |= failed
        found.append((case, names, seconds))
        torch._dynamo.reset()
    columns = sorted({name for _, names, _ in found for name in names[1:]})
    rows = [row(case, names, seconds, bandwidth, columns) for case, names, seconds in found]
    what = torch.cuda.get_device_name() if device == "cuda" else "cpu, tiny: a test of this benchmark"
    grid = Grid(f"{what}; copy {bandwidth / 1e9:,.0f} GB/s", ["", "µs", "GB/s", "of copy", "TFLOP/s", *(f"x {c}" for c in columns)], rows)
    samples: dict[str, Inputs] = {case.title: {"names": names, "seconds": seconds.tolist()} for case, names, seconds in found}
    report("gpu" if device == "cuda" else "gpu_test", [grid], [], missing, samples | {"copy": {"bytes a second": bandwidth}})


if __name__ == "__main__":
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    sys.exit(tyro.cli(main))
