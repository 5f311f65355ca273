"""dw = beta dw + alpha dy^T x, accumulated in dw's dtype. Formulas and FLOPs: megapar/ops/linear.py.

A program takes a tile of dw (tiles.py), sums it over the tokens (gemm.py) and reads and writes the target once: 8 bytes a weight into an
fp32 main_grad. The sum over the tokens is never split over programs: its order, and so every bit, is the same in each run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_apart, check_float, check_same, check_target, require
from megapar.ops.triton.floats import load, round_to, widen
from megapar.ops.triton.gemm import launch_gemm, place, product
from megapar.ops.triton.rows import rows, stride
from megapar.ops.triton.tiles import ACCUMULATE, PLAIN


@triton.jit(do_not_specialize=["t"])
def linear_weight_grad_kernel(  # type: ignore[no-untyped-def]
    dy, x, target, scale, non_finite, t, m, n, dy_stride, x_stride, one, alpha: tl.float64, beta, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """target [m, n] from dy [t, m] and x [t, n]. ACCUMULATE: beta is not 0; where it is, the target is not read, which may hold NaN."""
    row, column = place(m, n, BLOCK_M, BLOCK_N, GROUP_M)
    total, _ = product(dy, x, x, row, column, m, n, t, one, dy_stride, x_stride, one, BLOCK_K, False)
    mask = (row[:, None] < m) & (column[None, :] < n)
    target += row.to(tl.int64)[:, None] * n + column[None, :]
    if scale is not None:
        alpha = alpha * tl.load(scale).to(tl.float64)  # their product may be a number of fp32 where alpha is none
    total *= tl.full((), alpha, tl.float64).to(tl.float32)
    if ACCUMULATE:
        total += beta * load(target, mask)
    result = round_to(total, target.dtype.element_ty)
    tl.store(target, result, mask=mask)
    if non_finite is not None:
        # Every program that finds one stores the same 1: which of them comes last does not matter.
        finite = tl.abs(widen(result)) < float("inf")
        found = tl.max((mask & ~finite).to(tl.int32))
        tl.store(non_finite, 1.0, mask=found > 0)


def linear_weight_grad_(
    target: Tensor, dy: Tensor, x: Tensor, beta: float, alpha: float = 1.0, scale: Tensor | None = None, non_finite: Tensor | None = None
) -> None:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/linear.py."""
    check_float(dy, "dy")
    check_same(x, dy, "x", "dy")
    flat_dy, flat_x = rows(dy), rows(x)
    (t, m), n = flat_dy.shape, flat_x.shape[1]
    require(t == flat_x.shape[0], f"dy has {t} rows and x {flat_x.shape[0]}: give both the same tokens")
    check_target(target, dy, [m, n])
    check_apart(target, dy, "target", "dy")
    check_apart(target, x, "target", "x")
    require(scale is None or _is_number(scale, dy), "scale must be one float32 number beside dy: convert it")
    require(
        non_finite is None or _is_number(non_finite, dy),
        "non_finite must be one float32 number beside dy, which becomes 1: convert it",
    )
    args = (flat_dy, flat_x, target, scale, non_finite, t, m, n, stride(flat_dy), stride(flat_x), 1, float(alpha), float(beta))
    epilogue = PLAIN if beta == 0 else ACCUMULATE
    # Target and flag: sums of many launches could overflow.
    widths = (m, n, stride(flat_dy), stride(flat_x))
    launch_gemm(linear_weight_grad_kernel, m, n, epilogue, args, widths=widths, updated=(2, 4), ACCUMULATE=beta != 0)


def _is_number(x: Tensor, dy: Tensor) -> bool:
    return x.numel() == 1 and x.dtype == torch.float32 and x.device == dy.device
