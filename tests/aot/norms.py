"""What the tests of RMSNorm's and LayerNorm's kernels as compiled share, as the kernels do.

Compiled: every kernel at every tile in every dtype of rows and weight, with and without each of what may be left out; and one of rows of an
odd number of elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import compress, product

import torch
from torch import Tensor

from tests.aot.common import Call, assert_lean, compiled, meta

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32))
"""Of rows and weight."""
ODD = "bfloat16-4097-odd"
TILES = (256, 1024, 2048, 4096, 8192, 16384, 32768)
"""Widths, one for each tile; the backward of the last two is in two parts, the forward of the last walks its row."""


def calls(run: Callable[..., None], *optional: str) -> dict[str, Call]:
    """run(t, h, x's dtype, weight's dtype, *given): `given` says of each of `optional` whether it is there."""
    listed: dict[str, Call] = {}
    for (x, weight), h in product(DTYPES, TILES):
        for given in product((True, False), repeat=len(optional)):
            name = "-".join([_name(x), str(h), *([] if weight == x else ["fp32_weight"]), *compress(optional, given)])
            listed[name] = partial(run, 64, h, x, weight, *given)
    return listed | {ODD: partial(run, 64, 4097, BF16, BF16, *(True for _ in optional))}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(kernel_calls: dict[str, Call], call: Call, arch: int) -> None:
    """0 spills; where rows are whole vectors, the only narrow accesses are those of statistics and of sums of columns."""
    odd = call is kernel_calls[ODD]
    for kernel in compiled(call, arch):
        assert_lean(kernel)
        assert kernel.occupancy() >= 0.25, f"{kernel.name} for sm_{arch}: {kernel.registers} registers"
        if kernel.name != "sum_partials_kernel" and not odd:
            wide = kernel.count(r"LDG.*\.128"), kernel.count(r"STG.*\.128")
            narrow = kernel.count("LDG") - wide[0], kernel.count("STG") - wide[1]
            # Mean and rstd, of two rows a thread in the tile of 256 columns, which also leaves 128 threads with two of the weight and sums.
            assert min(wide) >= 1 and narrow[0] <= 5 and narrow[1] <= 2, f"{kernel.name} for sm_{arch}: {kernel.instructions}"


def tensors(t: int, h: int, x: torch.dtype, weight: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, and a statistic."""
    return meta(t, h, dtype=x), meta(h, dtype=weight), meta(t, dtype=FP32)
