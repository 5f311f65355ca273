"""db = beta db + sum over the rows of dy, in fp32 and in an order that no device changes. Moves t n elements.

In two stages of one kernel: a program sums CHUNK rows of BLOCK_N columns; where there is more than one chunk, the fp32 sums of the chunks
are rows again, and one program sums them all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_apart, check_float, check_target
from megapar.ops.triton.floats import load, store
from megapar.ops.triton.launch import ceil_div, launch
from megapar.ops.triton.rows import rows, stride

CHUNK, BLOCK_M, BLOCK_N, NUM_WARPS = 512, 32, 128, 4
"""32 x 128 numbers are 32 a thread: of 16-bit ones four 16-byte loads in flight. 8192 x 4096 has 512 programs."""


@triton.jit(do_not_specialize=["t", "chunk"])
def linear_bias_grad_kernel(  # type: ignore[no-untyped-def]
    dy, target, t, n, dy_stride, chunk, beta, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Row i of target becomes the sum of rows i chunk to (i + 1) chunk of dy [t, n]. ACCUMULATE: beta is not 0.

    Chunks are the first dimension of the grid: a second one may not pass 65535.
    """
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, place = tl.program_id(0) * chunk, tl.arange(0, BLOCK_M)
    last = min(first + chunk, t)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + place
        total += load(dy + row.to(tl.int64)[:, None] * dy_stride + column[None, :], (row[:, None] < last) & (column[None, :] < n))
    result = tl.sum(total, 0)
    target += tl.program_id(0).to(tl.int64) * n + column
    if ACCUMULATE:
        result += beta * load(target, column < n)
    store(target, result, column < n)


def linear_bias_grad_(target: Tensor, dy: Tensor, beta: float) -> None:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/linear.py."""
    check_float(dy, "dy")
    x = rows(dy)
    t, n = x.shape
    check_target(target, dy, [n])
    check_apart(target, dy, "target", "dy")
    if t > CHUNK:
        chunks = x.new_empty((ceil_div(t, CHUNK), n), dtype=torch.float32)
        _sum(x, chunks, CHUNK, 0.0)
        x = chunks
    _sum(x, target, max(x.shape[0], 1), float(beta))


def _sum(x: Tensor, target: Tensor, chunk: int, beta: float) -> None:
    (t, n), count = x.shape, max(ceil_div(x.shape[0], chunk), 1)
    options = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": NUM_WARPS}
    args = (x, target, t, n, stride(x), chunk, beta)
    launch(linear_bias_grad_kernel, (count, ceil_div(n, BLOCK_N)), *args, ACCUMULATE=beta != 0, **options)
