"""What ranks along one Axis do together: the autograd pairs that parallel layers are made of, and agreements of the host.

The pairs are Megatron's f and g (arXiv:1909.08053, section 3) and their sequence-parallel forms (arXiv:2205.05198, section 4.2.2):

    copy_to         identity forward,       all-reduce backward        (f)
    reduce_from     all-reduce forward,     identity backward          (g)
    gather_tokens   all-gather forward,     reduce-scatter backward    (f, sequence parallel)
    scatter_tokens  reduce-scatter forward, all-gather backward        (g, sequence parallel)
    gather_last     all-gather of the last dimension forward, this rank's part backward
    split_last      this rank's part of the last dimension forward, all-gather backward

Sequence parallelism shards dimension 0, padded with zero rows to a multiple of the axis. Nothing here communicates on an axis of size 1.
A process group kills or hangs ranks that disagree on a size, so shapes must agree before a call: `check_same` is how a model's entry
makes sure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megapar.grads import has_main_grad
from megapar.mesh import Axis
from megapar.params import Interval, spec_of
from megapar.transport import host_device, start_all_gather, start_all_reduce, start_reduce_scatter


def all_gather_last(x: Tensor, axis: Axis, parts: Sequence[Interval]) -> Tensor:
    """Joins every rank's [..., parts[rank]] into the whole last dimension. Parts may differ in size: they travel padded."""
    widest = max(stop - start for start, stop in parts)
    sent = x.new_zeros((*x.shape[:-1], widest)) if x.shape[-1] < widest else x.contiguous()
    if x.shape[-1] < widest:
        sent[..., : x.shape[-1]] = x
    out = start_all_gather(sent[None], axis).wait()
    return torch.cat([out[r, ..., : stop - start] for r, (start, stop) in enumerate(parts)], dim=-1)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same dy to other branches, which must not see the sum (test_collectives.py::test_grad_not_modified).
        return start_all_reduce(dy.clone(memory_format=torch.contiguous_format), ctx.axis).wait(), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return start_all_reduce(x.clone(memory_format=torch.contiguous_format), axis).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return start_all_gather(x, axis).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return start_reduce_scatter(dy, ctx.axis).wait(), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.t = axis, x.shape[0]
        return start_reduce_scatter(x, axis).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return start_all_gather(dy, ctx.axis).wait()[: ctx.t], None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, parts: Sequence[Interval]) -> Tensor:
        ctx.part = parts[axis.rank]
        return all_gather_last(x, axis, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy[..., ctx.part[0] : ctx.part[1]].contiguous(), None, None


class _SplitLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, parts: Sequence[Interval]) -> Tensor:
        ctx.axis, ctx.parts = axis, parts
        start, stop = parts[axis.rank]
        return x[..., start:stop].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_last(dy, ctx.axis, ctx.parts), None, None


def run_eagerly(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, as a graph break under torch.compile.

    The compiler must not look inside: it would trace a collective, or a write to main_grad, that it cannot order
    (tests/layers/test_compile.py).
    """
    return _run_uncompiled(function, *args) if torch.compiler.is_compiling() else function.apply(*args)


@torch.compiler.disable
def _run_uncompiled(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """The replicated input of a column-parallel GEMM: its gradient is summed over the axis."""
    return x if axis.size == 1 else run_eagerly(_CopyTo, x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """The output of a row-parallel GEMM, a partial sum on each rank: summed over the axis."""
    return x if axis.size == 1 else run_eagerly(_ReduceFrom, x, axis)


def gather_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Sharded tokens [c, ...] to all of them [size * c, ...]; the gradient is summed and sharded."""
    return x if axis.size == 1 else run_eagerly(_GatherTokens, x, axis)


def scatter_tokens(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [t, ...] to this rank's share of the total, [ceil(t / size), ...]."""
    return x if axis.size == 1 else run_eagerly(_ScatterTokens, x, axis)


def gather_last(x: Tensor, axis: Axis, parts: Sequence[Interval]) -> Tensor:
    """This rank's part of the last dimension to the whole of it; `parts` are the ranks' intervals."""
    return x if axis.size == 1 else run_eagerly(_GatherLast, x, axis, parts)


def split_last(x: Tensor, axis: Axis, parts: Sequence[Interval]) -> Tensor:
    """The last dimension, replicated, to this rank's part of it; `parts` are the ranks' intervals."""
    return x if axis.size == 1 else run_eagerly(_SplitLast, x, axis, parts)


def with_summed_grad(param: Tensor) -> Tensor:
    """The parameter as a layer should use it: where its gradient is partial and autograd delivers it, it arrives summed.

    With a main_grad the partial sums are accumulated and summed once, at the end of the step (`grads.MainGrads.finish`).
    """
    spec = spec_of(param)
    if spec is None or spec.grad_sum is None or has_main_grad(param):
        return param
    return copy_to(param, spec.grad_sum)


def gather_json(value: Any, axis: Axis) -> list[Any]:
    """Every rank's JSON-able value, by rank. Two collectives; for the host side of things, not for a training step."""
    if axis.size == 1:
        return [value]
    device = host_device(axis)
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = start_all_gather(torch.tensor([payload.numel()], device=device), axis).wait().tolist()
    sent = torch.zeros((1, max(sizes)), dtype=torch.uint8, device=device)
    sent[0, : payload.numel()] = payload
    received = start_all_gather(sent, axis).wait().cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(received, sizes, strict=True)]


def check_same(value: Any, axis: Axis, what: str) -> None:
    """Raises the same ValueError on every rank unless all ranks of the axis hold the same JSON-able `value`."""
    values = gather_json(value, axis)
    if any(v != values[0] for v in values):
        told = ", ".join(f"rank {axis.ranks[i]}: {v}" for i, v in enumerate(values))
        raise ValueError(f"{what} must be the same on all ranks of {axis.name} and differs ({told}): give each rank the same")


def raise_together(error: Exception | None, axis: Axis) -> None:
    """Raises on every rank if `error` is set on any: the first failing rank's sentence, so that none is left waiting."""
    for rank, told in enumerate(gather_json(None if error is None else str(error), axis)):
        if told is not None:
            if error is not None and rank == axis.rank:
                raise error
            raise ValueError(told)
