"""Collectives along one Axis, started now and waited for later.

On CUDA they are NCCL's. On CPU, a tensor goes straight from each rank to each other, and what arrives is added in rank order in at least
fp32. For all-gather and reduce-scatter that moves the fewest bytes there are, for an all-reduce as long as the ranks are two; and it
takes one message each way, where gloo's own collectives take several (its reduce-scatter is an all-reduce inside) and round 16-bit sums
at every hop. `benchmarks/overhead.py` measures the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.mesh import Axis

# torch 2.13 renamed these two and warns at each call of the old names; older versions know only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Works = Sequence[dist.Work | None]


class Pending:
    """A collective under way; `wait()` gives its result."""

    def __init__(self, works: Works, finish: Callable[[], Tensor]) -> None:
        self._works, self._finish = works, finish

    def wait(self) -> Tensor:
        for work in self._works:
            if work is not None:
                work.wait()
        return self._finish()


def group_of(axis: Axis) -> dist.ProcessGroup:
    """The axis's process group. Raises ValueError for an axis without one, which torch would take for the whole world."""
    if axis.group is None:
        raise ValueError(f"axis {axis.name} of size {axis.size} only describes a layout: take the axis of a ParallelMesh to communicate")
    return axis.group


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    """Starts summing `x`, contiguous, in place over the axis."""
    if x.device.type != "cpu" or axis.size != 2:
        return Pending([dist.all_reduce(x, group=group_of(axis), async_op=True)], lambda: x)
    other = torch.empty_like(x)
    works = _exchange([x, x], [other, other], axis)
    # a + b is b + a to the last bit, so both ranks hold the same sum.
    return Pending(works, lambda: x.add_(other))


def start_all_gather(x: Tensor, axis: Axis) -> Pending:
    """Starts joining every rank's [c, ...] into [size * c, ...]."""
    x = x.contiguous()
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    if x.device.type != "cpu":
        return Pending([_all_gather(out, x, group=group_of(axis), async_op=True)], lambda: out)
    parts = out.view(axis.size, *x.shape).unbind()
    works = _exchange([x] * axis.size, parts, axis)
    parts[axis.rank].copy_(x)
    return Pending(works, lambda: out)


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Starts summing [t, ...] over the axis; this rank gets rows [rank * c, (rank + 1) * c), c = ceil(t / size), zeros past t."""
    c = -(-x.shape[0] // axis.size)
    if c * axis.size != x.shape[0]:
        x = torch.cat([x, x.new_zeros((c * axis.size - x.shape[0], *x.shape[1:]))])
    x = x.contiguous()
    if x.device.type != "cpu":
        out = x.new_empty((c, *x.shape[1:]))
        return Pending([_reduce_scatter(out, x, group=group_of(axis), async_op=True)], lambda: out)
    mine = x.view(axis.size, c, *x.shape[1:]).unbind()
    received = [torch.empty_like(part) for part in mine]
    received[axis.rank] = mine[axis.rank]
    works = _exchange(mine, received, axis)
    return Pending(works, lambda: _ordered_sum(received))


def _exchange(sends: Sequence[Tensor], receives: Sequence[Tensor], axis: Axis) -> Works:
    """Starts sending sends[r] to every other rank r of the axis, and receiving receives[r] from it. Messages of a pair keep their order."""
    group = group_of(axis)
    others = [(axis.rank + i) % axis.size for i in range(1, axis.size)]
    return [group.recv([receives[r]], r, 0) for r in others] + [group.send([sends[r]], r, 0) for r in others]


def _ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)
