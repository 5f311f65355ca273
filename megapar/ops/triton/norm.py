"""RMSNorm, and LayerNorm where CENTRED. Formulas and bytes: megapar/ops/rms_norm.py and layer_norm.py.

Forward, a program holds ROWS whole rows in registers, or walks one row that is wider than WIDEST twice (three times for a mean), and finds
it in L2 after the first. Backward, a program takes every programs-th group of ROWS rows and sums its share of dw and db in registers. It
writes one row of partial sums, which `sum_partials_kernel` adds in order. There are no atomics: the same bits every time. Rows beyond
WIDEST_BACKWARD would spill those sums: theirs are made by columns, in a kernel of their own that reads dy and s again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.triton.checks import check_float, check_same, named, require
from megapar.ops.triton.floats import load, round_to, store
from megapar.ops.triton.launch import ceil_div, launch, target_of

WIDEST, WIDEST_BACKWARD, CHUNK = 16384, 8192, 4096
ROWS_A_PROGRAM, WARPS_AN_SM = 8, 16
"""Backward: a program has at least so many rows, so that its partial sums (8 bytes a column, written and read) are at most a sixth of the 6
bytes an element of bf16. And a multiprocessor has so many warps of programs, with 16 elements of two tensors of bf16 a thread on their way:
32 KiB, about the bandwidth of an A100 or H100 times 1 us, divided by its multiprocessors."""


@dataclass(frozen=True)
class Tile:
    rows: int
    block: int
    num_warps: int


def tile(h: int) -> Tile:
    """For rows of h that are held: powers of two, 16 elements a thread (8 below 2048 columns, 32 in the widest), which are whole 128-bit
    accesses of 16 bits, and 16 warps at most. 512 is left out, to compile less: such rows use half of 1024."""
    block = 256 if h <= 256 else max(triton.next_power_of_2(h), 1024)
    return Tile(1024 // block if block < 1024 else 1, block, min(max(block // 512, 4), 16))


def programs(t: int, sms: int, chosen: Tile) -> int:
    """Of the backward: also the number of partial sums, which are therefore a function of t, h and the device's multiprocessors alone."""
    return max(1, min(ceil_div(t, max(ROWS_A_PROGRAM, chosen.rows)), sms * WARPS_AN_SM // chosen.num_warps))


@triton.jit
def _sum(x, residual, at, mask):  # type: ignore[no-untyped-def]
    """x, or x + residual as it is rounded, in fp32."""
    z = load(x + at, mask)
    if residual is not None:
        z = round_to(z + load(residual + at, mask), x.dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def _scale(most, eps):  # type: ignore[no-untyped-def]
    """A power of two that brings squares of a row into the range of fp32, and eps with them. `most`: largest magnitude of the row.

    Scaled, the larger of `most` and sqrt(eps) is between 2^-40 and 2^60, or what its rstd is would not be a number of fp32.
    """
    most = tl.maximum(most, tl.sqrt(eps))
    return tl.where(most > 1.2e18, 7.888609052210118e-31, tl.where(most < 9e-13, 1.2379400392853803e27, 1.0))  # 2^-100, 2^90


@triton.jit
def _rstd(square, h, eps, scale):  # type: ignore[no-untyped-def]
    return scale / tl.sqrt(square / h + eps * scale * scale)


@triton.jit
def _outside(square):  # type: ignore[no-untyped-def]
    """Whether a sum of squares may have left the range of fp32 (tests/ops/test_rms_norm.py::test_range); also if it is NaN."""
    return (square > 1e-25) & (square < 1e38) == 0


@triton.jit
def _moments(z, mask, h, scale, CENTRED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean (0 unless CENTRED) and sum of squares about it, of each row of z [ROWS, BLOCK] times its scale."""
    z = z * scale[:, None]
    mean = tl.sum(z, 1) / h if CENTRED else tl.zeros_like(scale)
    centred = tl.where(mask, z - mean[:, None], 0.0) if CENTRED else z
    return mean, tl.sum(centred * centred, 1)


@triton.jit(do_not_specialize=["t"])
def norm_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, s, mean, rstd, t, h, eps, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < h
    mask, at = (row < t)[:, None] & inside, row[:, None] * h + column
    z = _sum(x, residual, at, mask)
    if residual is not None:
        store(s + at, z, mask)
    one = tl.full([ROWS], 1.0, tl.float32)
    m, square = _moments(z, mask, h, one, CENTRED)
    r = _rstd(square, h, eps, one)
    outside = _outside(square) & (row < t)
    if tl.max(outside.to(tl.int32), 0) != 0:
        scale = tl.where(outside, _scale(tl.max(tl.abs(z), 1), eps), 1.0)
        scaled, square = _moments(z, mask, h, scale, CENTRED)
        m, r = tl.where(outside, scaled / scale, m), tl.where(outside, _rstd(square, h, eps, scale), r)
    if CENTRED:
        tl.store(mean + row, m, mask=row < t)
    tl.store(rstd + row, r, mask=row < t)
    out = (z - m[:, None]) * r[:, None] * load(weight + column, inside)
    store(y + at, out + load(bias + column, inside) if bias is not None else out, mask)


@triton.jit
def _wide_moments(x, residual, start, h, scale, CENTRED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """_moments of one row that is not held."""
    mean = 0.0
    if CENTRED:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, h, BLOCK):
            column = first + tl.arange(0, BLOCK)
            total += _sum(x, residual, start + column, column < h) * scale
        mean = tl.sum(total, 0) / h
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, h, BLOCK):
        column = first + tl.arange(0, BLOCK)
        centred = tl.where(column < h, _sum(x, residual, start + column, column < h) * scale - mean, 0.0)
        squares += centred * centred
    return mean, tl.sum(squares, 0)


@triton.jit
def norm_wide_kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, y, s, mean, rstd, h, eps, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = row * h
    m, square = _wide_moments(x, residual, start, h, 1.0, CENTRED, BLOCK)
    r = _rstd(square, h, eps, 1.0)
    if _outside(square):
        most = tl.zeros([BLOCK], tl.float32)
        for first in range(0, h, BLOCK):
            column = first + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.abs(_sum(x, residual, start + column, column < h)))
        scale = _scale(tl.max(most, 0), eps)
        m, square = _wide_moments(x, residual, start, h, scale, CENTRED, BLOCK)
        m, r = m / scale, _rstd(square, h, eps, scale)
    if CENTRED:
        tl.store(mean + row, m)
    tl.store(rstd + row, r)
    for first in range(0, h, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < h
        z = _sum(x, residual, start + column, inside)
        if residual is not None:
            store(s + start + column, z, inside)
        out = (z - m) * r * load(weight + column, inside)
        store(y + start + column, out + load(bias + column, inside) if bias is not None else out, inside)


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


def check_weight(weight: Tensor, x: Tensor, name: str) -> None:
    h = x.shape[-1]
    require(weight.shape == (h,), f"{name} has shape {list(weight.shape)} and x {list(x.shape)}: {name} must be [{h}]")
    require(
        weight.dtype in (x.dtype, torch.float32),
        f"{name} has dtype {named(weight.dtype)} and x {named(x.dtype)}: use that of x or float32",
    )
    require(weight.device == x.device, f"{name} is on {weight.device} and x on {x.device}: move one")


def check_shape(x: Tensor, other: Tensor, name: str, other_name: str) -> None:
    check_same(x, other, name, other_name)
    require(
        x.shape == other.shape, f"{name} has shape {list(x.shape)} and {other_name} {list(other.shape)}: they must be the same"
    )


def check_statistic(statistic: Tensor, s: Tensor, name: str) -> None:
    require(
        statistic.dtype == torch.float32 and statistic.shape == s.shape[:-1] and statistic.device == s.device,
        f"{name} has shape {list(statistic.shape)} and dtype {named(statistic.dtype)}: give what the forward returned",
    )


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, *, centred: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, s, mean, rstd), s without elements where there is no residual; mean None unless `centred`."""
    check_float(x, "x")
    check_weight(weight, x, "weight")
    if bias is not None:
        check_weight(bias, x, "bias")
        check_same(bias, weight, "bias", "weight")
    if residual is not None:
        check_shape(residual, x, "residual", "x")
    require(eps >= 0, f"eps={eps:g} must be 0 or more: raise it")
    x, weight = x.contiguous(), weight.contiguous()
    bias, residual = (None if z is None else z.contiguous() for z in (bias, residual))
    h = x.shape[-1]
    t = x.numel() // max(h, 1)
    y, s, rstd = torch.empty_like(x), x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else None
    args = (x, residual, weight, bias, y, s, mean, rstd)
    if h > WIDEST:
        launch(norm_wide_kernel, (t,), *args, h, eps, CENTRED=centred, BLOCK=CHUNK, num_warps=8)
    else:
        shape = tile(h)
        options = {"CENTRED": centred, "ROWS": shape.rows, "BLOCK": shape.block, "num_warps": shape.num_warps}
        launch(norm_kernel, (ceil_div(t, shape.rows),), *args, t, h, eps, **options)
    return y, s, mean, rstd


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
    shape, wide = tile(min(h, WIDEST_BACKWARD)), h > WIDEST_BACKWARD
    count = programs(t, target_of(s.device).sms, shape)
    partial = s.new_empty(count, 2 * h if centred else h, dtype=torch.float32)
    if wide:
        launch(norm_backward_wide_kernel, (t,), dy, ds, s, weight, mean, rstd, dx, h, CENTRED=centred, BLOCK=CHUNK, num_warps=8)
        grid = (count, ceil_div(h, 1024))
        launch(norm_partials_kernel, grid, dy, s, mean, rstd, partial, t, h, CENTRED=centred, BLOCK=1024, num_warps=4)
    else:
        options = {"CENTRED": centred, "ROWS": shape.rows, "BLOCK": shape.block, "num_warps": shape.num_warps}
        launch(norm_backward_kernel, (count,), dy, ds, s, weight, mean, rstd, dx, partial, t, h, **options)
    options = {"CENTRED": centred, "ROWS": 8 if wide else 16, "BLOCK": 512 if wide else 128, "num_warps": 8 if wide else 4}
    launch(sum_partials_kernel, (ceil_div(h, options["BLOCK"]), 2 if centred else 1), partial, dw, db, count, h, **options)
    return dx, dw, db
