"""Causal self-attention with grouped KV heads (arXiv:2305.13245) and rotary positions, the heads cut over tp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.collectives import with_summed_grad
from megapar.layers.checkpointed import checkpointed
from megapar.layers.flex_attention import SMALLEST_HEAD, flex_attention
from megapar.layers.linear import ColumnParallelLinear, RowParallelLinear, Shards
from megapar.layers.linear_function import row_linear
from megapar.mesh import TensorParallel, as_axis
from megapar.ops.attention import attention, has_kernel
from megapar.ops.rope import rope_angles, rope_qkv
from megapar.params import Init, Interval, split

Backend = Literal["fused", "sdpa", "flex"]


@dataclass(frozen=True)
class HeadCut:
    """Every rank's interval of the query heads and of the KV heads it reads."""

    q: tuple[Interval, ...]
    kv: tuple[Interval, ...]


def split_heads(heads: int, kv_heads: int, ranks: int) -> HeadCut:
    """Cuts query heads over the ranks together with the KV heads that they read.

    With kv_heads >= ranks, whole groups are cut and the first ranks take the extra; with fewer, the ranks are dealt to the KV heads and
    share the query heads of theirs. Raises ValueError when a rank would be left without a head.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads={heads} must be a positive multiple of kv_heads={kv_heads}: change one of them")
    group = heads // kv_heads
    if ranks <= kv_heads:
        kv = split(kv_heads, ranks)
        return HeadCut(tuple((a * group, b * group) for a, b in kv), tuple(kv))
    if -(-ranks // kv_heads) > group:
        raise ValueError(f"tp={ranks} leaves a rank without one of the {heads} heads over {kv_heads} KV heads: lower tp to {heads} or less")
    q: list[Interval] = []
    shared: list[Interval] = []
    for kv_head, (first, last) in enumerate(split(ranks, kv_heads)):
        for a, b in split(group, last - first):
            q.append((kv_head * group + a, kv_head * group + b))
            shared.append((kv_head, kv_head + 1))
    return HeadCut(tuple(q), tuple(shared))


class Attention(nn.Module):
    """x [t, hidden_size] and its TokenBatch to [t, hidden_size]; WQ WK WV column-parallel in one GEMM, WO row-parallel.

    With `sequence_parallel` input and output are this rank's ceil(t / tp) tokens. `rope_theta=None` leaves positions to the embedding.
    backend: "fused" is megapar's kernel where there is one, on a CPU (megapar/ops/attention.py), and "sdpa" elsewhere. Under masks that are
        not plainly causal "sdpa" makes them dense, "flex" computes only blocks in which something is allowed
        (megapar/layers/flex_attention.py); what is causal is SDPA's with either.
    recompute: of what lies between the projections nothing is kept for backward, which computes it again from the fused q, k, v.
    Where ranks share a KV head, WK and WV are a layer of their own, whose gradients are summed over the ranks that share it.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        head_size: int | None = None,
        tp: TensorParallel = None,
        bias: bool = False,
        rope_theta: float | None = 10000.0,
        sequence_parallel: bool = False,
        init: Init | None = None,
        out_init: Init | None = None,
        backend: Backend = "fused",
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tp = as_axis(tp)
        kv_heads = heads if kv_heads is None else kv_heads
        cut = split_heads(heads, kv_heads, self.tp.size)
        if head_size is None:
            if hidden_size % heads:
                raise ValueError(f"hidden_size={hidden_size} must be a multiple of heads={heads}: change one of them or give head_size")
            head_size = hidden_size // heads
        if rope_theta is not None and head_size % 2:
            raise ValueError(f"head_size={head_size} must be even, rotary positions turn pairs: change it or use learned positions")
        if backend not in get_args(Backend):
            raise ValueError(f'attention="{backend}" is not known: use "fused", "sdpa" or "flex"')
        if backend == "flex" and head_size < SMALLEST_HEAD:
            raise ValueError(f'head_size={head_size} must be {SMALLEST_HEAD} or more for attention="flex": raise it or use "fused"')
        self.head_size, self.rope_theta, self.backend, self.recompute = head_size, rope_theta, backend, recompute
        self.q_heads, self.kv_heads = (b - a for a, b in (cut.q[self.tp.rank], cut.kv[self.tp.rank]))
        q, k, v = (
            Shards(n * head_size, head_size, name, tuple((a * head_size, b * head_size) for a, b in intervals))
            for name, n, intervals in (("q", heads, cut.q), ("k", kv_heads, cut.kv), ("v", kv_heads, cut.kv))
        )
        common: dict[str, Any] = {"tp": self.tp, "bias": bias, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.shares_kv = self.tp.size > kv_heads
        if self.shares_kv:
            self.q = ColumnParallelLinear(hidden_size, q, init=init, **common)
            self.kv = ColumnParallelLinear(hidden_size, (k, v), init=init, **common)
        else:
            self.qkv = ColumnParallelLinear(hidden_size, (q, k, v), init=init, **common)
        self.out = RowParallelLinear(q, hidden_size, init=out_init or init, **common)

    def forward(self, x: Tensor, batch: TokenBatch) -> Tensor:
        qkv = torch.cat([self.q(x), self.kv(x)], -1) if self.shares_kv else self.qkv(x)
        # The projection is part of what is recomputed, without its product: else its input, attention's output, would be kept for it.
        return checkpointed(self._attend, qkv, batch, preserve_rng_state=False) if self.recompute else self._attend(qkv, batch)

    def _attend(self, qkv: Tensor, batch: TokenBatch, result: bool = True) -> Tensor:
        q_heads, kv_heads, d = self.q_heads, self.kv_heads, self.head_size
        qkv = batch.unpad(qkv)
        if self.rope_theta is None:
            q, k, v = qkv.view(batch.b, batch.s, -1, d).transpose(1, 2).split([q_heads, kv_heads, kv_heads], dim=1)
        else:
            theta, dtype = self.rope_theta, qkv.dtype
            cos, sin = batch.memo(("rope", d, theta, dtype), lambda: rope_angles(batch.position_ids, d, theta, dtype))
            q, k, v = rope_qkv(qkv, cos, sin, b=batch.b, q_heads=q_heads, kv_heads=kv_heads)
        y = self._heads(q, k, v, batch).transpose(1, 2).reshape(batch.t, q_heads * d)
        if result:
            return self.out(y)
        out, bias = self.out, None if self.out.bias is None else with_summed_grad(self.out.bias)
        return row_linear(y, out.weight, bias, out.tp, out.sequence_parallel, result=False)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch) -> Tensor:
        """q [b, q_heads, s, d], k and v [b, kv_heads, s, d] to [b, q_heads, s, d]."""
        if self.backend == "fused" and has_kernel(q):
            spans = None if batch.is_causal else batch.attention_spans()
            if batch.is_causal or spans is not None:
                return attention(q, k, v, spans)
        if self.backend == "flex" and not batch.is_causal:
            return flex_attention(q, k, v, batch)
        mask = None if batch.is_causal else batch.attention_mask()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
