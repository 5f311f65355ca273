"""The launch of every GEMM, and its main loop: a tile of C = A B as one fp32 sum along K, in ascending order.

A [m, k] and B [k, n] are pointers with the distance of neighbours in either dimension; one that is 1 is known to the compiler, so that one
loop serves every layout: rows of 16-byte vectors are copied along the dimension whose neighbours are adjacent. What a tile has beyond the
edges of A and B is 0, along K in both: 0 times infinity must not reach a result (tests/ops/test_linear_numbers.py::
test_not_finite_stays_in_its_row). Offsets are int64: a row may start beyond 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.triton import autotune
from megapar.ops.triton.floats import INTERPRET, widen
from megapar.ops.triton.launch import ceil_div, launch, target_of
from megapar.ops.triton.tiles import Epilogue, Tile, candidates, choose


def launch_gemm(
    kernel: Any,
    rows: int,
    columns: int,
    epilogue: Epilogue,
    args: tuple[Any, ...],
    *,
    widths: tuple[int, ...],
    updated: tuple[int, ...] = (),
    **constexprs: Any,
) -> None:
    """A program for each tile of C [rows, columns].

    args: of the kernel, A first. widths: how far its tensors' rows are apart. updated: which arguments the kernel reads and writes.
    """
    a, target = args[0], target_of(args[0].device)

    def run(tile: Tile, given: tuple[Any, ...] = args) -> None:
        grid = (ceil_div(rows, tile.m) * ceil_div(columns, tile.n),)
        launch(kernel, grid, *given, **constexprs, **tile.options())

    vectors = all(x % 16 == 0 or x == 1 for x in widths)
    tile = choose(rows, columns, a.dtype, target, epilogue, vectors)
    if a.device.type == "cuda" and rows * columns > 0 and autotune.asked():
        key = _key(kernel, args, constexprs, f"sm_{target.arch}, {target.sms} SMs, {torch.cuda.get_device_name(a.device)}")
        with torch.cuda.device(a.device):
            timer = None if torch.cuda.is_current_stream_capturing() else timed_apart(run, args, updated)
            tile = autotune.choices(autotune.cache_file()).fastest(key, candidates(a.dtype, target.arch, epilogue, vectors), tile, timer)
    run(tile)


def timed_apart(
    run: Callable[[Tile, tuple[Any, ...]], None], args: tuple[Any, ...], updated: tuple[int, ...]
) -> Callable[[Tile], float]:
    """Median milliseconds of a tile, on copies of what so many launches must not update; all else the launch that follows overwrites."""

    def milliseconds(tile: Tile) -> float:
        copies = tuple(x.clone() if i in updated and x is not None else x for i, x in enumerate(args))
        return float(triton.testing.do_bench(lambda: run(tile, copies), warmup=10, rep=50, return_mode="median"))

    return milliseconds


def _key(kernel: Any, args: tuple[Any, ...], constexprs: dict[str, Any], device: str) -> str:
    """Sizes and strides by value, dtypes of tensors; alpha and beta change no time."""
    kinds = [str(x.dtype)[6:] if isinstance(x, Tensor) else type(x).__name__ if isinstance(x, float) else str(x) for x in args]
    options = [f"{name}={value}" for name, value in sorted(constexprs.items())]
    return ", ".join([kernel.__name__, *kinds, *options, device, f"triton {triton.__version__}"])


@triton.jit
def place(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of this program's tile. Programs go down GROUP_M tiles, then to the next column of tiles."""
    program = tl.program_id(0)
    down, across = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP_M * across) * GROUP_M
    high = min(down - first, GROUP_M)
    within = program % (GROUP_M * across)
    row, column = first + within % high, within // high
    return row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def dot(a, b, c):  # type: ignore[no-untyped-def]
    """c + a b. fp32 operands are multiplied as they are, never as TF32. The interpreter would multiply the bits of 16-bit floats."""
    if INTERPRET:
        return tl.dot(widen(a), widen(b), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def product(  # type: ignore[no-untyped-def]
    a, b, b2, row, column, m, n, k, a_row, a_step, b_step, b_column, BLOCK_K: tl.constexpr, PAIR: tl.constexpr
):
    """A B and, with PAIR, A B2 of the same shape and strides; the second is 0 otherwise. fp32 [BLOCK_M, BLOCK_N]."""
    step = tl.arange(0, BLOCK_K)
    left = row.to(tl.int64)[:, None] * a_row + step.to(tl.int64)[None, :] * a_step
    right = step.to(tl.int64)[:, None] * b_step + column.to(tl.int64)[None, :] * b_column
    rows, columns = row[:, None] < m, column[None, :] < n
    c = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    c2 = c
    for start in range(0, k, BLOCK_K):
        within = step < k - start
        x = tl.load(a + left, mask=rows & within[None, :], other=0.0)
        c = dot(x, tl.load(b + right, mask=within[:, None] & columns, other=0.0), c)
        if PAIR:
            c2 = dot(x, tl.load(b2 + right, mask=within[:, None] & columns, other=0.0), c2)
        a += BLOCK_K * tl.cast(a_step, tl.int64)
        b += BLOCK_K * tl.cast(b_step, tl.int64)
        if PAIR:
            b2 += BLOCK_K * tl.cast(b_step, tl.int64)
    return c, c2
