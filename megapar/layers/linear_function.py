"""The autograd functions that join the linear op with the collectives of tensor parallelism.

Backward of a column-parallel layer: the input gradient is computed first, its all-reduce (reduce-scatter with sequence parallelism) is
started, the weight gradient is computed while it runs. Under sequence parallelism only this rank's tokens are saved; all of them are
gathered again while the input gradient is computed. `grads.accumulate` says where weight gradients go, and when. `mlp` is a
column-parallel layer, its activation and a row-parallel layer as one function: the activation and its derivative are computed where the
GEMMs leave their results.

Weights are saved, so that autograd notices one that is written in between, but what is used is the parameter: a checkpoint hands back
what was saved as another tensor, which has no main_grad (tests/test_recompute.py::test_main_grad_is_written_by_the_gemm).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megapar import grads
from megapar.collectives import run_eagerly
from megapar.mesh import Axis
from megapar.ops.linear import linear, linear_activation, linear_bias_grad, linear_forward, linear_input_grad, linear_weight_grad
from megapar.ops.swiglu import swiglu
from megapar.transport import Pending, start_all_gather, start_all_reduce, start_reduce_scatter

Optional = Tensor | None


def column_linear(x: Tensor, weight: Tensor, bias: Optional, axis: Axis, sequence_parallel: bool) -> Tensor:
    """[..., in] replicated (tokens sharded, with sequence_parallel) to [..., out / size]."""
    return _call(_ColumnLinear, x, (weight, bias), axis, sequence_parallel)


def row_linear(x: Tensor, weight: Tensor, bias: Optional, axis: Axis, sequence_parallel: bool, result: bool = True) -> Tensor:
    """[..., in / size] to [..., out] summed over the axis (tokens sharded, with sequence_parallel); not computed without `result`."""
    if not result:
        x, weight, bias = _autocast(x, (weight, bias))
        return run_eagerly(_RowLinear, x, weight, bias, axis, sequence_parallel and axis.size > 1, False)
    return _call(_RowLinear, x, (weight, bias), axis, sequence_parallel)


def mlp(
    x: Tensor,
    expand: tuple[Tensor, Optional],
    down: tuple[Tensor, Optional],
    activation: str,
    axis: Axis,
    sequence_parallel: bool,
    *,
    recompute: bool = False,
    result: bool = True,
) -> Tensor:
    """row_linear(activation(column_linear(x, *expand)), *down); activation "swiglu" or "gelu".

    recompute: the activation is not kept, backward computes it again. Without `result` the row-parallel layer is left out.
    """
    x, *parameters = _autocast(x, (*expand, *down))
    args = (x, *parameters, activation, axis, sequence_parallel and axis.size > 1, recompute, result)
    return _MLP.apply(*args) if _is_plain(parameters, axis) else run_eagerly(_MLP, *args)


def _call(function: Any, x: Tensor, parameters: tuple[Tensor, Optional], axis: Axis, sequence_parallel: bool) -> Tensor:
    x, weight, bias = _autocast(x, parameters)
    if _is_plain((weight, bias), axis):
        return linear(x, weight, bias)
    return run_eagerly(function, x, weight, bias, axis, sequence_parallel and axis.size > 1)


def _is_plain(parameters: Sequence[Optional], axis: Axis) -> bool:
    """Whether nothing is communicated and no main_grad written: the compiler may look inside."""
    return axis.size == 1 and not any(p is not None and grads.has_main_grad(p) for p in parameters)


def _autocast(x: Tensor, parameters: tuple[Optional, ...]) -> tuple[Any, ...]:
    if not torch.is_autocast_enabled(x.device.type):
        return x, *parameters
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(None if p is None else p.to(dtype) for p in parameters)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional, axis: Axis, sharded: bool) -> Tensor:
        ctx.axis, ctx.sharded, ctx.bias = axis, sharded, bias
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.weight = _kept(weight)
        return linear_forward(start_all_gather(x, axis).wait() if sharded else x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        weight = weight if ctx.weight is None else ctx.weight
        return *_column_backward(dy, x, (weight, ctx.bias), ctx.needs_input_grad[:3], ctx.axis, ctx.sharded), None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional, axis: Axis, sharded: bool, result: bool = True) -> Tensor:
        ctx.axis, ctx.sharded, ctx.bias, ctx.t = axis, sharded, bias, x.shape[0]
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.weight = _kept(weight)
        return _row_forward(x, weight, bias, axis, sharded) if result else x.new_empty((*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        weight = weight if ctx.weight is None else ctx.weight
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy, db = _row_gather(dy, ctx.bias, needs_bias, ctx.axis, ctx.t if ctx.sharded else None)
        dx = linear_input_grad(dy, weight) if needs_x else None
        return dx, _weight_grad(weight, dy, lambda: x) if needs_weight else None, db, None, None, None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expand: Tensor,
        expand_bias: Optional,
        down: Tensor,
        down_bias: Optional,
        kind: str,
        axis: Axis,
        sharded: bool,
        recompute: bool,
        result: bool,
    ) -> Tensor:
        full = start_all_gather(x, axis).wait() if sharded else x
        y, z = linear_activation(full, expand, expand_bias, kind)
        ctx.kind, ctx.axis, ctx.sharded, ctx.t, ctx.biases = kind, axis, sharded, full.shape[0], (expand_bias, down_bias)
        keeps_y = down.requires_grad and not recompute
        ctx.save_for_backward(x if expand.requires_grad else None, expand, down, z, y if keeps_y else None)
        ctx.weights = _kept(expand), _kept(down)
        return _row_forward(y, down, down_bias, axis, sharded) if result else y.new_empty((*y.shape[:-1], down.shape[0]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, expand, down, z, y = ctx.saved_tensors
        expand, down = (saved if kept is None else kept for saved, kept in zip((expand, down), ctx.weights, strict=True))
        needs_x, needs_expand, needs_expand_bias, needs_down, needs_down_bias = ctx.needs_input_grad[:5]
        dy, d_down_bias = _row_gather(dy, ctx.biases[1], needs_down_bias, ctx.axis, ctx.t if ctx.sharded else None)
        dz = linear_input_grad(dy, down, z, ctx.kind)
        if y is None and needs_down:
            # Here, and not when a deferred gradient is computed: until then z would be kept, of which swiglu has twice as much.
            y = _activated(z, ctx.kind)
        d_down = _weight_grad(down, dy, lambda: y) if needs_down else None
        needs = (needs_x, needs_expand, needs_expand_bias)
        dx, d_expand, d_expand_bias = _column_backward(dz, x, (expand, ctx.biases[0]), needs, ctx.axis, ctx.sharded)
        return dx, d_expand, d_expand_bias, d_down, d_down_bias, *[None] * 5


def _kept(weight: Tensor) -> Tensor | None:
    """The weight, if it is a parameter; what autocast made of one would be kept for nothing."""
    return weight if weight.is_leaf else None


def _activated(z: Tensor, kind: str) -> Tensor:
    """What `linear_activation` returned beside z, on CPU to the last bit."""
    if kind == "swiglu":
        return swiglu(z)
    # A layer without inputs, whose bias is z: the activation as the fused op computes it, and no GEMM.
    return linear_activation(z.new_empty(1, 0), z.new_empty(z.numel(), 0), z.reshape(-1), kind)[0].view(z.shape)


def _column_backward(
    dy: Tensor, x: Tensor, parameters: tuple[Tensor, Optional], needs: tuple[bool, ...], axis: Axis, sharded: bool
) -> tuple[Optional, Optional, Optional]:
    """The gradients of input, weight and bias; those of the latter two None where they went to main_grad."""
    (weight, bias), (needs_x, needs_weight, needs_bias) = parameters, needs
    gathering = start_all_gather(x, axis) if sharded and needs_weight and not grads.is_deferred(weight) else None
    dx: Optional = None
    reducing: Pending | None = None
    if needs_x:
        dx = linear_input_grad(dy, weight)
        if axis.size > 1:
            reducing = start_reduce_scatter(dx, axis) if sharded else start_all_reduce(dx.contiguous(), axis)

    def whole() -> Tensor:
        return gathering.wait() if gathering is not None else start_all_gather(x, axis).wait() if sharded else x

    dw = _weight_grad(weight, dy, whole) if needs_weight else None
    db = _bias_grad(bias, dy) if bias is not None and needs_bias else None
    return reducing.wait() if reducing is not None else dx, dw, db


def _row_forward(x: Tensor, weight: Tensor, bias: Optional, axis: Axis, sharded: bool) -> Tensor:
    if axis.size == 1:
        return linear_forward(x, weight, bias)
    y = linear_forward(x, weight)
    y = (start_reduce_scatter(y, axis) if sharded else start_all_reduce(y, axis)).wait()
    return y if bias is None else y.add_(bias)


def _row_gather(dy: Tensor, bias: Optional, needs_bias: bool, axis: Axis, t: int | None) -> tuple[Tensor, Optional]:
    """The gradient of all t tokens where this rank was given its share of them (t is None where it has all), and that of the bias."""
    gathering = start_all_gather(dy, axis) if t is not None else None
    # Before the gather ends: the bias was added to this rank's tokens only.
    db = _bias_grad(bias, dy) if bias is not None and needs_bias else None
    return dy if gathering is None else gathering.wait()[:t], db


def _weight_grad(weight: Tensor, dy: Tensor, x: Callable[[], Tensor]) -> Tensor | None:
    """The gradient for autograd to deliver; None where main_grad has it, or will have it."""
    if grads.accumulate(weight, lambda main_grad, beta: linear_weight_grad(dy, x(), main_grad, beta)):
        return None
    return linear_weight_grad(dy, x())


def _bias_grad(bias: Tensor, dy: Tensor) -> Tensor | None:
    if grads.accumulate(bias, lambda main_grad, beta: linear_bias_grad(dy, main_grad, beta)):
        return None
    return linear_bias_grad(dy)
