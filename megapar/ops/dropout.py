"""Dropout (arXiv:1207.0580) whose mask is a function of where an element is, and of nothing else:

    y = x / (1 - p) where hash(key, row, column) >= p 2^32, else 0

    key = a hash of (seed, layer, site);  row = a hash of (sample_index, position);  column = the feature, or the head and key

so that any layout, number of threads, shard of the features or recomputation draws the same mask, and nothing is kept for backward, which
is the same op on dy. p is rounded to a multiple of 2^-32. Moves 2 t h elements each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference

_M64 = (1 << 64) - 1


def dropout(x: Tensor, p: float, rows: Tensor, key: int, column: int = 0) -> Tensor:
    """x [..., h] to the same. rows int64 [...] or [t] from `dropout_rows`, key from `dropout_key`, column that of x[..., 0].

    Raises ValueError unless 0 <= p < 1, there is one row key for each row, and columns lie in [0, 2^32).
    """
    y: Tensor = _Dropout.apply(x, rows, key, p, column)
    return y


def dropout_key(seed: int, layer: int, site: int) -> int:
    """An int64 for one use of dropout."""
    mixed = 0
    for part in (seed, layer, site):
        mixed = _mix64((mixed + part + 0x9E3779B97F4A7C15) & _M64)
    return mixed - (1 << 64) if mixed >> 63 else mixed


def dropout_rows(sample_index: Tensor, position: Tensor) -> Tensor:
    """int64 of each row, from the sample's number in the data and the position in it, both int64 of one shape."""
    return _mix64_tensor(_mix64_tensor(sample_index + 1) + position)


def dropout_reference(x: Tensor, rows: Tensor, key: int, p: float, column: int) -> Tensor:
    """The formula, in int64 arithmetic."""
    h = x.shape[-1]
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p={p} must lie in [0, 1): lower it")
    if rows.numel() * h != x.numel():
        raise ValueError(f"rows has shape {tuple(rows.shape)} and x {tuple(x.shape)}: give one int64 for each row of x")
    mixed = _mix64_tensor(rows.reshape(*x.shape[:-1], 1) ^ key)
    low, high = mixed & 0xFFFFFFFF, _shift(mixed, 32)
    columns = torch.arange(column, column + h, device=x.device)
    kept = _mix32_tensor(_mix32_tensor((columns + low) & 0xFFFFFFFF) ^ high) >= min(round(p * 2**32), 2**32 - 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.tensor(1 / (1 - p), dtype=wide, device=x.device)
    return torch.where(kept, x.to(wide) * scale, 0.0).to(x.dtype)


def _mix64(x: int) -> int:
    """As in csrc/common/hash.inl."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _M64
    return x ^ x >> 31


def _mix64_tensor(x: Tensor) -> Tensor:
    """The same on int64, which wraps around."""
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _mix32_tensor(x: Tensor) -> Tensor:
    """As in csrc/common/hash.inl, on int64 in [0, 2^32)."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def _shift(x: Tensor, by: int) -> Tensor:
    """Bits move right and zeros follow, where >> of an int64 repeats the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, key: int, p: float, column: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.options = key, p, column
        return _run(x, rows, key, p, column)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _run(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _run(x: Tensor, rows: Tensor, key: int, p: float, column: int) -> Tensor:
    run = dropout_reference if use_reference(x) else torch.ops.megapar.dropout.default
    return run(x, rows, key, p, column)


@torch.library.register_fake("megapar::dropout")
def _(x: Tensor, rows: Tensor, key: int, p: float, column: int) -> Tensor:
    return x.new_empty(x.shape)
