"""Formula and bytes: megapar/ops/rope.py.

A program takes TOKENS tokens and HALF of the d/2 angles, which it keeps in registers for up to HEADS heads of q, of k, or of v: the angles,
fp32 and as many bytes as a head of bf16, come from L2 once for eight heads. TOKENS x HALF is 1024: for each half of a head a thread has 8
elements, a 128-bit access of 16 bits. q, k and v are apart in the grid, because a pointer chosen at run time has lost its alignment.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_float, check_same, named, require
from megapar.ops.triton.floats import load, store
from megapar.ops.triton.launch import ceil_div, launch

HEADS, ELEMENTS, NUM_WARPS = 8, 1024, 4


def columns(half: int) -> int:
    """HALF: one block for heads of up to 256."""
    return min(max(triton.next_power_of_2(half), 32), 128)


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    packed, apart, heads, first, s, half, b_stride, n_stride, s_stride, token, column, mask, c, z, TURNS: tl.constexpr, BACK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Heads [first, first + HEADS) of a part of qkv, of which `packed` are the rows: to `apart`, or BACK from there. c, z: cos and sin."""
    apart += (token // s) * b_stride + (token % s) * s_stride + column
    for head in range(first, tl.minimum(first + HEADS, heads)):
        row, own = packed + tl.cast(head, tl.int64) * 2 * half + column, apart + tl.cast(head, tl.int64) * n_stride
        a, b = (load(own, mask), load(own + half, mask)) if BACK else (load(row, mask), load(row + half, mask))
        if TURNS:
            a, b = (a * c + b * z, b * c - a * z) if BACK else (a * c - b * z, b * c + a * z)
        if BACK:
            store(row, a, mask)
            store(row + half, b, mask)
        else:
            store(own, a, mask)
            store(own + half, b, mask)


@triton.jit(do_not_specialize=["t", "s"])
def rope_qkv_kernel(  # type: ignore[no-untyped-def]
    qkv, q, k, v, cos, sin, t, s, units, stride, q_heads, kv_heads, qb, qn, qs, kb, kn, ks, vb, vn, vs, BACK: tl.constexpr,
    TOKENS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """qkv: rows `stride` apart of q, k and v heads of 2 half elements; cos, sin [t, half]; qb to vs: strides of a batch, head and token.

    half = units UNIT: Triton looks at divisibility by 16 alone, and 40, of heads of 80, is divisible by 8, which is enough for 128 bits.
    """
    half = units * UNIT
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    column = (tl.program_id(2) * HALF + tl.arange(0, HALF))[None, :]
    mask = (token < t) & (column < half)
    packed, group = qkv + token * stride, tl.program_id(1)
    q_groups, kv_groups = tl.cdiv(q_heads, HEADS), tl.cdiv(kv_heads, HEADS)
    if group < q_groups + kv_groups:
        c, z = load(cos + token * half + column, mask), load(sin + token * half + column, mask)
        if group < q_groups:
            _move(packed, q, q_heads, group * HEADS, s, half, qb, qn, qs, token, column, mask, c, z, True, BACK, HEADS)
        else:
            first = (group - q_groups) * HEADS
            _move(packed + q_heads * 2 * half, k, kv_heads, first, s, half, kb, kn, ks, token, column, mask, c, z, True, BACK, HEADS)
    else:
        first = (group - q_groups - kv_groups) * HEADS
        packed += (q_heads + kv_heads) * 2 * half
        _move(packed, v, kv_heads, first, s, half, vb, vn, vs, token, column, mask, 0.0, 0.0, False, BACK, HEADS)


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, b: int, q_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/rope.py."""
    check_float(qkv, "qkv")
    require(qkv.dim() == 2, f"qkv has shape {list(qkv.shape)} and must be [t, (q_heads + 2 kv_heads) d]: flatten it")
    t, width = qkv.shape
    require(b > 0 and t % b == 0, f"b={b} must divide the {t} rows of qkv: correct it")
    _check_angles(cos, sin, qkv, t)
    d = 2 * cos.shape[1]
    require(
        q_heads >= 0 and kv_heads >= 0 and (q_heads + 2 * kv_heads) * d == width,
        f"qkv is {width} wide and must hold {q_heads} + 2 * {kv_heads} heads of {d}: correct the heads",
    )
    qkv = _dense_rows(qkv)
    q, k, v = (qkv.new_empty(b, n, t // b, d) for n in (q_heads, kv_heads, kv_heads))
    _launch(qkv, (q, k, v), cos, sin, back=False)
    return q, k, v


def rope_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same."""
    check_float(dq, "dq")
    check_same(dk, dq, "dk", "dq")
    check_same(dv, dq, "dv", "dq")
    require(
        dq.dim() == 4 and dk.dim() == 4 and dk.shape == dv.shape and (dq.shape[0], *dq.shape[2:]) == (dk.shape[0], *dk.shape[2:]),
        f"dq, dk and dv have shapes {list(dq.shape)}, {list(dk.shape)} and {list(dv.shape)}: they must be [b, heads, s, d]",
    )
    b, q_heads, s, d = dq.shape
    _check_angles(cos, sin, dq, b * s)
    require(2 * cos.shape[1] == d, f"cos is {cos.shape[1]} wide and must be half of the head size {d}")
    qkv = dq.new_empty(b * s, (q_heads + 2 * dk.shape[1]) * d)
    _launch(qkv, tuple(_dense_rows(x) for x in (dq, dk, dv)), cos, sin, back=True)
    return qkv


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_angles(cos: Tensor, sin: Tensor, x: Tensor, t: int) -> None:
    """Of t tokens, in fp32."""
    require(
        cos.dtype == sin.dtype == torch.float32,
        f"cos and sin have dtypes {named(cos.dtype)} and {named(sin.dtype)}: they must be float32",
    )
    require(
        cos.dim() == 2 and cos.shape == sin.shape and cos.shape[0] == t and cos.shape[1] > 0,
        f"cos and sin have shapes {list(cos.shape)} and {list(sin.shape)}: they must be [t, d / 2] with t = {t}",
    )
    require(cos.device == sin.device == x.device, f"cos is on {cos.device}, sin on {sin.device} and the heads on {x.device}: move them")


def _launch(qkv: Tensor, apart: tuple[Tensor, ...], cos: Tensor, sin: Tensor, *, back: bool) -> None:
    t, half, q_heads, kv_heads = qkv.shape[0], cos.shape[1], apart[0].shape[1], apart[1].shape[1]
    block = columns(half)
    grid = (ceil_div(t, ELEMENTS // block), ceil_div(q_heads, HEADS) + 2 * ceil_div(kv_heads, HEADS), ceil_div(half, block))
    strides = (x.stride(i) for x in apart for i in range(3))
    unit = 1 if half % 8 else 8
    sizes = (t, apart[0].shape[2], half // unit, qkv.stride(0), q_heads, kv_heads)
    options: dict[str, Any] = {"BACK": back, "TOKENS": ELEMENTS // block, "HALF": block, "HEADS": HEADS, "UNIT": unit}
    options["num_warps"] = NUM_WARPS
    launch(rope_qkv_kernel, grid, qkv, *apart, cos.contiguous(), sin.contiguous(), *sizes, *strides, **options)
