"""The backward of norm.py's RMSNorm and LayerNorm: what a program takes is said there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_float
from megapar.ops.triton.floats import load, store
from megapar.ops.triton.launch import ceil_div, launch, target_of
from megapar.ops.triton.norm import CHUNK, Tile, check_shape, check_statistic, check_weight, held, tile

WIDEST_BACKWARD = 8192
ROWS_A_PROGRAM, WARPS_AN_SM = 8, 16
"""Backward: a program has at least so many rows, so that its partial sums (8 bytes a column, written and read) are at most a sixth of the 6
bytes an element of bf16. And a multiprocessor has so many warps of programs, with 16 elements of two tensors of bf16 a thread on their way:
32 KiB, about the bandwidth of an A100 or H100 times 1 us, divided by its multiprocessors."""


def programs(t: int, sms: int, chosen: Tile) -> int:
    """Of the backward: also the number of partial sums, which are therefore a function of t, h and the device's multiprocessors alone."""
    return max(1, min(ceil_div(t, max(ROWS_A_PROGRAM, chosen.rows)), sms * WARPS_AN_SM // chosen.num_warps))


@triton.jit(do_not_specialize=["t"])
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    dy, ds, s, weight, mean, rstd, dx, partial, t, h, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """partial [programs, h], or [programs, 2 h] where CENTRED: dw, and db behind it."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < h
    w = load(weight + column, inside)
    dw, db = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for group in range(tl.program_id(0), tl.cdiv(t, ROWS), tl.num_programs(0)):
        row = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask, at = (row < t)[:, None] & inside, row[:, None] * h + column
        d, z, r = load(dy + at, mask), load(s + at, mask), load(rstd + row, row < t)[:, None]
        if CENTRED:
            z = tl.where(mask, z - load(mean + row, row < t)[:, None], 0.0)
            db += d
        z, g = z * r, d * w
        dw += d * z
        out = g - z * (tl.sum(g * z, 1) / h)[:, None]
        if CENTRED:
            out -= (tl.sum(g, 1) / h)[:, None]
        store(dx + at, out * r + load(ds + at, mask) if ds is not None else out * r, mask)
    column = tl.arange(0, BLOCK)
    if CENTRED:
        to = partial + tl.program_id(0).to(tl.int64) * 2 * h + column
        tl.store(to + h, tl.sum(db, 0), mask=column < h)
    else:
        to = partial + tl.program_id(0).to(tl.int64) * h + column
    tl.store(to, tl.sum(dw, 0), mask=column < h)


@triton.jit
def norm_backward_wide_kernel(dy, ds, s, weight, mean, rstd, dx, h, CENTRED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row's dx."""
    row = tl.program_id(0).to(tl.int64)
    start, r = row * h, tl.load(rstd + row)
    m = tl.load(mean + row) if CENTRED else 0.0
    slopes, shifts = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, h, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < h
        g = load(dy + start + column, inside) * load(weight + column, inside)
        slopes += g * ((load(s + start + column, inside) - m) * r)
        shifts += g
    slope = tl.sum(slopes, 0) / h
    shift = tl.sum(shifts, 0) / h if CENTRED else 0.0
    for first in range(0, h, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < h
        g = load(dy + start + column, inside) * load(weight + column, inside)
        out = (g - shift - (load(s + start + column, inside) - m) * r * slope) * r
        store(dx + start + column, out + load(ds + start + column, inside) if ds is not None else out, inside)


@triton.jit(do_not_specialize=["t"])
def norm_partials_kernel(dy, s, mean, rstd, partial, t, h, CENTRED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """As norm_backward_kernel leaves them, for BLOCK columns a program."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < h
    dw, db = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(0), t, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * h + column
        m = tl.load(mean + row) if CENTRED else 0.0
        d = load(dy + at, inside)
        dw += d * ((load(s + at, inside) - m) * tl.load(rstd + row))
        db += d
    if CENTRED:
        to = partial + tl.program_id(0).to(tl.int64) * 2 * h + column
        tl.store(to + h, db, mask=inside)
    else:
        to = partial + tl.program_id(0).to(tl.int64) * h + column
    tl.store(to, dw, mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def sum_partials_kernel(partial, dw, db, blocks, h, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """BLOCK columns of dw, or of db, [h]: row i of ROWS adds every ROWS-th block, and then the rows are added in a tree."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width = 2 * h if CENTRED else h
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, blocks, ROWS):
        block = (first + tl.arange(0, ROWS)).to(tl.int64)
        at = block[:, None] * width + tl.program_id(1) * h + column[None, :]
        total += load(partial + at, (block < blocks)[:, None] & (column < h)[None, :])
    if tl.program_id(1) == 0:
        store(dw + column, tl.sum(total, 0), column < h)
    elif CENTRED:
        store(db + column, tl.sum(total, 0), column < h)


def backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dw, db), db None where there is no mean."""
    check_float(s, "s")
    check_weight(weight, s, "weight")
    check_shape(dy, s, "dy", "s")
    if ds is not None:
        check_shape(ds, s, "ds", "s")
    check_statistic(rstd, s, "rstd")
    if mean is not None:
        check_statistic(mean, s, "mean")
    dy, s, weight, rstd = dy.contiguous(), s.contiguous(), weight.contiguous(), rstd.contiguous()
    ds, mean = (None if z is None else z.contiguous() for z in (ds, mean))
    h, centred = s.shape[-1], mean is not None
    t = s.numel() // max(h, 1)
    dx, dw = torch.empty_like(s), torch.empty_like(weight)
    db = torch.empty_like(weight) if centred else None
    shape, wide = tile(min(h, WIDEST_BACKWARD)), not held(h, WIDEST_BACKWARD)
    count = programs(t, target_of(s.device).sms, shape)
    partial = s.new_empty(count, 2 * h if centred else h, dtype=torch.float32)
    if wide:
        walking = {"CENTRED": centred, "BLOCK": CHUNK, "num_warps": 8, "maxnreg": 128}
        launch(norm_backward_wide_kernel, (t,), dy, ds, s, weight, mean, rstd, dx, h, **walking)
        grid = (count, ceil_div(h, 1024))
        launch(norm_partials_kernel, grid, dy, s, mean, rstd, partial, t, h, CENTRED=centred, BLOCK=1024, num_warps=4)
    else:
        options = shape.options(centred, 128)
        launch(norm_backward_kernel, (count,), dy, ds, s, weight, mean, rstd, dx, partial, t, h, **options)
    options = {"CENTRED": centred, "ROWS": 8 if wide else 16, "BLOCK": 512 if wide else 128, "num_warps": 8 if wide else 4}
    launch(sum_partials_kernel, (ceil_div(h, options["BLOCK"]), 2 if centred else 1), partial, dw, db, count, h, **options)
    return dx, dw, db
