"""Activation recomputation (arXiv:1604.06174; selective: arXiv:2205.05198, section 5): less is kept between forward and backward, and what
is missing is computed again when backward comes to it.

    none        every block keeps its activations
    full        a block keeps its input alone
    attention   rotary positions, scores and values are computed again: of attention the fused q, k, v are kept
    mlp         of the MLP the pre-activation is kept, the activation is computed again

Gradients are those of `none` to the last bit. What each mode keeps, in bytes: megapar/planning/activations.py, docs/recompute.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megapar.layers.attention import Attention
from megapar.layers.block import DecoderBlock
from megapar.layers.checkpointed import checkpointed
from megapar.layers.mlp import MLP
from megapar.mesh import Axis, TensorParallel, as_axis
from megapar.transport import start_all_gather

Mode = Literal["none", "full", "attention", "mlp"]


@dataclass(frozen=True)
class Recompute:
    """What is computed again in backward, of the first `blocks` blocks of a stage (none: of all).

    shard_saved_input: of `full`, each rank of tp keeps its part of a block's input, and they are gathered in backward.
    Raises ValueError for a mode that does not exist and for parts that do not go together.
    """

    mode: Mode = "none"
    blocks: int | None = None
    shard_saved_input: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f'recompute mode="{self.mode}" is not known: use none, full, attention or mlp')
        if self.blocks is not None and self.mode == "none":
            raise ValueError(f'recompute blocks={self.blocks} needs something to recompute: leave it out with mode="none"')
        if self.blocks is not None and self.blocks < 0:
            raise ValueError(f"recompute blocks={self.blocks} must be 0 or more: leave it out for all of them")
        if self.shard_saved_input and self.mode != "full":
            raise ValueError(f'recompute shard_saved_input=True is for mode="full", the mode is "{self.mode}": leave it out')

    def check(self, blocks: int, tp: int, sequence_parallel: bool) -> None:
        """Raises ValueError unless this can be done to a stage of so many blocks on so many ranks of tp."""
        if self.blocks is not None and self.blocks > blocks:
            raise ValueError(f"recompute blocks={self.blocks} is more than the {blocks} of a stage: lower it, or leave it out for all")
        if self.shard_saved_input and tp == 1:
            raise ValueError("recompute shard_saved_input=True needs ranks to shard over and tp is 1: raise tp, or leave it out")
        if self.shard_saved_input and sequence_parallel:
            raise ValueError("recompute shard_saved_input=True with sequence parallelism, whose inputs are sharded already: leave it out")


def apply_recompute(
    blocks: Sequence[nn.Module], recompute: Recompute, *, tp: TensorParallel = None, sequence_parallel: bool = False
) -> None:
    """Makes the blocks, in the order in which they run, recompute; their parameters keep their names.

    With `full` a block may be any module; the tensors among its positional arguments are what it keeps. With `shard_saved_input` those
    that require a gradient must be the same on every rank of tp. `attention` and `mlp` need megapar's Attention or MLP in every block.
    """
    axis = as_axis(tp)
    recompute.check(len(blocks), axis.size, sequence_parallel)
    chosen = [] if recompute.mode == "none" else blocks[: recompute.blocks]
    kind = {"attention": Attention, "mlp": MLP}.get(recompute.mode)
    parts = [[part for part in block.modules() if kind is not None and isinstance(part, kind)] for block in chosen]
    for block, found in zip(chosen, parts, strict=True):
        if kind is None and "forward" in vars(block):
            raise ValueError(f"{type(block).__name__} has a forward of its own already, as a block that recomputes has: apply it once")
        if kind is not None and not found:
            told = f'recompute mode="{recompute.mode}" needs megapar\'s {kind.__name__} in every block'
            raise ValueError(f'{told}, {type(block).__name__} has none: use mode="full"')
    for block, found in zip(chosen, parts, strict=True):
        if kind is None:
            block._sharded_over = axis if recompute.shard_saved_input else None  # type: ignore[assignment]
            block.forward = MethodType(_recomputed, block)
        for part in found:
            part.recompute = True  # type: ignore[assignment]


def _recomputed(block: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a block's forward."""
    forward, axis = partial(type(block).forward, block), block._sharded_over
    # The arguments are saved under these hooks, and nothing else: what the block saves goes to the checkpoint's own.
    with nullcontext() if axis is None else saved_tensors_hooks(partial(_shard, axis), partial(_gather, axis)):
        if isinstance(block, DecoderBlock):
            return checkpointed(forward, *args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _shard(axis: Axis, x: Tensor) -> Tensor | tuple[Tensor, torch.Size]:
    """This rank's part of a hidden state; another tensor as it is."""
    if not x.requires_grad:
        return x
    flat, size = x.detach().reshape(-1), -(-x.numel() // axis.size)
    part = flat.new_zeros(size)  # not a view, which would keep all of x
    mine = flat[axis.rank * size : (axis.rank + 1) * size]
    part[: mine.numel()] = mine
    return part, x.shape


def _gather(axis: Axis, kept: Tensor | tuple[Tensor, torch.Size]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    part, shape = kept
    return start_all_gather(part, axis).wait()[: shape.numel()].view(shape)
