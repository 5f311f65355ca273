"""What the tests of RMSNorm's and LayerNorm's kernels as compiled share, as the kernels do.

Compiled: every kernel at every tile in every dtype, with a residual, which is the most that it holds, and in bf16 with all that may be left
out; and at one tile of each kernel with an fp32 weight, and rows of an odd number of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megapar.ops.triton.launch import Launch
from tests.aot.common import Call, assert_lean, compiled, config, launches, meta

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TILES = (256, 1024, 2048, 4096, 8192, 16384, 32768)
"""Widths, one for each tile; the backward of the last two is in two parts, the forward of the last walks its row."""


def calls(run: Callable[..., None]) -> dict[str, Call]:
    """run(t, h, x's dtype, weight's dtype, plain): `plain` leaves out whatever may be."""
    listed = {f"{str(x)[6:]}-{h}": lambda x=x, h=h: run(64, h, x, x, False) for x in (BF16, FP16, FP32) for h in TILES}
    for h in (4096, 32768):
        listed |= {f"{str(x)[6:]}-{h}-fp32-weight": lambda x=x, h=h: run(64, h, x, FP32, False) for x in (BF16, FP16)}
    listed |= {f"bfloat16-{h}-plain": lambda h=h: run(64, h, BF16, BF16, True) for h in TILES}
    return listed | {"bfloat16-4097-odd": lambda: run(64, 4097, BF16, BF16, False)}


def check(kernel_calls: dict[str, Call], call: Call, arch: int) -> None:
    """0 spills; where rows are whole vectors, the only narrow accesses are those of statistics and of sums of columns."""
    odd = call is kernel_calls["bfloat16-4097-odd"]
    for kernel in compiled(call, arch):
        assert_lean(kernel)
        assert kernel.occupancy() >= 0.25, f"{kernel.name} for sm_{arch}: {kernel.registers} registers"
        if kernel.name != "sum_partials_kernel" and not odd:
            wide = kernel.count(r"LDG.*\.128"), kernel.count(r"STG.*\.128")
            narrow = kernel.count("LDG") - wide[0], kernel.count("STG") - wide[1]
            # Mean and rstd, of two rows a thread in the tile of 256 columns, which also leaves 128 threads with two of the weight and sums.
            assert min(wide) >= 1 and narrow[0] <= 5 and narrow[1] <= 2, f"{kernel.name} for sm_{arch}: {kernel.instructions}"


def aspects(launch: Launch) -> list[tuple[Any, ...]]:
    """What has to have been compiled: the kernel with its dtype and tile; with its weight's dtype; with what is left out."""
    name, types, options = config(launch)
    by_name = dict(zip(launch.kernel.arg_names, types, strict=False))
    weight = by_name.get("weight", by_name.get("dw"))
    left_out = tuple(key for key, value in by_name.items() if value == "NoneType")
    return [(name, types[0], options), (name, types[0], weight), (name, left_out)]


def assert_covered(call: Call, listed: dict[str, Call]) -> None:
    known = {aspect for other in listed.values() for launch in launches(other, 80) for aspect in aspects(launch)}
    for launch in launches(call, 80):
        for aspect in aspects(launch):
            assert aspect in known, f"not compiled by any test: {aspect}"


def tensors(t: int, h: int, x: torch.dtype, weight: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, and a statistic."""
    return meta(t, h, dtype=x), meta(h, dtype=weight), meta(t, dtype=FP32)
