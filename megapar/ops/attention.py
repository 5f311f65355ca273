"""Attention of a sequence to itself, each query to one span of keys (causal, packed documents, bidirectional prefixes), on a CPU.

    S = q k^T / sqrt(d) over the keys in the query's span,  P = softmax(S),  y = P v,  lse = log of the sum of exp(S)

Backward computes P again from q, k and lse. With D = sum over d of dy y:

    dv = P^T dy,  dS = P (dy v^T - D),  dq = dS k / sqrt(d),  dk = dS^T q / sqrt(d)

Scores exist in blocks that fit a cache, and of those only where something is attended to (FlashAttention-2, arXiv:2307.08691): no memory
of s^2, no dense mask. Two products of 2 d FLOPs a pair of query and key forward, five backward. Sums in fp32; P and dS are rounded to bf16
where that has an instruction and q is bf16. Heads and sequences are dealt to the threads, so results do not depend on their number.

What is not finite in v or dy may reach rows that do not attend to it, a few of them: a tile multiplies it by a weight of zero. GPUs have
torch's attention: there is no Triton body.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar.ops.checks import FLOATS
from megapar.ops.dispatch import FORCED, use_reference


def has_kernel(q: Tensor) -> bool:
    """Whether `attention` of such tensors is compiled: on a CPU, unless MEGAPAR_BACKEND says otherwise."""
    return q.device.type == "cpu" and q.dtype in FLOATS and FORCED in (None, "cpu") and not use_reference(q)


def attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None = None) -> Tensor:
    """q [b, heads, s, d], k and v [b, kv_heads, s, d] to y [b, heads, s, d], which lies in memory as [b, s, heads, d].

    spans: int32 [b, s, 2], a query's first key and the one past its last; None: all up to itself. Zeros come of an empty one.
    Raises ValueError for shapes that do not match and keys that do not exist.
    """
    y: Tensor = _Attention.apply(q, k, v, spans)[0]
    return y


def scale_of(q: Tensor) -> float:
    """1 / sqrt(d)."""
    return max(q.shape[-1], 1) ** -0.5


def scores_reference(q: Tensor, k: Tensor, spans: Tensor | None) -> Tensor:
    """S [b, kv_heads, heads / kv_heads, s, s] in at least fp32, -inf outside of the spans."""
    wide, s = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    index = torch.arange(s, device=q.device)
    if spans is None:
        allowed = index <= index[:, None]
    else:
        allowed = ((index >= spans[:, :, :1]) & (index < spans[:, :, 1:]))[:, None, None]
    scores = q.unflatten(1, (k.shape[1], -1)).to(wide) @ k.unsqueeze(2).mT.to(wide) * scale_of(q)
    return scores.masked_fill(~allowed, -torch.inf)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    """y, rounded once, and lse [b, heads, s]; differentiable."""
    scores = scores_reference(q, k, spans)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    y = (weights @ v.unsqueeze(2).to(scores.dtype)).flatten(1, 2).to(q.dtype)
    return y.transpose(1, 2).contiguous().transpose(1, 2), lse.flatten(1, 2)


def attention_backward_reference(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, spans: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each rounded once."""
    scores, kv_heads, scale = scores_reference(q, k, spans), k.shape[1], scale_of(q)
    wide_q, wide_dy, wide_y = (x.unflatten(1, (kv_heads, -1)).to(scores.dtype) for x in (q, dy, y))
    wide_k, wide_v = (x.unsqueeze(2).to(scores.dtype) for x in (k, v))
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (kv_heads, -1))[..., None]).exp()
    dscores = weights * (wide_dy @ wide_v.mT - (wide_dy * wide_y).sum(-1, keepdim=True)) * scale
    dq = (dscores @ wide_k).flatten(1, 2)
    dk, dv = (dscores.mT @ wide_q).sum(2), (weights.mT @ wide_dy).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
        run = attention_reference if use_reference(q) else torch.ops.megapar.attention.default
        y, lse = run(q, k, v, spans)
        ctx.save_for_backward(q, k, v, y, lse, spans)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # zeros for lse, which nobody reads
        return y, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        q, k, v, y, lse, spans = ctx.saved_tensors
        run = attention_backward_reference if use_reference(q) else torch.ops.megapar.attention_backward.default
        return *run(dy, q, k, v, y, lse, spans), None


@torch.library.register_fake("megapar::attention")
def _(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
    b, heads, s, d = q.shape
    return q.new_empty(b, s, heads, d).transpose(1, 2), q.new_empty(b, heads, s, dtype=torch.float32)


@torch.library.register_fake("megapar::attention_backward")
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, spans: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
