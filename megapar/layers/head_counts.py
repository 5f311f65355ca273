"""Attention modules that one does not own: where their heads may be cut, and which of their attributes count heads.

An attention module is recognised by the attributes that models commonly keep: a head size, or a number of heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megapar.layers.attention import split_heads
from megapar.layers.linear import Shards
from megapar.mesh import Axis

HEAD_SIZE = ("head_dim", "head_size", "d_head")
HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
FUSED = ("qkv", "qkv_proj", "wqkv", "c_attn")
"""Column layers known to hold q, k and v one after the other; others interleave them by head, which looks the same from outside."""
GROUPS = ("num_key_value_groups", "n_rep", "num_queries_per_kv")


@dataclass(frozen=True)
class Heads:
    """An attention module's heads, KV heads and head size."""

    heads: int
    kv_heads: int
    head_size: int


def find_heads(module: nn.Module, roles: Mapping[str, Any]) -> Heads | None:
    """The heads of a module whose children have `roles`; None if it keeps neither a head size nor a number of heads.

    The row layer's input, or else the widest column layer's output, holds the queries; the narrowest column layer the keys or values.
    """
    columns, rows = ([layer for child, layer in _linears(module, roles, role)] for role in ("column", "row"))
    head_size, heads, kv_heads = (_attribute(module, names) for names in (HEAD_SIZE, HEADS, KV_HEADS))
    if not columns or (head_size is None and heads is None):
        return None
    q_width = rows[0].in_features if rows else max(layer.out_features for layer in columns)
    head_size = head_size or q_width // (heads or 1)
    heads = heads or q_width // head_size
    if kv_heads is None:
        kv_heads = heads if len(columns) == 1 else min(layer.out_features for layer in columns) // head_size
    return Heads(heads, kv_heads, head_size)


def head_shards(module: nn.Module, roles: Mapping[str, Any], found: Heads, ranks: int) -> dict[str, tuple[Shards, ...]]:
    """How the module's column and row layers are cut, by child. One column layer that holds q, k and v is cut in its three parts.

    Raises ValueError for a layer that is as wide as neither, for heads that cannot be cut, and for a fused layer whose order is not known
    or whose KV heads would have to be shared.
    """
    cut, d = split_heads(found.heads, found.kv_heads, ranks), found.head_size
    q = Shards(found.heads * d, d, intervals=tuple((a * d, b * d) for a, b in cut.q))
    kv = Shards(found.kv_heads * d, d, intervals=tuple((a * d, b * d) for a, b in cut.kv))
    by_width = {q.size + 2 * kv.size: (q, kv, kv), kv.size: (kv,), q.size: (q,)}
    shards = {}
    for role in ("column", "row"):
        for child, layer in _linears(module, roles, role):
            width = layer.out_features if role == "column" else layer.in_features
            if width not in by_width:
                raise ValueError(f"{child} is {width} wide, not {found.heads} or {found.kv_heads} heads of {d}: give its parts in the plan")
            if width == q.size + 2 * kv.size and child.lower() not in FUSED:
                raise ValueError(f"{child} seems to fuse q, k and v in an order that its name does not tell: give its parts in the plan")
            shards[child] = by_width[width]
            if len(shards[child]) == 3 and ranks > found.kv_heads:
                raise ValueError(f"{child} fuses q, k and v, whose {found.kv_heads} KV heads tp={ranks} would share: lower tp")
    return shards


def localize_head_counts(module: nn.Module, found: Heads, tp: Axis) -> None:
    """Makes the module's attributes that count heads count this rank's."""
    cut = split_heads(found.heads, found.kv_heads, tp.size)
    q, kv = (b - a for a, b in (cut.q[tp.rank], cut.kv[tp.rank]))
    for names, local in ((HEADS, q), (KV_HEADS, kv), (GROUPS, q // kv)):
        for name in names:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, local)


def _attribute(module: nn.Module, names: Sequence[str]) -> int | None:
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _linears(module: nn.Module, roles: Mapping[str, Any], role: str) -> list[tuple[str, nn.Linear]]:
    layers = ((child, module.get_submodule(child)) for child, asked in roles.items() if asked == role)
    return [(child, layer) for child, layer in layers if isinstance(layer, nn.Linear)]
