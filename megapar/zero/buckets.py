"""Gradients that data-parallel ranks sum: accumulated in main_grad, reduced bucket by bucket while backward goes on.

A *window* is what is reduced at once: a step, or a micro-batch with `reduce_every="micro_batch"`. In it each parameter is written as often
as it is used. When the last expected write to a bucket has come it is packed and its reduction starts; what nobody expected, or nobody
wrote, starts when the window ends. Expectations are learned from the window before, never from autograd's hooks, which fire also where a
gradient is still to come. Buckets start in one order on all ranks, so that a rank which did not use a parameter meets the others
(tests/zero/test_buckets.py::test_ranks_that_use_different_parameters).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megapar.grads import MainGrads
from megapar.mesh import REDUCE, Axis
from megapar.params import spec_of
from megapar.transport import Pending, start_all_reduce, start_gather, start_reduce_scatter
from megapar.zero.layout import Bucket, Layout, write_columns

UNDER_WAY = 2
"""Buckets whose reduction may be under way at once: more would hold more memory and end no sooner."""

VARIES = 0
"""Uses of a parameter that was used now more often and now less: its bucket leaves when the window ends."""
Window = Literal["step", "micro_batch"]


@dataclass(frozen=True)
class Reduction:
    """How gradients are summed. every: the window. pooled: main_grad lives from a parameter's first write to its bucket's reduction, and
    only the shard stays (stages 2 and 3). whole: every rank gets the whole sum (stage 0). dtype, payload: of main_grad, and of what
    travels; sums are fp32. overlap: whether reductions start before the window ends. native: NCCL's own sum."""

    every: Window = "step"
    pooled: bool = False
    whole: bool = False
    dtype: torch.dtype = torch.float32
    payload: torch.dtype = torch.float32
    overlap: bool = True
    native: bool = False


