"""Rotary position embedding (arXiv:2104.09864), half-split as in Llama: element i turns with element i + d/2.

    angle(p, i) = p * theta^(-2 i / d),  0 <= i < d/2
    y_i       = x_i cos - x_{i+d/2} sin
    y_{i+d/2} = x_{i+d/2} cos + x_i sin

The gradient is the rotation by -angle. Moves 2 t n d elements each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope_angles(position_ids: Tensor, d: int, theta: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """position_ids [t] to (cos, sin), each [t, 1, d], the second half of cos and sin repeating the first; in at least fp32.

    The sign of y_i's sine is folded into `sin`, so that a rotation is one multiply and one multiply-add.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequency = theta ** (-torch.arange(0, d, 2, device=position_ids.device, dtype=wide) / d)
    angle = position_ids.to(wide)[:, None, None] * frequency
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[t, n, d] to [t, n, d]: x cos + swap_halves(x) sin, computed in the dtype of cos."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the heads of x, [t, n, d], by the angles of `rope_angles`."""
    return _Rope.apply(x, cos, sin)
