"""Formulas and FLOPs: megapar/ops/linear.py. Forward and input gradient; the parameters': linear_weight_grad.py, linear_bias_grad.py.

A program takes a tile of the result (tiles.py), sums it along K (gemm.py), and does what rides along while the tile is in registers: SwiGLU
with two accumulators, so that gate and up of the same place meet in one program; its gradient as two stores.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_float, check_same, named, require
from megapar.ops.triton.exp import sigmoid
from megapar.ops.triton.floats import load, round_to, store, widen
from megapar.ops.triton.gemm import launch_gemm, place, product
from megapar.ops.triton.linear_bias_grad import linear_bias_grad_
from megapar.ops.triton.linear_weight_grad import linear_weight_grad_
from megapar.ops.triton.rows import rows, stride, with_last
from megapar.ops.triton.tiles import PLAIN, SLOPE, SWIGLU, SWIGLU_SLOPE

__all__ = ["linear", "linear_bias_grad_", "linear_input_grad", "linear_weight_grad_"]

ACTIVATIONS = ("none", "gelu", "silu", "swiglu")


@triton.jit
def gelu_gate(z):  # type: ignore[no-untyped-def]
    """GELU is z times this: tanh(u) = 2 sigmoid(2 u) - 1."""
    return sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(z) of the activations with one input."""
    if ACTIVATION == "gelu":
        return z * gelu_gate(z)
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the activation at z."""
    if ACTIVATION == "gelu":
        # Beyond 100 the slope is 0 or 1, and z^2 could overflow: 0 times infinity (tests/ops/test_linear_numbers.py::test_every_gate).
        z = tl.where(z > 100.0, 100.0, tl.where(z < -100.0, -100.0, z))
        s = gelu_gate(z)
        return s + z * s * (1 - s) * (1.5957691216057308 + 0.2140644488 * z * z)
    else:
        s = sigmoid(z)
        return s * (1 + z * (1 - s))


@triton.jit(do_not_specialize=["t"])
def linear_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, y, z, t, n, k, x_stride, one, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y [t, n] from x [t, k]; `weight` has twice n rows for swiglu, gate and up one after the other, and so has z in columns."""
    PAIR: tl.constexpr = ACTIVATION == "swiglu"
    row, column = place(t, n, BLOCK_M, BLOCK_N, GROUP_M)
    up_rows = tl.cast(n, tl.int64) * k
    gate, up = product(x, weight, weight + up_rows, row, column, t, n, k, x_stride, one, one, k, BLOCK_K, PAIR)
    if bias is not None:
        gate += load(bias + column, column < n)[None, :]
        if PAIR:
            up += load(bias + n + column, column < n)[None, :]
    mask, far = (row[:, None] < t) & (column[None, :] < n), row.to(tl.int64)[:, None]
    if z is not None:
        # What backward reads is the rounded pre-activation: forward must have used the same.
        width = 2 * n if PAIR else n
        gate = round_to(gate, z.dtype.element_ty)
        tl.store(z + far * width + column[None, :], gate, mask=mask)
        gate = widen(gate)
        if PAIR:
            up = round_to(up, z.dtype.element_ty)
            tl.store(z + n + far * width + column[None, :], up, mask=mask)
            up = widen(up)
    if PAIR:
        result = activate(gate, "silu") * up
    else:
        result = activate(gate, ACTIVATION)
    store(y + far * n + column[None, :], result, mask)


@triton.jit(do_not_specialize=["t"])
def linear_input_grad_kernel(  # type: ignore[no-untyped-def]
    dy, weight, z, dx, t, n, k, dy_stride, one, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dx [t, n] from dy [t, k] and weight [k, n]; z and dx are 2 n wide for swiglu, the gate first."""
    row, column = place(t, n, BLOCK_M, BLOCK_N, GROUP_M)
    d, _ = product(dy, weight, weight, row, column, t, n, k, dy_stride, one, n, one, BLOCK_K, False)
    mask, far = (row[:, None] < t) & (column[None, :] < n), row.to(tl.int64)[:, None]
    if ACTIVATION == "swiglu":
        at = far * (2 * n) + column[None, :]
        gate, up = load(z + at, mask), load(z + n + at, mask)
        s = sigmoid(gate)
        store(dx + at, d * up * s * (1 + gate * (1 - s)), mask)
        store(dx + n + at, d * gate * s, mask)
    else:
        at = far * n + column[None, :]
        if ACTIVATION != "none":
            d *= slope(load(z + at, mask), ACTIVATION)
        store(dx + at, d, mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/linear.py."""
    _check_weight(x, weight, "x", 1)
    _check_activation(activation)
    (out, k), pair = weight.shape, activation == "swiglu"
    require(not pair or out % 2 == 0, f"weight has {out} rows and swiglu takes gate and up: give it an even number")
    require(
        bias is None or (bias.numel() == out and bias.dtype == x.dtype and bias.is_contiguous() and bias.device == x.device),
        f"bias must be {out} numbers of {named(x.dtype)} beside this weight: convert it",
    )
    flat, n = rows(x), out // 2 if pair else out
    y, z = x.new_empty(with_last(x, n)), x.new_empty(with_last(x, out) if save else (0,))
    t = flat.shape[0]
    args = (flat, weight, bias, y, z if save else None, t, n, k, stride(flat), 1)
    epilogue = replace(SWIGLU if pair else PLAIN, unrounded=bias is not None and activation != "none" and not save)
    launch_gemm(linear_kernel, t, n, epilogue, args, widths=(n, k, stride(flat)), ACTIVATION=activation)
    return y, z


def linear_input_grad(dy: Tensor, weight: Tensor, z: Tensor | None, activation: str) -> Tensor:
    """The same."""
    _check_weight(dy, weight, "dy", 0)
    _check_activation(activation)
    k, n = weight.shape
    flat, wide = rows(dy), 2 * n if activation == "swiglu" else n
    t = flat.shape[0]
    require((activation == "none") == (z is None), f"activation={activation} and z must be given together: pass both or neither")
    require(
        z is None or (list(z.shape) == with_last(dy, wide) and z.dtype == dy.dtype and z.device == dy.device),
        f"z must be {t} rows of {wide} in the dtype of dy: pass the pre-activation that forward saved",
    )
    dx = dy.new_empty(with_last(dy, wide))
    epilogue = {"none": PLAIN, "swiglu": SWIGLU_SLOPE}.get(activation, SLOPE)
    args = (flat, weight, None if z is None else z.contiguous(), dx, t, n, k, stride(flat), 1)
    launch_gemm(linear_input_grad_kernel, t, n, epilogue, args, widths=(n, k, stride(flat)), ACTIVATION=activation)
    return dx


def _check_activation(name: str) -> None:
    require(name in ACTIVATIONS, f"activation={name} must be one of {', '.join(ACTIVATIONS)}: correct it")


def _check_weight(x: Tensor, weight: Tensor, name: str, side: int) -> None:
    check_float(x, name)
    check_same(weight, x, "weight", name)
    require(
        weight.dim() == 2 and weight.is_contiguous(),
        f"weight has shape {list(weight.shape)} and strides {list(weight.stride())} and must be a contiguous [out, in]: call"
        " .contiguous() on it",
    )
    require(
        x.shape[-1] == weight.shape[side],
        f"{name} is {x.shape[-1]} wide and a weight of {list(weight.shape)} expects {weight.shape[side]}: check what feeds it",
    )
