"""Collectives and messages along one Axis, started now and waited for later.

On CUDA they are NCCL's. On CPU every rank gets every other's tensor and adds them itself, in rank order, in at least fp32: through memory
that the ranks of a host share (`megapar.shared_memory`), along dp piece by piece; where there is none, or the tensor does not fit along
tp, as one message to each. Messages along pp go through shared memory too (`megapar.channels`), large ones through the process group.
gloo's own collectives take several messages each (its reduce-scatter is an all-reduce inside) and round 16-bit sums at every hop
(`benchmarks/overhead.py`). An all-reduce of a large tensor over more than two ranks is gloo's, which sends less.

Whatever goes wrong with another rank raises CommunicationError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.channels import Message
from megapar.mesh import DP_TAGS, GATHER, Axis
from megapar.shared_memory import CommunicationError, Kind, SharedMemory

# torch 2.13 renamed these two and warns at each call of the old names; older versions know only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

PIECES_AHEAD = 2
"""Of a large collective through shared memory, how many pieces are posted before it is waited for."""
NEVER = 2**31 - 1
"""The tag of no message."""

Work = dist.Work | Message
"""A message that one may have to wait for."""


class Pending(Protocol):
    """A collective under way; `wait()` gives its result."""

    def wait(self) -> Tensor: ...


class _Messages:
    """A collective made of messages, or the process group's own."""

    def __init__(self, works: Sequence[Work | None], finish: Callable[[], Tensor]) -> None:
        self._works, self._finish = works, finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        if self._result is None:
            for work in self._works:
                wait(work)
            self._result = self._finish()
        return self._result


def group_of(axis: Axis) -> dist.ProcessGroup:
    """The axis's process group. Raises ValueError for an axis without one, which torch would take for the whole world."""
    if axis.group is None:
        raise ValueError(f"axis {axis.name} of size {axis.size} only describes a layout: take the axis of a ParallelMesh to communicate")
    return axis.group


def host_device(axis: Axis) -> torch.device:
    """Where small tensors must be that hosts tell each other: on the CPU, unless the axis's group has NCCL alone."""
    return torch.device("cuda" if axis.group is not None and dist.get_backend(axis.group) == "nccl" else "cpu")


def wait(work: Work | None) -> None:
    """Waits for what was started, if there is need to. Raises CommunicationError if the other rank is gone or does not come in time."""
    try:
        if work is not None:
            work.wait()
    except CommunicationError:
        raise
    except RuntimeError as error:
        raise CommunicationError(str(error)) from error


def start_send(x: Tensor, axis: Axis, rank: int, tag: int) -> Work | None:
    """Starts sending contiguous `x` to rank `rank` of the axis. The caller keeps `x` until it has waited; None: no longer.

    On CPUs a receive takes the message of its tag. NCCL knows no tags: there the messages of two ranks need one order on both.
    """
    if axis.channels is not None and x.device.type == "cpu" and axis.channels.take(x):
        axis.channels.send(x, rank, tag)
        return None
    try:
        return group_of(axis).send([x], rank, tag)
    except RuntimeError as error:
        raise CommunicationError(str(error)) from error


def start_receive(out: Tensor, axis: Axis, rank: int, tag: int) -> Work:
    """Starts filling contiguous `out` with the message of this tag from rank `rank` of the axis, of the same size."""
    if axis.channels is not None and out.device.type == "cpu" and axis.channels.take(out):
        return axis.channels.receive(out, rank, tag)
    try:
        return group_of(axis).recv([out], rank, tag)
    except RuntimeError as error:
        raise CommunicationError(str(error)) from error


def flush(axis: Axis) -> None:
    """Waits until what `start_send` gave no work for has arrived."""
    if axis.channels is not None:
        axis.channels.flush()


