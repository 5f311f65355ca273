"""What a decoder keeps between forward and backward, in bytes: the formula of each mode of recomputation.

Of one micro-batch of t tokens on one rank, e bytes an element; n, k, f are this rank's query heads, KV heads and ffn features, c is t, or
ceil(t / tp) with sequence parallelism; r is 1 for RMSNorm and 2 for LayerNorm, g is 2 for SwiGLU and 1 for GELU. A block keeps

    both norms       their inputs and outputs, fp32 statistics        4 c h e + 8 c r
    q, k, v          turned, or as they were projected                t (n + 2 k) d e
    attention        its output, fp32 log-sum-exp                     t n d e + 4 t n      not with `attention`
                     turned q come head by head and so does what      t n d e              not with `attention`, learned positions,
                     SDPA finds: the projection takes a copy                               one head, fused_attention
                     where the mask is dense, its copy in the dtype   t s e                not with `attention`
    mlp              the pre-activation                               g t f e
                     the activation                                   t f e                not with `mlp`

and with `full` its input alone, c h e, or t h e / tp with shard_saved_input. Beside the blocks: 4 t d of rotary tables and t s of the dense
mask, or 8 t of fused_attention's spans, which a batch keeps once; 9 bytes of index a token in the embedding, 9 c in learned positions;
after the last block its output, normed and not, 2 c h e + 4 c r. Not counted is what the loss keeps.
"""

from __future__ import annotations

import torch

from megapar.layers.attention import split_heads
from megapar.models.config import DecoderConfig
from megapar.params import Interval, split
from megapar.recompute import Recompute


def activation_bytes(
    config: DecoderConfig,
    tokens: int,
    recompute: Recompute | None = None,
    *,
    tp: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    layers: Interval | None = None,
    dense_mask: int = 0,
    fused_attention: bool = False,
) -> int:
    """Bytes that the stage of these layers (all by default) keeps of one micro-batch on rank 0 of tp, which has the most.

    dense_mask: s, the length of a sequence, where batches are not plainly causal; 0 where they are, and with attention="flex" on a GPU
        (on a CPU that keeps all scores, which are not counted).
    fused_attention: by megapar's kernel, on a CPU, which needs no dense mask. SDPA otherwise.
    A pipeline rank keeps as much for every micro-batch between its F and its last backward. Raises ValueError where the decoder cannot
    be cut so.
    """
    recompute = recompute or Recompute()
    start, stop = layers or (0, config.layers)
    recompute.check(stop - start, tp, sequence_parallel and tp > 1)
    rows = -(-tokens // tp) if sequence_parallel else tokens
    chosen = 0 if recompute.mode == "none" else stop - start if recompute.blocks is None else recompute.blocks
    copied = config.positions == "rope" and not fused_attention
    once = tokens * (min(dense_mask, 1) * 8 if fused_attention else dense_mask)
    mask = 0 if fused_attention else dense_mask
    plain, less = (_block(config, tokens, rows, tp, kind, dtype, mask, copied) for kind in (Recompute(), recompute))
    if config.positions == "rope" and stop > start:
        once += 4 * tokens * _head_size(config)
    if start == 0:
        once += 9 * tokens + (9 * rows if config.positions == "learned" else 0)
    if stop == config.layers:
        once += 2 * rows * config.hidden_size * dtype.itemsize + 4 * rows * _statistics(config)
    return once + chosen * less + (stop - start - chosen) * plain


def _block(config: DecoderConfig, t: int, c: int, tp: int, recompute: Recompute, dtype: torch.dtype, mask: int, copied: bool) -> int:
    """Bytes that a block of this mode keeps. copied: whether the projection takes a copy of what several heads found."""
    h, d, e, mode = config.hidden_size, _head_size(config), dtype.itemsize, recompute.mode
    if mode == "full":
        return -(-t * h // tp) * e if recompute.shard_saved_input else c * h * e
    cut = split_heads(config.heads, config.kv_heads or config.heads, tp)
    n, k = (stop - start for start, stop in (cut.q[0], cut.kv[0]))
    start, stop = split(config.ffn_size, tp)[0]
    f, wide = stop - start, 2 if config.activation == "swiglu" else 1
    kept = 4 * c * h * e + 8 * c * _statistics(config) + t * (n + 2 * k) * d * e + wide * t * f * e
    if mode != "attention":
        kept += (2 if copied and n > 1 else 1) * t * n * d * e + 4 * t * n + t * mask * e
    return kept if mode == "mlp" else kept + t * f * e


def _head_size(config: DecoderConfig) -> int:
    return config.head_size or config.hidden_size // config.heads


def _statistics(config: DecoderConfig) -> int:
    """Numbers that a norm keeps of a row."""
    return 1 if config.norm == "rms" else 2
