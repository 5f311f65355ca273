"""Formula and bytes: megapar/ops/rms_norm.py. Kernels and tiles: norm.py and norm_backward.py."""

from __future__ import annotations

from torch import Tensor

from megapar.ops.triton.norm import forward
from megapar.ops.triton.norm_backward import backward


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/rms_norm.py."""
    y, s, _, rstd = forward(x, weight, None, eps, residual, centred=False)
    return y, s, rstd


def rms_norm_backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The same."""
    dx, dw, _ = backward(dy, ds, s, weight, None, rstd)
    return dx, dw
