"""RMSNorm and LayerNorm that know sequence parallelism: each rank then sees some of the tokens, so the gradient of the gain is partial.

Both take a `residual` to add first, and then return the sum beside its norm: y, s = norm(x, residual) is s = x + residual, y = norm(s).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megapar.collectives import with_summed_grad
from megapar.mesh import TensorParallel, as_axis
from megapar.ops.layer_norm import layer_norm
from megapar.ops.rms_norm import Output, rms_norm
from megapar.params import Init, ParamSpec, Piece, SpecParameter


class RMSNorm(nn.Module):
    """[..., hidden_size] to the same, normalised to unit root mean square and scaled by `weight`, initially ones (arXiv:1910.07467)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-6,
        tp: TensorParallel = None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _vector("weight", hidden_size, 1.0, tp, sequence_parallel, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Output:
        x, residual = _autocast(x, residual)
        return rms_norm(x, with_summed_grad(self.weight), self.eps, residual)


class LayerNorm(nn.Module):
    """[..., hidden_size] to the same, normalised to mean 0 and variance 1, then scaled and shifted (arXiv:1607.06450)."""

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        tp: TensorParallel = None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _vector("weight", hidden_size, 1.0, tp, sequence_parallel, device, dtype)
        self.bias = _vector("bias", hidden_size, 0.0, tp, sequence_parallel, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Output:
        x, residual = _autocast(x, residual)
        return layer_norm(x, with_summed_grad(self.weight), with_summed_grad(self.bias), self.eps, residual)


def _autocast(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Under autocast layers return 16 bits beside an fp32 residual, and their sum is fp32 as anywhere in torch."""
    if residual is None or residual.dtype == x.dtype or not torch.is_autocast_enabled(x.device.type):
        return x, residual
    wide = torch.promote_types(x.dtype, residual.dtype)
    return x.to(wide), residual.to(wide)


def constant(value: float) -> Init:
    """Every element `value`."""

    def init(full: Tensor, generator: torch.Generator | None) -> None:
        full.fill_(value)

    return init


def _vector(
    name: str,
    size: int,
    value: float,
    tp: TensorParallel,
    sequence_parallel: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    axis = as_axis(tp)
    partial = axis if sequence_parallel and axis.size > 1 else None
    spec = ParamSpec((Piece.whole(name, (size,)),), constant(value), partial, owner=axis.rank == 0, decay=False)
    return SpecParameter.of(torch.full((size,), value, device=device, dtype=dtype), spec)
