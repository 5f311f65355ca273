"""Weights of which data-parallel ranks hold shards: the whole ones, for as long as they are needed, and the shards that are updated.

Stages 1 and 2 keep whole weights, of which a shard is a part. Stage 3 keeps shards; whole weights come and go in the same storage, so that
what autograd saved of them is there again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from megapar.mesh import GATHER, Axis
from megapar.transport import Pending, start_all_gather
from megapar.zero.layout import Bucket, Layout


class Weights:
    """The memory of `params`, the layout's entries, after `convert`. sharded: whole ones are freed by `free`, and now.

    `shards[i]`: what this rank updates, with padding; without sharding of anything (`replicated`) all of the parameter.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        layout: Layout,
        axis: Axis,
        convert: Callable[[Tensor], Tensor],
        *,
        replicated: bool,
        sharded: bool,
    ) -> None:
        self.params, self.layout, self.axis, self.sharded = list(params), layout, axis, sharded and axis.size > 1
        self.replicated = replicated or axis.size == 1
        self.shards: list[Tensor] = [torch.empty(0)] * len(self.params)
        self._flat: list[Tensor] = [torch.empty(0)] * len(self.params)
        sizes = {member.index: member.size for bucket in layout.buckets for member in bucket.members}
        with torch.no_grad():
            for index, param in enumerate(self.params):
                values = convert(param.detach())
                flat = values.new_zeros(sizes[index] * axis.size)
                flat[: param.numel()].view(param.shape).copy_(values)
                # Through .data the parameter stays the same object for whoever holds it: layers, ties, the user's own lists.
                param.data = flat[: param.numel()].view(param.shape)
                self._flat[index] = flat
                part = flat if self.replicated else flat.view(axis.size, -1)[axis.rank]
                self.shards[index] = part.clone() if self.sharded else part

    def whole(self, index: int) -> Tensor:
        """Room for every rank's shard, of which the parameter is the part without padding."""
        return self._flat[index]

    def has(self, index: int) -> bool:
        """Whether the parameter still is what lies here."""
        flat, param = self._flat[index], self.params[index]
        if flat.untyped_storage().nbytes() == 0:
            return param.dtype == flat.dtype and param.device == flat.device
        return param.dtype == flat.dtype and param.data_ptr() == flat.data_ptr()

    def tensors(self) -> list[Tensor]:
        """All that it holds; some share memory, some have none now."""
        return [*self._flat, *self.shards]

    def free(self, buckets: Iterable[Bucket]) -> None:
        """Gives the memory of whole weights back."""
        for bucket in buckets:
            for member in bucket.members:
                self._flat[member.index].untyped_storage().resize_(0)

    def start_gather(self, bucket: Bucket) -> Pending:
        """Starts fetching the other ranks' shards."""
        row = torch.cat([self.shards[member.index] for member in bucket.members])
        # Stage 3 has a tag for each bucket: ranks that run different blocks must not take one's shards for another's
        # (tests/zero/test_gather.py::test_ranks_that_run_different_blocks).
        return start_all_gather(row, self.axis, GATHER + 1 + bucket.number if self.sharded else GATHER)

    @torch.no_grad()
    def end_gather(self, bucket: Bucket, pending: Pending) -> None:
        """Waits for them, and writes the whole weights."""
        ranks = self.axis.size
        rows = pending.wait().view(ranks, bucket.width)
        for member in bucket.members:
            flat = self._flat[member.index]
            storage, size = flat.untyped_storage(), flat.numel() * flat.element_size()
            if storage.size() < size:
                storage.resize_(size)
            # .detach() shares the version counter and .data does not: autograd must not take this for a change of what it saved.
            flat.data.view(ranks, -1).copy_(rows[:, member.offset : member.offset + member.size])


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory under them, each piece once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(size for pointer, size in storages.items() if pointer)
