"""Formula and bytes: megapar/ops/swiglu.py.

A program takes BLOCK elements of one row of y: the gate's part of the row, and the same part of up f further on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.triton.checks import check_float, check_same, require
from megapar.ops.triton.floats import load, store
from megapar.ops.triton.launch import ceil_div, launch

BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def swiglu_kernel(x, y, f, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < f
    gate, up = load(x + row * 2 * f + column, mask), load(x + row * 2 * f + f + column, mask)
    store(y + row * f + column, gate / (1 + tl.exp(-gate)) * up, mask)


@triton.jit
def swiglu_backward_kernel(dy, x, dx, f, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < f
    gate, up = load(x + row * 2 * f + column, mask), load(x + row * 2 * f + f + column, mask)
    d, s = load(dy + row * f + column, mask), 1 / (1 + tl.exp(-gate))
    store(dx + row * 2 * f + column, d * up * s * (1 + gate * (1 - s)), mask)
    store(dx + row * 2 * f + f + column, d * gate * s, mask)


def swiglu(gate_up: Tensor) -> Tensor:
    check_float(gate_up, "gate_up")
    require(gate_up.shape[-1] % 2 == 0, f"gate_up is {gate_up.shape[-1]} wide and must hold gate and up: give it an even width")
    x, f = gate_up.contiguous(), gate_up.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], f))
    launch(swiglu_kernel, _grid(y), x, y, f, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    check_float(gate_up, "gate_up")
    check_same(dy, gate_up, "dy", "gate_up")
    require(
        dy.shape[:-1] == gate_up.shape[:-1] and 2 * dy.shape[-1] == gate_up.shape[-1],
        f"dy has shape {list(dy.shape)} and gate_up {list(gate_up.shape)}: dy must be half as wide",
    )
    dy, x = dy.contiguous(), gate_up.contiguous()
    dx = torch.empty_like(x)
    launch(swiglu_backward_kernel, _grid(dy), dy, x, dx, dy.shape[-1], BLOCK=BLOCK, num_warps=NUM_WARPS)
    return dx


def _grid(y: Tensor) -> tuple[int, int]:
    """A program for each block of each row."""
    return y.numel() // max(y.shape[-1], 1), ceil_div(y.shape[-1], BLOCK)
