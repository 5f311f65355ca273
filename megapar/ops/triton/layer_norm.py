"""Formula and bytes: megapar/ops/layer_norm.py. Kernels and tiles: norm.py and norm_backward.py."""

from __future__ import annotations

from torch import Tensor

from megapar.ops.triton.norm import forward
from megapar.ops.triton.norm_backward import backward


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/layer_norm.py."""
    y, s, mean, rstd = forward(x, weight, bias, eps, residual, centred=True)
    assert mean is not None
    return y, s, mean, rstd


def layer_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same."""
    dx, dw, db = backward(dy, ds, s, weight, mean, rstd)
    assert db is not None
    return dx, dw, db
