"""LayerNorm (arXiv:1607.06450), optionally of a sum: s = x + residual, rounded to their dtype, and from what was rounded

    mean = mean_h(s),  rstd = 1 / sqrt(mean_h((s - mean)^2) + eps)
    y    = (s - mean) rstd weight + bias

    dx = d_residual = ds + rstd (g - mean_h(g) - z mean_h(g z)),  g = dy weight,  z = (s - mean) rstd
    dw = sum_t dy z,  db = sum_t dy

with statistics and sums in at least fp32. Moves what RMSNorm moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference
from megapar.ops.rms_norm import Output


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Output:
    """[..., h] to y [..., h]; with `residual` [..., h] to (y, s). weight and bias [h], in the dtype of x or fp32.

    Raises ValueError for shapes or dtypes that do not match.
    """
    out: Output = _LayerNorm.apply(x, weight, bias, eps, residual)
    return out


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean, rstd), s without elements where there is no residual. Squares above the range of fp32 overflow."""
    s = x if residual is None else x + residual
    z = s.to(torch.promote_types(s.dtype, torch.float32))
    mean = z.mean(-1)
    z = z - mean[..., None]
    rstd = (z.square().mean(-1) + eps).rsqrt()
    y = z * rstd[..., None] * weight
    return (y if bias is None else y + bias).to(x.dtype), x.new_empty(0) if residual is None else s, mean, rstd


def layer_norm_backward_reference(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db)."""
    d, z = dy.to(rstd.dtype), (s.to(rstd.dtype) - mean[..., None]) * rstd[..., None]
    g = d * weight
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True))
    dw, db = ((d * factor).reshape(-1, s.shape[-1]).sum(0).to(weight.dtype) for factor in (z, 1))
    return (dx if ds is None else dx + ds).to(s.dtype), dw, db


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Output:
        run = layer_norm_reference if use_reference(x) else torch.ops.megapar.layer_norm.default
        y, s, mean, rstd = run(x, weight, bias, eps, residual)
        ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, ds: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, Tensor | None]:
        if dy is None:
            return ds, None, None, None, ds
        run = layer_norm_backward_reference if use_reference(dy) else torch.ops.megapar.layer_norm_backward.default
        dx, dw, db = run(dy, ds, *ctx.saved_tensors)
        return dx, dw, db if ctx.needs_input_grad[2] else None, None, dx if ctx.needs_input_grad[4] else None


@torch.library.register_fake("megapar::layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


@torch.library.register_fake("megapar::layer_norm_backward")
def _(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return s.new_empty(s.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)
