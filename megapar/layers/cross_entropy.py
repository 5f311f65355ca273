"""Cross-entropy over logits whose vocabulary is cut over tp: the full logits never exist on any rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar.collectives import run_eagerly
from megapar.layers.embedding import check_ids
from megapar.mesh import Axis, TensorParallel, as_axis
from megapar.ops.cross_entropy import cross_entropy_grad, cross_entropy_join, cross_entropy_loss, cross_entropy_statistics
from megapar.params import split
from megapar.transport import start_all_gather


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    tp: TensorParallel,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Per-token losses, fp32 [...], 0 where target is `ignore_index`: F.cross_entropy(..., reduction="none") for every tp.

    logits [..., this rank's part of the vocabulary]; target int64 [...], the same on all ranks. One collective forward (four fp32 numbers
    a token) and none backward. The logits are not modified, unless `overwrite_logits` lets backward write their gradient over them, which
    saves memory of their size: then nothing may read them after backward, and backward runs once.

    Without `vocab_size` the ranks first tell each other the widths of their parts, which costs one small collective more and a
    synchronisation with the host on CUDA; with it, the cut is that of VocabParallelEmbedding and ColumnParallelLinear. Raises ValueError
    for targets outside the vocabulary, shapes that do not match, and label_smoothing or z_loss out of range.
    """
    axis = as_axis(tp)
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"target has shape {tuple(target.shape)} and logits {tuple(logits.shape)}: give one target for each row of logits")
    index, ignored, size = local_targets(target.reshape(-1), logits.shape[-1], axis, vocab_size, ignore_index, label_smoothing, z_loss)
    rows = logits.reshape(-1, logits.shape[-1])
    options = {"vocab_size": size, "label_smoothing": label_smoothing, "z_loss": z_loss}
    loss = run_eagerly(_CrossEntropy, rows, index, ignored, axis, options, overwrite_logits)
    return loss.view(target.shape)


def local_targets(
    target: Tensor, width: int, axis: Axis, vocab_size: int | None, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, int]:
    """(place of each target in this rank's `width` entries of the vocabulary, or -1; which are ignored; size of the whole vocabulary).

    Raises ValueError for targets outside the vocabulary, a width that is not this rank's, and label_smoothing or z_loss out of range.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1]: 0 turns it off")
    if z_loss < 0.0:
        raise ValueError(f"z_loss={z_loss} must be 0 or more: 0 turns it off")
    start, size = _place(width, target.device, axis, vocab_size)
    ignored = target == ignore_index
    # An ignored row may look up any logit: nothing of it reaches the loss.
    index = target.masked_fill(ignored, 0)
    check_ids(index, size, "targets")
    if width < size:
        index = index - start
        index = index.masked_fill((index < 0) | (index >= width), -1)
    return index, ignored, size


def _place(width: int, device: torch.device, axis: Axis, vocab_size: int | None) -> tuple[int, int]:
    """Where this rank's part of the vocabulary starts, and the size of the whole."""
    if vocab_size is None:
        widths = _widths(width, device, axis)
        return sum(widths[: axis.rank]), sum(widths)
    start, stop = split(vocab_size, axis.size, what="vocab_size")[axis.rank]
    if stop - start != width:
        raise ValueError(f"logits are {width} wide, rank {axis.rank} of vocab_size={vocab_size} has {stop - start}: check both")
    return start, vocab_size


@torch.compiler.disable
def _widths(width: int, device: torch.device, axis: Axis) -> list[int]:
    if axis.size == 1:
        return [width]
    return start_all_gather(torch.tensor([width], device=device), axis).wait().tolist()


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, ignored: Tensor, axis: Axis, options: dict[str, Any], overwrite: bool) -> Tensor:
        local = cross_entropy_statistics(logits, index, options["label_smoothing"])
        parts = local if axis.size == 1 else start_all_gather(local, axis).wait()
        lse, target, total = cross_entropy_join(parts.view(axis.size, *local.shape))
        ctx.save_for_backward(logits, index, lse, ignored)
        ctx.options, ctx.overwrite = options, overwrite
        return cross_entropy_loss(lse, target, total, ignored, **options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grad = cross_entropy_grad(dloss, *ctx.saved_tensors, **ctx.options, overwrite=ctx.overwrite)
        return grad, None, None, None, None, None
