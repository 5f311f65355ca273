"""Formula and bytes: megapar/ops/dropout.py. The hash is that of csrc/common/hash.inl, bit for bit. Tiles: elementwise.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_float, named, require
from megapar.ops.triton.elementwise import NUM_WARPS, tile
from megapar.ops.triton.floats import load, store
from megapar.ops.triton.hash import mix64
from megapar.ops.triton.launch import ceil_div, launch


@triton.jit
def mix32(x):  # type: ignore[no-untyped-def]
    """Of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["t", "key", "first", "least"])
def dropout_kernel(  # type: ignore[no-untyped-def]
    x, rows, y, t, h, key: tl.int64, first: tl.int64, least: tl.int64, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """An element is kept where its hash is `least` or more; `first` is the column of x[:, 0]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mixed = mix64((tl.load(rows + row, mask=row < t, other=0) ^ key).to(tl.uint64, bitcast=True))
    low, high = mixed.to(tl.uint32)[:, None], (mixed >> 32).to(tl.uint32)[:, None]
    hashed = mix32(mix32((first.to(tl.uint32) + column.to(tl.uint32))[None, :] + low) ^ high)
    mask, at = (row < t)[:, None] & (column < h)[None, :], row[:, None] * h + column[None, :]
    store(y + at, tl.where(hashed >= least.to(tl.uint32), load(x + at, mask) * scale, 0.0), mask)


def dropout(x: Tensor, rows: Tensor, key: int, p: float, column: int) -> Tensor:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/dropout.py."""
    check_float(x, "x")
    require(0 <= p < 1, f"p={p:g} must lie in [0, 1): lower it")
    x, h = x.contiguous(), x.shape[-1]
    t = x.numel() // max(h, 1)
    require(
        rows.dtype == torch.int64 and rows.device == x.device and (h == 0 or rows.numel() == t),
        f"rows has shape {list(rows.shape)} and dtype {named(rows.dtype)}: give one int64 for each of the {t} rows of x",
    )
    require(
        column >= 0 and column + h <= 1 << 32, f"column={column} and the {h} columns behind it must lie in [0, 2^32): lower it"
    )
    y, (height, block), least = torch.empty_like(x), tile(h), min(round(p * 2**32), 2**32 - 1)
    grid, options = (ceil_div(t, height), ceil_div(h, block)), {"ROWS": height, "BLOCK": block, "num_warps": NUM_WARPS}
    launch(dropout_kernel, grid, x, rows.contiguous(), y, t, h, key, column, least, 1 / (1 - p), **options)
    return y
