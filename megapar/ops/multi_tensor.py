"""Lists of tensors for kernels that take any number of them in one launch: the host's part of adamw_, grad_norm_, step_state_ on GPUs.

A list becomes tables on the device, of int64 addresses and of sizes, which the kernels read:

    adamw      int64 [n, 11]   addresses of weight, grad, master, exp_avg, exp_avg_sq (0 where there is none), numel,
                               row of counters, and of the noise id, base, columns, stride
    grad_norm  int64 [n, 3]    address, numel, number of the tensor's first partial sum
    step_state float64 [n, 3]  row of counters, beta1, beta2
    chunks     int32 [c, 2]    one row a program: tensor, and which of its chunks; its elements start at int64(chunk) * CHUNK

A list is cut into groups, one launch each: tensors of the same dtypes, those whose addresses are all multiples of 16 apart from the others.

Tables are functions of `Spec`s, plain values, and cached by them: a step on the same tensors uploads nothing, so that a CUDA graph can be
captured; what a step allocates afresh, such as `total`, is no part of the key. No value on the device is ever read by the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapar.ops.specs import Spec, Specs, check_adamw, check_gradients, check_step_state, check_total

CHUNK = 4096
"""Elements a program of adamw_ takes. 56 to 120 kB of traffic: its 8 bytes in the table, and reading its tensor's row, are nothing beside
it; and a model of a million parameters still gives two programs to each multiprocessor."""
NORM_CHUNK = 4 * CHUNK
"""Of grad_norm_, whose programs read 2 or 4 bytes an element and leave a partial sum each: a tensor of 2^30 elements has 2^16 to add."""
ALIGNMENT = 16
CACHED = 256


@dataclass(frozen=True, eq=False)
class Uploaded:
    """A table on the device. stream, copied: where and when it got there; None on the CPU."""

    table: Tensor
    stream: Any = None
    copied: Any = None

    def on_this_stream(self) -> Tensor:
        """For a kernel on the current stream."""
        if self.stream is not None:
            if torch.cuda.is_current_stream_capturing():
                _kept(self)
            elif (current := torch.cuda.current_stream(self.table.device)) != self.stream:
                current.wait_event(self.copied)
                self.table.record_stream(current)
        return self.table


@functools.cache
def _kept(table: Uploaded) -> Uploaded:
    """For good: a captured graph reads it at every replay, long after the cache may have let go of it."""
    return table


def host(numbers: Any, dtype: torch.dtype) -> Tensor:
    """On the CPU, also where torch.set_default_device says otherwise: pinned memory is copied from there."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def upload(table: Tensor, device: torch.device) -> Uploaded:
    """Copies without waiting. Raises RuntimeError while a CUDA graph is captured, of which the copy would become a part."""
    if device.type != "cuda":
        return Uploaded(table.to(device))
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured and these tensors are new to the kernel, their addresses would have to be copied to the GPU:"
            " take one step on the same tensors, gradients contiguous and kept where they are, before the capture"
        )
    with torch.cuda.device(device):
        there, stream = table.pin_memory().to(device, non_blocking=True), torch.cuda.current_stream()
        return Uploaded(there, stream, stream.record_event())


@dataclass(frozen=True)
class Group:
    """One launch. dtypes: (weight, grad, master or None, moment), or of grad_norm_ (grad,). aligned: whether all addresses are to 16."""

    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool
    chunks: Uploaded


@dataclass(frozen=True)
class Tables:
    """table: of all tensors, to which the chunks of each group refer. keep: copies that must live until the launches are made."""

    table: Uploaded
    groups: tuple[Group, ...]
    keep: tuple[Tensor, ...] = ()


def adamw_tables(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: Tensor,
    counters: Tensor,
    rows: Sequence[int],
    *,
    seed: int | None,
    ids: Sequence[int],
    places: Sequence[int],
) -> Tables:
    """The arguments are the op's. Raises ValueError as `check_adamw` does."""
    dense = _dense(grads)
    lists = tuple(tuple(map(Spec.of, tensors)) for tensors in (weights, grads, masters, exp_avgs, exp_avg_sqs))
    addresses = tuple(x.data_ptr() for x in dense)
    noise = (tuple(ids), tuple(places)) if seed is not None else ((), ())
    table, groups = _adamw(lists, addresses, _unplaced(scalars), _unplaced(counters), tuple(rows), seed is not None, *noise)
    return Tables(table, groups, dense)


@functools.lru_cache(CACHED)
def _adamw(
    lists: Any,
    addresses: tuple[int, ...],
    scalars: Spec,
    counters: Spec,
    rows: tuple[int, ...],
    drawn: bool,
    ids: tuple[int, ...],
    places: tuple[int, ...],
) -> tuple[Uploaded, tuple[Group, ...]]:
    check_adamw(lists, scalars, counters, rows, drawn, ids, places)
    weights, grads, *rest = lists
    grads = tuple(x._replace(address=address) for x, address in zip(grads, addresses, strict=True))
    lists = (weights, grads, *rest)
    rows_of_table = adamw_rows(lists, rows, ids, places)
    return upload(rows_of_table, scalars.device), groups_of(lists[:4], CHUNK, scalars.device)