def close_connections(axis: Axis) -> None:
    """Ends every wait of the axis's other ranks for this one, now and later, with an error. Nothing can be sent any more.

    Neither destroying a gloo group nor aborting it closes its connections. A receive that times out closes them all.
    """
    for memory in axis.memory.values():
        memory.leave()
    if axis.channels is not None:
        axis.channels.leave()
    for subset in axis.subsets():
        close_connections(subset)
    if axis.group is None:
        return
    if "nccl" in dist.get_backend(axis.group):
        axis.group._get_backend(torch.device("cuda")).abort()
    never_sent = torch.empty(1)
    for rank in range(axis.size):
        # One that is closed already raises at once and closes no other. A group of NCCL alone sends nothing from the host.
        with suppress(RuntimeError):
            if rank != axis.rank:
                axis.group.recv([never_sent], rank, NEVER).wait(timedelta(milliseconds=1))


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    """Starts summing `x`, contiguous, in place over the axis."""
    memory = _memory(x, axis)
    if memory is not None:
        return memory.start(Kind.ALL_REDUCE, x, lambda parts: _ordered_sum(parts, x))
    if x.device.type != "cpu" or axis.size != 2:
        return _Messages([dist.all_reduce(x, group=group_of(axis), async_op=True)], lambda: x)
    other = torch.empty_like(x)
    works = _exchange([x, x], [other, other], axis)
    # a + b is b + a to the last bit, so both ranks hold the same sum.
    return _Messages(works, lambda: x.add_(other))


def start_all_gather(x: Tensor, axis: Axis, tag: int = 0) -> Pending:
    """Starts joining every rank's [c, ...] into [size * c, ...]. Between processes, collectives of one tag keep their order."""
    x = x.contiguous()
    memory = _memory(x, axis, tag)
    return _gather(x, axis, tag) if memory is None else memory.start(Kind.ALL_GATHER, x, torch.cat)


def start_gather(row: Tensor, axis: Axis, write: Callable[[slice, Sequence[Tensor] | Tensor], object], *, subject: int) -> Pending:
    """Starts fetching every rank's [c] along dp, where all ranks start such gathers in one order; `row` stays as it is until the end.

    By the time this has been waited for, or earlier, `write(columns, parts)` has been given all columns, some at a time, of each rank, in
    memory that is used again. subject: above 0, what is gathered: between CPUs, ranks that differ in it raise CommunicationError instead of
    taking one's for the other's.
    """
    memory = _memory(row, axis, GATHER, whole=False)
    if memory is not None:
        return _Pieces(memory, Kind.ALL_GATHER, row.view(1, -1), lambda at, parts: write(at, [part[0] for part in parts]), row, subject)
    pending = _gather(row, axis, GATHER + subject)

    def finish() -> Tensor:
        write(slice(0, row.numel()), pending.wait().view(axis.size, row.numel()))
        return row

    return _Messages([], finish)


def _gather(x: Tensor, axis: Axis, tag: int) -> Pending:
    """start_all_gather by the process group."""
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    if x.device.type != "cpu":
        return _Messages([_all_gather(out, x, group=group_of(axis), async_op=True)], lambda: out)
    parts = out.view(axis.size, *x.shape).unbind()
    works = _exchange([x] * axis.size, parts, axis, tag)
    parts[axis.rank].copy_(x)
    return _Messages(works, lambda: out)


