"""Rotary position embedding (arXiv:2104.09864), half-split as in Llama: element i of a head turns with element i + d/2.

    angle(p, i) = p * theta^(-2 i / d),  0 <= i < d/2
    y_i       = x_i cos - x_{i+d/2} sin
    y_{i+d/2} = x_{i+d/2} cos + x_i sin

for the heads of q and k; those of v are left as they are. The gradient is the rotation by -angle. One pass reads the rows of the fused
projection and writes each head's tokens one after the other, as attention wants them; its gradient goes the same way back. Moves
2 t (q_heads + 2 kv_heads) d elements each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference

Heads = tuple[Tensor, Tensor, Tensor]


def rope_angles(position_ids: Tensor, d: int, theta: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """position_ids [t] to (cos, sin), each [t, d/2], in fp32, or fp64 for that `dtype`.

    The angle itself is fp64: fp32 would be off by 0.004 at position 100,000.
    """
    frequency = theta ** (-torch.arange(0, d, 2, device=position_ids.device, dtype=torch.float64) / d)
    angle = position_ids.to(torch.float64)[:, None] * frequency
    wide = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(wide), angle.sin().to(wide)


def rope_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, *, b: int, q_heads: int, kv_heads: int) -> Heads:
    """qkv [t, (q_heads + 2 kv_heads) d] of b sequences to q [b, q_heads, s, d], k and v [b, kv_heads, s, d], q and k turned.

    cos and sin [t, d/2] from `rope_angles`; t = b s tokens, b-major. Raises ValueError for shapes that do not match.
    """
    out: Heads = _RopeQKV.apply(qkv, cos, sin, b, q_heads, kv_heads)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., n, d] by the angles of cos and sin, [..., d/2], in their dtype."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    low, high = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


def rope_qkv_reference(qkv: Tensor, cos: Tensor, sin: Tensor, b: int, q_heads: int, kv_heads: int) -> Heads:
    """The formula, on [t, heads, d]."""
    t, d = qkv.shape[0], 2 * cos.shape[1]
    qk, v = qkv.view(t, -1, d).split([q_heads + kv_heads, kv_heads], 1)
    q, k = rotate(qk, cos, sin).split([q_heads, kv_heads], 1)
    q, k, v = (z.reshape(b, t // b, -1, d).transpose(1, 2).contiguous() for z in (q, k, v))
    return q, k, v


def rope_qkv_backward_reference(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[t, (q_heads + 2 kv_heads) d]."""
    dq, dk, dv = (z.transpose(1, 2).reshape(cos.shape[0], -1, z.shape[-1]) for z in (dq, dk, dv))
    return torch.cat([rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv], 1).view(cos.shape[0], -1)


class _RopeQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, b: int, q_heads: int, kv_heads: int) -> Heads:
        ctx.save_for_backward(cos, sin)
        run = rope_qkv_reference if use_reference(qkv) else torch.ops.megapar.rope_qkv.default
        return run(qkv, cos, sin, b, q_heads, kv_heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        run = rope_qkv_backward_reference if use_reference(dq) else torch.ops.megapar.rope_qkv_backward.default
        return run(dq, dk, dv, *ctx.saved_tensors), None, None, None, None, None


@torch.library.register_fake("megapar::rope_qkv")
def _(qkv: Tensor, cos: Tensor, sin: Tensor, b: int, q_heads: int, kv_heads: int) -> Heads:
    s, d = qkv.shape[0] // b, 2 * cos.shape[1]
    q, k, v = (qkv.new_empty(b, n, s, d) for n in (q_heads, kv_heads, kv_heads))
    return q, k, v


@torch.library.register_fake("megapar::rope_qkv_backward")
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(cos.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[3])
