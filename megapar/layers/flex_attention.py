"""Attention whose mask is a rule (FlexAttention, arXiv:2412.05496): of the scores, blocks in which nothing is allowed are never computed.

    y_q = sum over the k that q may see of softmax(q . k / sqrt(d)) v_k

A batch tells its mask in O(t) numbers: segments and the ends of prefixes. The kernel is given that and a table of blocks of 128 queries by
128 keys, in which nothing, some, or all is allowed; b s^2 booleans exist nowhere. torch generates the kernel for CUDA. On the CPU it has
no backward; there the reference below runs, which computes every score: it is for tests and trials, and slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from megapar.batch import TokenBatch

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
BLOCK = 128
SMALLEST_HEAD = 16
"""The generated kernel multiplies on tensor cores, which take no shorter rows."""


def flex_attention(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch) -> Tensor:
    """q [b, heads, s, d], k and v [b, kv_heads, s, d] to [b, heads, s, d], under the batch's mask.

    Compiled for CUDA, once for all batches of a shape; by `reference` on the CPU. Raises ValueError for other devices.
    """
    kernel = kernel_for(q.device.type)
    block_mask = batch.memo("block_mask", lambda: block_mask_of(batch))
    return kernel(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def kernel_for(device: str) -> Callable[..., Tensor]:
    """What computes attention on a device of this type."""
    if device == "cuda":
        # fullgraph: past the compiler's limit of shapes torch would else run uncompiled, with all the scores in memory, and only log it.
        return torch.compile(torch_flex_attention, fullgraph=True)
    if device == "cpu":
        return reference
    raise ValueError(f'attention="flex" runs on cuda, and for tests on cpu, not on {device}: use "fused"')


def reference(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, enable_gqa: bool) -> Tensor:
    """The formula with all its scores, in fp32 (fp64 for fp64); differentiable."""
    assert enable_gqa == (q.shape[1] != k.shape[1])
    b, kv_heads, s, d = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    index = torch.arange(s, device=q.device)
    sequence = torch.arange(b, device=q.device)[:, None, None]
    allowed = block_mask.mask_mod(sequence, sequence, index[:, None], index)[:, None, None]
    scores = q.unflatten(1, (kv_heads, -1)).to(dtype) @ k.unsqueeze(2).mT.to(dtype) * d**-0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ v.unsqueeze(2).to(dtype)).flatten(1, 2).to(q.dtype)


def mask_mod_of(batch: TokenBatch) -> MaskMod:
    """allowed(sequence, head, query, key), index tensors that broadcast, to bool: whether the query may see the key.

    Every query sees itself, those of padding too: no softmax is over nothing.
    """
    # Both are always there, so that all kinds of masks share one graph. The rule refers to them and not to the batch, which remembers it:
    # a cycle would keep the batch in memory until the garbage collector comes by (test_a_batch_is_freed_at_once).
    none = torch.zeros(batch.t, dtype=torch.int32, device=batch.tokens.device)
    segment = (none if batch.segment_ids is None else batch.segment_ids.int()).view(batch.b, batch.s)
    prefix_end = none if batch.prefix_len is None else batch.prefix_len.int()
    prefix_end = prefix_end.view(batch.b, -1).expand(batch.b, batch.s).contiguous()

    def allowed(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prefix = (query < prefix_end[sequence, query]) & (key < prefix_end[sequence, key])
        return ((key <= query) | in_prefix) & (segment[sequence, query] == segment[sequence, key])

    return allowed


def block_mask_of(batch: TokenBatch) -> BlockMask:
    """Which blocks of the scores hold something allowed, and which nothing else.

    The rule is evaluated for one row of blocks at a time: torch's create_block_mask would make all b s^2 booleans.
    """
    b, s, allowed = batch.b, batch.s, mask_mod_of(batch)
    index = torch.arange(s, device=batch.tokens.device)
    sequence = torch.arange(b, device=index.device)[:, None, None]
    blocks = -(-s // BLOCK)

    def count(queries: Tensor) -> Tensor:
        row = allowed(sequence, sequence, queries[:, None], index)
        # What is beyond the end is not allowed: the last block is then never taken for a full one, which the kernel does not mask.
        return F.pad(row, (0, blocks * BLOCK - s)).view(b, -1, blocks, BLOCK).sum((1, 3))

    counts = torch.stack([count(queries) for queries in index.split(BLOCK)], 1)[:, None]
    full = counts == BLOCK * BLOCK
    partial = (counts > 0) & ~full
    return BlockMask.from_kv_blocks(*listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(s, s))


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [..., n] to int32 [...], how many are chosen, and [..., n], their indices in order and then the others'."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()
