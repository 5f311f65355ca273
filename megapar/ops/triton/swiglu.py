"""Formula and bytes: megapar/ops/swiglu.py.

A program takes ROWS x BLOCK elements of y: the gate's part of the rows, and the same part of up f further on. Tiles: elementwise.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_float, check_same, require
from megapar.ops.triton.elementwise import NUM_WARPS, tile
from megapar.ops.triton.exp import exp
from megapar.ops.triton.floats import load, store
from megapar.ops.triton.launch import ceil_div, launch


@triton.jit
def _place(t, f, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row, column and mask of a program's elements."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, column, (row < t) & (column < f)


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """The divisor is at most 2: the division of GPUs gives 0 where it is above 2^126, as 1 + exp(-x) may be.

    exp.py's is shorter, but with it the gradient of fp32 takes 44 registers, too many for three quarters of a multiprocessor's warps.
    """
    e = exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit(do_not_specialize=["t"])
def swiglu_kernel(x, y, t, f, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of y."""
    row, column, mask = _place(t, f, ROWS, BLOCK)
    at = row * 2 * f + column
    gate, up = load(x + at, mask), load(x + f + at, mask)
    store(y + row * f + column, gate * _sigmoid(gate) * up, mask)


@triton.jit(do_not_specialize=["t"])
def swiglu_backward_kernel(dy, x, dx, t, f, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of dy, and both halves of dx."""
    row, column, mask = _place(t, f, ROWS, BLOCK)
    at = row * 2 * f + column
    gate, up = load(x + at, mask), load(x + f + at, mask)
    d, s = load(dy + row * f + column, mask), _sigmoid(gate)
    store(dx + at, d * up * s * (1 + gate * (1 - s)), mask)
    store(dx + f + at, d * gate * s, mask)


def swiglu(gate_up: Tensor) -> Tensor:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/swiglu.py."""
    check_float(gate_up, "gate_up")
    require(gate_up.shape[-1] % 2 == 0, f"gate_up is {gate_up.shape[-1]} wide and must hold gate and up: give it an even width")
    x = gate_up.contiguous()
    y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    _launch(swiglu_kernel, (x, y), y)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The same."""
    check_float(gate_up, "gate_up")
    check_same(dy, gate_up, "dy", "gate_up")
    require(
        dy.shape[:-1] == gate_up.shape[:-1] and 2 * dy.shape[-1] == gate_up.shape[-1],
        f"dy has shape {list(dy.shape)} and gate_up {list(gate_up.shape)}: dy must be half as wide",
    )
    dy, x = dy.contiguous(), gate_up.contiguous()
    dx = torch.empty_like(x)
    # In fp32 ptxas takes 48 registers at one tile, for room for five programs; 40 do without a spill (tests/aot/test_swiglu.py).
    _launch(swiglu_backward_kernel, (dy, x, dx), dy, 40 if x.dtype == torch.float32 else None)
    return dx


def _launch(kernel: Any, tensors: tuple[Tensor, ...], y: Tensor, maxnreg: int | None = None) -> None:
    """A program for each tile of y [..., f], with at most so many registers a thread."""
    f = y.shape[-1]
    t, (rows, block) = y.numel() // max(f, 1), tile(f)
    options = {"ROWS": rows, "BLOCK": block, "num_warps": NUM_WARPS, "maxnreg": maxnreg}
    launch(kernel, (ceil_div(t, rows), ceil_div(f, block)), *tensors, t, f, **options)
