"""Tensors of any leading dimensions and strides as the rows that kernels take: csrc/cpu/linear.cpp's, for both."""

from __future__ import annotations

from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """x [..., n] as [t, n] with the last dimension contiguous; a copy only where it is not."""
    flat = x[None] if x.dim() == 1 else x if x.dim() == 2 else x.flatten(0, -2)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def stride(x: Tensor) -> int:
    """From row to row; where there is one, what a second would start at."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def with_last(x: Tensor, width: int) -> list[int]:
    """The shape of x, but for the last dimension."""
    return [*x.shape[:-1], width]
