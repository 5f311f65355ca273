"""Linear: the three GEMMs of a weight `[out, in]`.

    y  = x w^T + bias        2 t in out FLOPs
    dx = dy w                2 t in out
    dw = beta dw + dy^T x    2 t in out, accumulated in dw's dtype: fp32 for a main_grad whatever the inputs are
    db = beta db + sum_t dy
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., in] to [..., out]."""
    return F.linear(x, weight, bias)


def linear_input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """[..., out] to [..., in]."""
    return dy @ weight


def linear_weight_grad(dy: Tensor, x: Tensor, out: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """dy [..., out], x [..., in]: the gradient [out, in], added into `out` (scaled by beta first) where given."""
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if out is None:
        return dy2.t() @ x2
    if out.dtype == dy2.dtype:
        return torch.addmm(out, dy2.t(), x2, beta=beta, out=out)
    # A GEMM in the inputs' 16 bits would round the sum before it reaches fp32 (tests/ops/test_linear.py::test_weight_grad_fp32).
    return torch.addmm(out, dy2.t().to(out.dtype), x2.to(out.dtype), beta=beta, out=out)


def linear_bias_grad(dy: Tensor, out: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """dy [..., out]: its sum over the rows, in at least fp32, added into `out` (scaled by beta first) where given."""
    dy2 = dy.reshape(-1, dy.shape[-1])
    if out is None:
        return dy2.sum(0)
    total = dy2.sum(0, dtype=out.dtype)
    return out.add_(total) if beta else out.copy_(total)
