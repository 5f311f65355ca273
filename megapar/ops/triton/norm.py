"""RMSNorm, and LayerNorm where CENTRED. Formulas and bytes: megapar/ops/rms_norm.py and layer_norm.py.

Forward, a program holds ROWS whole rows in registers, or walks one row that is too wide for that (`held`) twice (three times for a mean),
and finds it in L2 after the first. Backward, a program takes every programs-th group of ROWS rows and sums its share of dw and db in
registers. It writes one row of partial sums, which `sum_partials_kernel` adds in order. There are no atomics: the same bits every time.
Rows that are not held would spill those sums: theirs are made by columns, in a kernel of their own that reads dy and s again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_float, check_same, named, require
from megapar.ops.triton.floats import load, round_to, store
from megapar.ops.triton.launch import ceil_div, launch

WIDEST, CHUNK = 16384, 4096


@dataclass(frozen=True)
class Tile:
    """What a program holds: `rows` rows of `block` columns, of which h count."""
    rows: int
    block: int
    num_warps: int

    def options(self, centred: bool, registers: int) -> dict[str, Any]:
        """registers: of a thread, for what ptxas left alone would spill, a few of 48, to make room for one more program."""
        options: dict[str, Any] = {"CENTRED": centred, "ROWS": self.rows, "BLOCK": self.block, "num_warps": self.num_warps}
        return options | ({"maxnreg": registers} if self.block >= 1024 else {})


def tile(h: int) -> Tile:
    """For rows of h that are held: powers of two, 16 elements a thread (8 below 2048 columns, 32 in the widest), which are whole 128-bit
    accesses of 16 bits, and 16 warps at most. 512 is left out, to compile less: such rows use half of 1024."""
    block = 256 if h <= 256 else max(triton.next_power_of_2(h), 1024)
    return Tile(1024 // block if block < 1024 else 1, block, min(max(block // 512, 4), 16))


def held(h: int, widest: int) -> bool:
    """Whether registers hold a row. Where rows are no whole vectors each element has an address, for which only short ones have room."""
    return h <= (1024 if h % 16 else widest)


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
    """ROWS rows, held."""
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
    """One row, walked."""
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


def check_weight(weight: Tensor, x: Tensor, name: str) -> None:
    """[h], in the dtype of x or fp32, beside x."""
    h = x.shape[-1]
    require(weight.shape == (h,), f"{name} has shape {list(weight.shape)} and x {list(x.shape)}: {name} must be [{h}]")
    require(
        weight.dtype in (x.dtype, torch.float32),
        f"{name} has dtype {named(weight.dtype)} and x {named(x.dtype)}: use that of x or float32",
    )
    require(weight.device == x.device, f"{name} is on {weight.device} and x on {x.device}: move one")


def check_shape(x: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """The shape, dtype and device of the other."""
    check_same(x, other, name, other_name)
    require(
        x.shape == other.shape, f"{name} has shape {list(x.shape)} and {other_name} {list(other.shape)}: they must be the same"
    )


def check_statistic(statistic: Tensor, s: Tensor, name: str) -> None:
    """fp32, one for each row of s."""
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
    if not held(h, WIDEST):
        launch(norm_wide_kernel, (t,), *args, h, eps, CENTRED=centred, BLOCK=CHUNK, num_warps=8, maxnreg=128)
    else:
        shape = tile(h)
        options = shape.options(centred, 128 if shape.num_warps == 16 else 64)
        launch(norm_kernel, (ceil_div(t, shape.rows),), *args, t, h, eps, **options)
    return y, s, mean, rstd
