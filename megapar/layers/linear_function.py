"""The autograd functions that join the linear op with the collectives of tensor parallelism.

Backward of a column-parallel layer: the input gradient is computed first, its all-reduce (reduce-scatter with sequence parallelism) is
started, the weight gradient is computed while it runs. Under sequence parallelism only this rank's tokens are saved; all of them are
gathered again while the input gradient is computed. Weight gradients go where `grads.target` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar import grads
from megapar.collectives import run_eagerly
from megapar.mesh import Axis
from megapar.ops.linear import linear, linear_bias_grad, linear_input_grad, linear_weight_grad
from megapar.transport import Pending, start_all_gather, start_all_reduce, start_reduce_scatter

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, None, None]


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sequence_parallel: bool) -> Tensor:
    """[..., in] replicated (tokens sharded, with sequence_parallel) to [..., out / size]."""
    return _call(_ColumnLinear, x, weight, bias, axis, sequence_parallel)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sequence_parallel: bool) -> Tensor:
    """[..., in / size] to [..., out] summed over the axis (tokens sharded, with sequence_parallel)."""
    return _call(_RowLinear, x, weight, bias, axis, sequence_parallel)


def _call(function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sequence_parallel: bool) -> Tensor:
    if axis.size == 1 and getattr(weight, "main_grad", None) is None:
        return linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return run_eagerly(function, x, weight, bias, axis, sequence_parallel and axis.size > 1)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sharded: bool) -> Tensor:
        ctx.axis, ctx.sharded, ctx.bias = axis, sharded, bias
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return linear(start_all_gather(x, axis).wait() if sharded else x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        gathering = start_all_gather(x, ctx.axis) if ctx.sharded and needs_weight else None
        dx: Tensor | None = None
        reducing: Pending | None = None
        if needs_x:
            dx = linear_input_grad(dy, weight)
            if ctx.axis.size > 1:
                reducing = start_reduce_scatter(dx, ctx.axis) if ctx.sharded else start_all_reduce(dx.contiguous(), ctx.axis)
        if gathering is not None:
            x = gathering.wait()
        dw = _weight_grad(weight, dy, x) if needs_weight else None
        db = _bias_grad(ctx.bias, dy) if needs_bias else None
        return reducing.wait() if reducing is not None else dx, dw, db, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis, sharded: bool) -> Tensor:
        ctx.axis, ctx.sharded, ctx.bias, ctx.t = axis, sharded, bias, x.shape[0]
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        if axis.size == 1:
            return linear(x, weight, bias)
        y = linear(x, weight)
        y = (start_reduce_scatter(y, axis) if sharded else start_all_reduce(y, axis)).wait()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        gathering = start_all_gather(dy, ctx.axis) if ctx.sharded else None
        # Before the gather ends: the bias was added to this rank's tokens only.
        db = _bias_grad(ctx.bias, dy) if needs_bias else None
        if gathering is not None:
            dy = gathering.wait()[: ctx.t]
        dx = linear_input_grad(dy, weight) if needs_x else None
        dw = _weight_grad(weight, dy, x) if needs_weight else None
        return dx, dw, db, None, None


def _weight_grad(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    main_grad, beta = grads.target(weight)
    grad = linear_weight_grad(dy, x, main_grad, beta)
    return grad if main_grad is None else None


def _bias_grad(bias: Tensor, dy: Tensor) -> Tensor | None:
    main_grad, beta = grads.target(bias)
    grad = linear_bias_grad(dy, main_grad, beta)
    return grad if main_grad is None else None