class GradBuckets(MainGrads):
    """The main_grads of `params`, which are the layout's entries, summed over `axis` as `how` says. chunk_of: by group of the layout.

    Gradients may arrive only inside `accumulating`. After `finish`, `shards[i]` is this rank's shard of the sum, with padding.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], layout: Layout, axis: Axis, how: Reduction, chunk_of: Mapping[str, int] | None = None
    ) -> None:
        self.layout, self.axis, self.how = layout, axis, how
        self.alone = axis.size == 1
        self._index = {param: index for index, param in enumerate(params)}
        self._bucket = {member.index: bucket for bucket in layout.buckets for member in bucket.members}
        self._flat: list[Tensor | None] = [None] * len(params)
        self._uses: list[int | None] = [None] * len(params)
        self.chunk_of = chunk_of or {}
        self._closed, self._passes = False, 0
        self._is_open = self._ends = self._chunks_ended = False
        self._expected: list[int | None] = []
        self._under_way: list[tuple[Bucket, Pending]] = []
        super().__init__(params, how.dtype)
        self._sums = list(_partial_sums(self.params))

    # Memory

    def allocate(self) -> None:
        """Gradients of the whole model, unless they are pooled; shards of their own, unless a shard is a part of the whole gradient."""
        pooled, apart = self.how.pooled and not self.alone, self.how.every == "micro_batch" and not self.alone
        self.shards: list[Tensor] = []
        for index, param in enumerate(self.params):
            member = self._member(index)
            param.main_grad = None
            if not pooled:
                self._allocate(index)
            if pooled or apart:
                shard = torch.empty(member.size, dtype=self.dtype, device=param.device)
            else:
                shard = self.whole(index).view(self.axis.size, -1)[self.axis.rank]
            self.shards.append(shard)

    def _allocate(self, index: int) -> None:
        """Room for every rank's shard; main_grad is the part without padding, which is zero and stays so."""
        param, size = self.params[index], self._member(index).size * self.axis.size
        flat = torch.empty(size, dtype=self.dtype, device=param.device)
        flat[param.numel() :].zero_()  # it travels with the rest
        self._flat[index], param.main_grad = flat, flat[: param.numel()].view(param.shape)

    def whole(self, index: int) -> Tensor:
        """A gradient with room for every rank's shard, padded with zeros."""
        flat = self._flat[index]
        assert flat is not None
        return flat

    def tensors(self) -> list[Tensor]:
        """Gradients and shards that exist now; some share memory."""
        return [*self.shards, *(flat for flat in self._flat if flat is not None)]

    def _member(self, index: int) -> Any:
        return next(member for member in self._bucket[index].members if member.index == index)

    # Writes

    @contextmanager
    def accumulating(self, backwards: int, last: bool) -> Iterator[None]:
        """Inside it `backwards` more passes over the model may write gradients; the window ends with the last of them, if it is `last`."""
        if self._closed:
            raise ValueError("an earlier backward of this step was its last and its gradients were summed: give all but one last=False")
        self._closed = last
        self._passes += backwards
        self._is_open = True
        self._ends = ends = last or self.how.every == "micro_batch"
        passes = 1 if self.how.every == "micro_batch" else self._passes
        self._chunks_ended = False
        if ends and self.how.overlap and not self.alone:
            self._expected = [uses * passes if uses else None for uses in self._uses]
        try:
            yield
        finally:
            self._is_open, self._expected = False, [None] * len(self.params)

    def target(self, param: Any) -> Tensor:
        if not self._is_open:
            raise ValueError(f"{self._name(param)} was given a gradient by a backward of yours: call optimizer.backward(loss_sum) instead")
        if self._started[self._bucket[self._index[param]].number]:
            raise ValueError(
                f"{self._name(param)} was used more often than in the step before, after its gradient had been reduced: "
                "give ZeroOptimizer overlap=False"
            )
        if param.main_grad is None:
            self._allocate(self._index[param])
        return super().target(param)

    def written(self, param: Any) -> None:
        index = self._index[param]
        self._writes[index] += 1
        if self._writes[index] == self._expected[index]:
            bucket = self._bucket[index]
            if all(self._writes[member.index] == self._expected[member.index] for member in bucket.members):
                self._start_ready(self._chunk(bucket))

    def _name(self, param: Any) -> str:
        return self.layout.entries[self._index[param]].name

    # Reductions

    def _chunk(self, bucket: Bucket) -> int:
        return self.chunk_of.get(bucket.group, 0)

    def _start_ready(self, chunk: int) -> None:
        """Starts the chunk's buckets in their order, up to the first that still expects a write."""
        for bucket in self._waiting(chunk):
            if any(self._writes[member.index] != self._expected[member.index] for member in bucket.members):
                return
            self._start(bucket)

    def _waiting(self, chunk: int | None) -> list[Bucket]:
        return [b for b in self.layout.buckets if not self._started[b.number] and (chunk is None or self._chunk(b) == chunk)]

    @torch.no_grad()
    def end_window(self, chunk: int | None = None) -> None:
        """Starts what is left of a chunk (all of them by default), whether or not it was written, and learns from what was.

        Nothing in a step that goes on, nor where nobody else has a part of the sum, nor for all after a pipeline ended each one's windows.
        """
        if not self._ends or (self.how.every == "step" and self.alone) or (chunk is None and self._chunks_ended):
            return
        self._chunks_ended = chunk is not None and self.how.every == "micro_batch"
        for bucket in self._waiting(chunk):
            self._start(bucket)
        if self.how.every == "step":
            return
        for bucket in self.layout.buckets:
            if chunk is None or self._chunk(bucket) == chunk:
                self._learn(bucket, 1)
                self._started[bucket.number] = False

    def _learn(self, bucket: Bucket, passes: int) -> None:
        for member in bucket.members:
            uses, rest = divmod(self._writes[member.index], max(passes, 1))
            known = self._uses[member.index] in (None, uses)
            self._uses[member.index] = uses if known and not rest else VARIES
            self._writes[member.index] = 0

    @torch.no_grad()
    def _start(self, bucket: Bucket) -> None:
        """Packs a bucket and starts its reduction. Its main_grads are free, or overwritten by the next write."""
        self._started[bucket.number] = True
        if self.alone:
            return
        ranks = self.axis.size
        packed = torch.empty(ranks, bucket.width, dtype=self.how.payload, device=self.params[bucket.members[0].index].device)
        for index, size, offset in ((m.index, m.size, m.offset) for m in bucket.members):
            param, part = self.params[index], packed[:, offset : offset + size]
            if param._main_grad_written:
                part.copy_(self.whole(index).view(ranks, size))
            else:
                part.zero_()
            param._main_grad_written = False
            if self.how.pooled:
                self._flat[index] = param.main_grad = None
        wide = torch.promote_types(self.how.payload, torch.float32)
        self._under_way.append((bucket, start_reduce_scatter(packed, self.axis, dtype=wide, native=self.how.native, tag=REDUCE)))
        while len(self._under_way) > (UNDER_WAY if self.how.overlap else 0):
            self._collect()

    def _collect(self) -> None:
        """Waits for the oldest reduction and puts its sums into the shards."""
        bucket, pending = self._under_way.pop(0)
        row = pending.wait().view(-1)
        for member in bucket.members:
            part, shard = row[member.offset : member.offset + member.size], self.shards[member.index]
            if self._reduced[bucket.number]:
                shard.add_(part)
            else:
                shard.copy_(part)
        self._reduced[bucket.number] = True

    # The step

    def zero(self) -> None:
        """Forgets what was accumulated."""
        # A message that nobody waits for would be taken for the next one (tests/zero/test_windows.py::test_zero_grad_after_a_reduction).
        for _, pending in self._under_way:
            pending.wait()
        count = len(self.layout.buckets)
        self._closed = False
        self._passes, self._writes = 0, [0] * len(self.layout.entries)
        self._expected = [None] * len(self.layout.entries)
        self._started, self._reduced = [False] * count, [False] * count
        self._under_way = []
        super().zero()

    @property
    def passes(self) -> int:
        """Backwards since `zero`."""
        return self._passes

    @torch.no_grad()
    def finish(self) -> None:
        """Completes the shards; with `how.whole` the main_grads too. Every rank calls it after the same number of windows."""
        self._check_windows()
        for bucket in self.layout.buckets:
            if self.how.every == "step":
                self._learn(bucket, self._passes)
        while self._under_way:
            self._collect()
        if self.alone:
            for param in self.params:
                if not param._main_grad_written:
                    param.main_grad.zero_()
        self._sum_partial()
        if self.how.whole and not self.alone:
            self._gather_whole()

    def _check_windows(self) -> None:
        if not self._ends:
            raise ValueError("the step's last backward had last=False and its gradients are not summed yet: give the last one last=True")

    def _sum_partial(self) -> None:
        """Adds the shards of parameters whose gradient is partial over other axes: one all-reduce for each axis."""
        for axis, indices in self._sums:
            flat = start_all_reduce(torch.cat([self.shards[index] for index in indices]), axis).wait()
            parts = flat.split([self.shards[index].numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                self.shards[index].copy_(part)

    def _gather_whole(self) -> None:
        gathers: list[Pending] = []
        for bucket in self.layout.buckets:
            row = torch.cat([self.shards[member.index] for member in bucket.members])
            gathers.append(start_gather(row, self.axis, partial(write_columns, bucket, self.whole), subject=1 + bucket.number))
            while len(gathers) > UNDER_WAY:
                gathers.pop(0).wait()
        for pending in gathers:
            pending.wait()


def _partial_sums(params: Sequence[Any]) -> Iterator[tuple[Axis, list[int]]]:
    """The axes over which gradients are partial, each with its parameters, in their order."""
    found: dict[int, tuple[Axis, list[int]]] = {}
    for index, param in enumerate(params):
        spec = spec_of(param)
        for axis in () if spec is None else (spec.grad_sum, spec.tie):
            if axis is not None and axis.size > 1:
                found.setdefault(id(axis), (axis, []))[1].append(index)
    yield from found.values()