def adamw_rows(lists: tuple[Specs, ...], rows: Sequence[int], ids: Sequence[int], places: Sequence[int]) -> Tensor:
    """int64 [n, 11], see above. Without ids they are 0; without places each tensor is a whole logical one."""
    table = torch.empty(len(rows), 11, dtype=torch.int64, device="cpu")
    for i, weight in enumerate(lists[0]):
        numel = weight.numel
        place = places[3 * i : 3 * i + 3] or (0, max(numel, 1), max(numel, 1))
        addresses = [column[i].address if column else 0 for column in lists]
        table[i] = host([*addresses, numel, rows[i], ids[i] if ids else 0, *place], torch.int64)
    return table


def grad_norm_tables(total: Tensor, grads: Sequence[Tensor]) -> tuple[Tables, int]:
    """And how many partial sums there are. Raises ValueError as `check_total` and `check_gradients` do."""
    check_total(Spec.of(total))
    dense = _dense(grads)
    table, groups, partials = _grad_norm(tuple(map(Spec.of, dense)), total.device)
    return Tables(table, groups, dense), partials


@functools.lru_cache(CACHED)
def _grad_norm(grads: Specs, device: torch.device) -> tuple[Uploaded, tuple[Group, ...], int]:
    check_gradients(grads, device)
    rows, partials = grad_norm_rows(grads)
    return upload(rows, device), groups_of((grads,), NORM_CHUNK, device), partials


def grad_norm_rows(grads: Specs) -> tuple[Tensor, int]:
    """int64 [n, 3], see above, and the number of partial sums: NORM_CHUNK elements each, one tensor's after the other's."""
    table, partials = torch.empty(len(grads), 3, dtype=torch.int64, device="cpu"), 0
    for i, grad in enumerate(grads):
        table[i] = host([grad.address, grad.numel, partials], torch.int64)
        partials += -(-grad.numel // NORM_CHUNK)
    return table, partials


def step_state_table(
    scalars: Tensor, counters: Tensor, total: Tensor, count: Tensor, rows: Sequence[int], beta1: Sequence[float], beta2: Sequence[float]
) -> Uploaded:
    """Raises ValueError as `check_step_state` does, and for count <= 0 where it lies on the CPU: a GPU's is not read."""
    check_step_state(Spec.of(scalars), Spec.of(counters), Spec.of(total), Spec.of(count), rows, beta1, beta2)
    if count.device.type == "cpu" and not count > 0:
        raise ValueError(f"count={float(count):g} must be above 0, gradients are divided by it: give it samples with targets")
    return _step_state(tuple(rows), tuple(beta1), tuple(beta2), scalars.device)


@functools.lru_cache(CACHED)
def _step_state(rows: tuple[int, ...], beta1: tuple[float, ...], beta2: tuple[float, ...], device: torch.device) -> Uploaded:
    return upload(host([rows, beta1, beta2], torch.float64).T.contiguous(), device)


@functools.lru_cache(CACHED)
def constant(value: float, device: torch.device) -> Uploaded:
    """One float64 number."""
    return upload(host([value], torch.float64), device)


def groups_of(lists: tuple[Specs, ...], chunk: int, device: torch.device) -> tuple[Group, ...]:
    """Of lists of the same length, a tensor from each in every place; a list may be empty."""
    found: dict[Any, list[int]] = {}
    for i, first in enumerate(lists[0]):
        here = [column[i] if column else None for column in lists]
        aligned = all(x is None or x.address % ALIGNMENT == 0 for x in here)
        if first.numel:
            found.setdefault((tuple(x and x.dtype for x in here), aligned), []).append(i)
    return tuple(
        Group(dtypes, aligned, _chunks(tuple(members), tuple(lists[0][i].numel for i in members), chunk, device))
        for (dtypes, aligned), members in found.items()
    )


@functools.lru_cache(CACHED)
def _chunks(tensors: tuple[int, ...], numels: tuple[int, ...], chunk: int, device: torch.device) -> Uploaded:
    """Apart from the tables, which are smaller: it stays where gradients only move."""
    return upload(chunks_of(tensors, numels, chunk), device)


def chunks_of(tensors: Sequence[int], numels: Sequence[int], chunk: int) -> Tensor:
    """int32 [c, 2]: (tensor, its k-th chunk) for all chunks of `tensors`, which have `numels` elements."""
    counts = host([-(-n // chunk) for n in numels], torch.int64)
    first = counts.cumsum(0) - counts
    number = torch.arange(int(counts.sum()), device="cpu") - first.repeat_interleave(counts)
    return torch.stack([host(tensors, torch.int64).repeat_interleave(counts), number], -1).int()


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """So that a backward that saved one of them notices; also where the step is then skipped, of which the host does not know."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


def _unplaced(x: Tensor) -> Spec:
    """Without the address, which no table holds: a step may allocate its scalars afresh, inside of a capture too."""
    return Spec.of(x)._replace(address=0)


def _dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of those that are not contiguous."""
    return tuple(x.contiguous() for x in tensors)
