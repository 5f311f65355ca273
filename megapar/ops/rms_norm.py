"""RMSNorm (arXiv:1910.07467), optionally of a sum: s = x + residual, rounded to their dtype, and from what was rounded

    rstd = 1 / sqrt(mean_h(s^2) + eps)
    y    = s rstd weight

    dx = d_residual = ds + rstd (dy weight - z mean_h(dy weight z)),  z = s rstd
    dw = sum_t dy z

with statistics and sums in at least fp32. Moves 2 t h elements forward (read x, write y; with a residual 4: read it, write s) and 3
backward (read dy and s, write dx; 4 with a residual).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference

Output = Tensor | tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Output:
    """[..., h] to y [..., h]; with `residual` [..., h] to (y, s). weight [h], in the dtype of x or fp32.

    Raises ValueError for shapes or dtypes that do not match.
    """
    out: Output = _RMSNorm.apply(x, weight, eps, residual)
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, s, rstd), s without elements where there is no residual. Squares above the range of fp32 overflow, which the kernels avoid."""
    s = x if residual is None else x + residual
    z = s.to(torch.promote_types(s.dtype, torch.float32))
    rstd = (z.square().mean(-1) + eps).rsqrt()
    y = (z * rstd[..., None] * weight).to(x.dtype)
    return y, x.new_empty(0) if residual is None else s, rstd


def rms_norm_backward_reference(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dw)."""
    d, z = dy.to(rstd.dtype), s.to(rstd.dtype) * rstd[..., None]
    g = d * weight
    dx = rstd[..., None] * (g - z * (g * z).mean(-1, keepdim=True))
    dw = (d * z).reshape(-1, s.shape[-1]).sum(0)
    return (dx if ds is None else dx + ds).to(s.dtype), dw.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Output:
        run = rms_norm_reference if use_reference(x) else torch.ops.megapar.rms_norm.default
        y, s, rstd = run(x, weight, eps, residual)
        ctx.save_for_backward(x if residual is None else s, weight, rstd)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        if dy is None:
            return ds, None, None, ds
        run = rms_norm_backward_reference if use_reference(dy) else torch.ops.megapar.rms_norm_backward.default
        dx, dw = run(dy, ds, *ctx.saved_tensors)
        return dx, dw, None, dx if ctx.needs_input_grad[3] else None


@torch.library.register_fake("megapar::rms_norm")
def _(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("megapar::rms_norm_backward")
def _(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape)
