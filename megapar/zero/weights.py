"""Weights of which data-parallel ranks hold shards: the whole ones, for as long as they are needed, and the shards that are updated.

Stages 1 and 2 keep whole weights, of which a shard is a part. Stage 3 keeps shards; whole weights come and go in the same storage, so that
what autograd saved of them is there again in backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from megapar.mesh import Axis
from megapar.params import materialize
from megapar.transport import Pending, start_gather
from megapar.zero.layout import Bucket, Layout, write_columns


class Weights:
    """The memory of `params`, the layout's entries, once each was given to `place`. sharded: `start_gather` brings whole ones.

    `shards[i]`: what this rank updates, with padding; without sharding of anything (`replicated`) all of the parameter.
    """

    def __init__(self, params: Sequence[nn.Parameter], layout: Layout, axis: Axis, *, replicated: bool, sharded: bool) -> None:
        self.params, self.layout, self.axis, self.sharded = list(params), layout, axis, sharded and axis.size > 1
        self.replicated = replicated or axis.size == 1
        self.shards: list[Tensor] = [torch.empty(0)] * len(self.params)
        self._flat: list[Tensor] = [torch.empty(0)] * len(self.params)
        self._places = {member.index: (bucket, member) for bucket in layout.buckets for member in bucket.members}
        self._rows: dict[int, Tensor] = {}

    @torch.no_grad()
    def place(self, index: int, values: Tensor) -> None:
        """Makes a parameter's memory and fills it. values: flat, in the weights' format; all of it, or if sharded this rank's shard."""
        param, (bucket, member), ranks = self.params[index], self._places[index], self.axis.size
        size = member.size
        flat = values.new_empty(size * ranks)
        whole = flat[: param.numel()].view(param.shape)
        if self.sharded:
            # A bucket's shards lie as they travel.
            if bucket.number not in self._rows:
                self._rows[bucket.number] = values.new_empty(bucket.width)
            shard = self._rows[bucket.number][member.offset : member.offset + size]
            flat.untyped_storage().resize_(0)  # now: those of all parameters may not fit (tests/zero/test_from_meta.py::test_place)
        else:
            shard = flat if self.replicated else flat.view(ranks, -1)[self.axis.rank]
        kept = shard if self.sharded else flat
        kept[: values.numel()] = values
        kept[values.numel() :] = 0
        # The parameter stays the same object for whoever holds it: layers, ties, the user's own lists.
        if param.is_meta:
            materialize(param, whole)
        else:
            param.data = whole
        self._flat[index], self.shards[index] = flat, shard

    def whole(self, index: int) -> Tensor:
        """Room for every rank's shard, of which the parameter is the part without padding."""
        return self._flat[index]

    def has(self, index: int) -> bool:
        """Whether the parameter still is what lies here."""
        flat, param = self._flat[index], self.params[index]
        # What a gather that nobody has waited for has written already is there, and the parameter still refuses to be touched
        # (tests/zero/test_gather.py::test_a_gather_that_nobody_waits_for).
        with torch._C.DisableTorchFunctionSubclass():
            there = flat.untyped_storage().nbytes() == 0 or param.data_ptr() == flat.data_ptr()
            return there and param.dtype == flat.dtype and param.device == flat.device

    def tensors(self) -> list[Tensor]:
        """All that it holds; some share memory, some have none now."""
        return [*self._flat, *self.shards]

    def free(self, buckets: Iterable[Bucket]) -> None:
        """Gives the memory of whole weights back."""
        for bucket in buckets:
            for member in bucket.members:
                self._flat[member.index].untyped_storage().resize_(0)

    def start_gather(self, bucket: Bucket) -> Pending:
        """Starts fetching the other ranks' shards; the whole weights are there when it has been waited for."""

        @torch.no_grad()
        def write(columns: slice, parts: Sequence[Tensor] | Tensor) -> None:
            self._make_room(bucket)
            # .detach() shares the version counter and .data does not: autograd must not take this for a change of what it saved.
            write_columns(bucket, lambda index: self._flat[index].data, columns, parts)

        row = self._rows.get(bucket.number)
        if row is None:
            row = torch.cat([self.shards[member.index] for member in bucket.members])
        # Ranks that run different blocks must not take one's shards for another's
        # (tests/zero/test_gather.py::test_ranks_that_run_different_blocks).
        return start_gather(row, self.axis, write, subject=1 + bucket.number)

    def _make_room(self, bucket: Bucket) -> None:
        for member in bucket.members:
            flat = self._flat[member.index]
            storage, size = flat.untyped_storage(), flat.numel() * flat.element_size()
            if storage.size() < size:
                storage.resize_(size)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory under them, each piece once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(size for pointer, size in storages.items() if pointer)