def start_reduce_scatter(x: Tensor, axis: Axis, *, dtype: torch.dtype | None = None, native: bool = True, tag: int = 0) -> Pending:
    """Starts summing [t, ...] over the axis; this rank gets rows [rank * c, (rank + 1) * c), c = ceil(t / size), zeros past t.

    dtype: of the sum, that of `x` by default; the terms travel as they are. native: on CUDA, NCCL's own, which adds in an order and with
    roundings of its choice; otherwise as on CPU, in rank order and at least fp32.
    """
    c = -(-x.shape[0] // axis.size)
    if c * axis.size != x.shape[0]:
        x = torch.cat([x, x.new_zeros((c * axis.size - x.shape[0], *x.shape[1:]))])
    x, dtype = x.contiguous(), dtype or x.dtype
    memory = _memory(x, axis, tag, whole=tag not in DP_TAGS)
    if memory is not None and tag in DP_TAGS:
        return _reduce_in_pieces(memory, x, x.new_empty((c, *x.shape[1:]), dtype=dtype), axis)
    if memory is not None:
        rows = slice(axis.rank * c, (axis.rank + 1) * c)
        return memory.start(Kind.REDUCE_SCATTER, x, lambda parts: _ordered_sum([part[rows] for part in parts], dtype=dtype))
    if x.device.type != "cpu" and native and dtype == x.dtype:
        out = x.new_empty((c, *x.shape[1:]))
        return _Messages([_reduce_scatter(out, x, group=group_of(axis), async_op=True)], lambda: out)
    if x.device.type != "cpu":
        exchanged = torch.empty_like(x)
        work = dist.all_to_all_single(exchanged, x, group=group_of(axis), async_op=True)
        return _Messages([work], lambda: _ordered_sum(exchanged.view(axis.size, c, *x.shape[1:]).unbind(), dtype=dtype))
    mine = x.view(axis.size, c, *x.shape[1:]).unbind()
    received = [torch.empty_like(part) for part in mine]
    received[axis.rank] = mine[axis.rank]
    works = _exchange(mine, received, axis, tag)
    return _Messages(works, lambda: _ordered_sum(received, dtype=dtype))


def _reduce_in_pieces(memory: SharedMemory, x: Tensor, total: Tensor, axis: Axis) -> Pending:
    """Posts what the other ranks need; each adds its own row from where it is."""
    rows, flat, size, rank = x.view(axis.size, -1), total.view(-1), axis.size, axis.rank
    others = rows[1:] if rank == 0 else rows[:-1] if rank == size - 1 else torch.cat([rows[:rank], rows[rank + 1 :]])

    def add(part: slice, parts: list[Tensor]) -> None:
        terms = [rows[rank, part] if r == rank else parts[r][rank - (rank > r)] for r in range(size)]
        flat[part].copy_(_ordered_sum(terms, dtype=total.dtype))

    return _Pieces(memory, Kind.REDUCE_SCATTER, others, add, total)


def _exchange(sends: Sequence[Tensor], receives: Sequence[Tensor], axis: Axis, tag: int = 0) -> list[Work | None]:
    """Starts sending sends[r] to every other rank r of the axis, and receiving receives[r] from it. Messages of a pair keep their order."""
    others = [(axis.rank + i) % axis.size for i in range(1, axis.size)]
    asked: list[Work | None] = [start_receive(receives[r], axis, r, tag) for r in others]
    return asked + [start_send(sends[r], axis, r, tag) for r in others]


def _memory(x: Tensor, axis: Axis, tag: int = 0, whole: bool = True) -> SharedMemory | None:
    """The memory to go through, the same answer on every rank that has a tensor of this size. whole: all of it must fit in."""
    memory, size = axis.memory.get(tag), x.numel() * x.element_size()
    return memory if memory is not None and x.device.type == "cpu" and size > 0 and (size <= memory.slot or not whole) else None


class _Pieces:
    """A collective of the columns of a tensor, through shared memory piece by piece: some are posted now, the others in `wait`."""

    def __init__(
        self,
        memory: SharedMemory,
        kind: Kind,
        columns: Tensor,
        read: Callable[[slice, list[Tensor]], object],
        out: Tensor,
        subject: int = 0,
    ) -> None:
        self._memory, self._kind, self._columns, self._read, self._out, self._subject = memory, kind, columns, read, out, subject
        width = max(1, memory.slot // (columns.shape[0] * columns.element_size()))
        self._left = [slice(start, start + width) for start in range(0, columns.shape[1], width)]
        self._posted: list[Pending] = []
        for _ in range(PIECES_AHEAD):
            self._post()

    def wait(self) -> Tensor:
        while self._posted:
            self._posted.pop(0).wait()
            self._post()
        return self._out

    def _post(self) -> None:
        if self._left:
            part = self._left.pop(0)

            def read(parts: list[Tensor]) -> Tensor:
                self._read(part, parts)
                return self._out

            self._posted.append(self._memory.start(self._kind, self._columns[:, part], read, self._subject))


def _ordered_sum(parts: Sequence[Tensor], out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Rank by rank, in at least fp32, rounded once to `dtype` (that of the parts by default); into `out` if given."""
    dtype = dtype or parts[0].dtype
    if len(parts) == 2 and dtype == parts[0].dtype:
        return torch.add(parts[0], parts[1], out=out)  # which rounds a 16-bit sum once
    wide = torch.promote_types(torch.promote_types(parts[0].dtype, dtype), torch.float32) if dtype.is_floating_point else dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype) if out is None else out.copy_(total)
