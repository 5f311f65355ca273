"""Cross-entropy over a vocabulary that ranks share, in at least fp32, without a copy of the softmax.

With z the logits of one token, y its target, v the vocabulary size and lse = log sum_j exp(z_j):

    loss = lse - (1 - label_smoothing) z_y - label_smoothing / v sum_j z_j + z_loss lse^2
    dz_j = (1 + 2 z_loss lse) exp(z_j - lse) - (1 - label_smoothing) [j = y] - label_smoothing / v

as torch.nn.functional.cross_entropy has it, plus PaLM's z-loss (arXiv:2204.02311, section 5). Every term joins across ranks from four
numbers a token: `cross_entropy_statistics`. Moves t v elements forward (read the logits) and 2 t v backward (read them, write dz).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megapar.ops.dispatch import use_reference


def cross_entropy_statistics(logits: Tensor, index: Tensor, label_smoothing: float) -> Tensor:
    """Local share of what the loss needs: [4, t] in at least fp32 of max, sum of exp(z - max), z_y, sum of z (0 without smoothing).

    logits [t, v_local]; index int64 [t], the target's place among them, negative where it is not here.
    """
    if use_reference(logits):
        return cross_entropy_statistics_reference(logits, index, label_smoothing != 0)
    return torch.ops.megapar.cross_entropy_statistics.default(logits, index, label_smoothing != 0)


def cross_entropy_statistics_reference(logits: Tensor, index: Tensor, with_sum: bool) -> Tensor:
    """The same, in plain PyTorch."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = z.amax(-1)
    # A row of -inf has no finite maximum to subtract: exp(-inf - 0) = 0 is its right sum.
    shift = torch.where(largest.isinf() & (largest < 0), 0.0, largest)
    target = z.gather(-1, index.clamp(min=0)[:, None])[:, 0]
    return torch.stack(
        [
            largest,
            (z - shift[:, None]).exp().sum(-1),
            torch.where(index >= 0, target, 0.0),
            z.sum(-1) if with_sum else torch.zeros_like(largest),
        ]
    )


def cross_entropy_join(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[ranks, 4, t] of every rank's statistics to lse, z_y and sum of z, each [t], added in rank order."""
    if parts.shape[0] == 1:
        largest, total, target, everything = parts[0].unbind()
        return total.log() + largest, target, everything
    largest = parts[:, 0].amax(0)
    shift = torch.where(largest.isinf() & (largest < 0), 0.0, largest)
    scale = torch.where(parts[:, 0] == -torch.inf, 0.0, (parts[:, 0] - shift).exp())
    total = (parts[:, 1] * scale).sum(0)
    return total.log() + shift, parts[:, 2].sum(0), parts[:, 3].sum(0)


def cross_entropy_loss(
    lse: Tensor, target: Tensor, total: Tensor, ignored: Tensor, *, vocab_size: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Per-token loss [t] from the joined statistics; 0 where `ignored`."""
    loss = lse - (1 - label_smoothing) * target
    if label_smoothing:
        loss = loss - label_smoothing / vocab_size * total
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.masked_fill(ignored, 0.0)


def cross_entropy_grad(
    dloss: Tensor,
    logits: Tensor,
    index: Tensor,
    lse: Tensor,
    ignored: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    overwrite: bool = False,
) -> Tensor:
    """dloss [t] to the gradient of the local logits, [t, v_local] in their dtype; `overwrite` writes it over the logits."""
    args = (dloss, logits, index, lse, ignored, vocab_size, label_smoothing, z_loss)
    if use_reference(logits):
        grad = cross_entropy_grad_reference(*args)
        return logits.copy_(grad) if overwrite else grad
    if not overwrite:
        return torch.ops.megapar.cross_entropy_grad.default(*args)
    torch.ops.megapar.cross_entropy_grad_.default(*args)
    # What autograd saved is gone: a second backward must not take the gradient for logits (test_cross_entropy.py::test_overwritten_logits).
    torch.autograd.graph.increment_version(logits)
    return logits


def cross_entropy_grad_reference(
    dloss: Tensor, logits: Tensor, index: Tensor, lse: Tensor, ignored: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """The formula."""
    wide = lse.dtype
    scale = dloss.to(wide).masked_fill(ignored, 0.0)
    # An ignored token's logits may hold anything, also inf: 0 * nan must not reach the weights.
    softmax = (logits.to(wide) - lse[:, None]).exp_().masked_fill_(ignored[:, None], 0.0)
    if z_loss:
        softmax *= (1 + 2 * z_loss * lse)[:, None].masked_fill(ignored[:, None], 0.0)
    here = (index >= 0).to(wide) * (label_smoothing - 1)
    softmax.scatter_add_(-1, index.clamp(min=0)[:, None], here[:, None])
    if label_smoothing:
        softmax -= label_smoothing / vocab_size
    return softmax.mul_(scale[:, None]).to(logits.dtype)


@torch.library.register_fake("megapar::cross_entropy_statistics")
def _(logits: Tensor, index: Tensor, with_sum: bool) -> Tensor:
    return logits.new_empty(4, logits.shape[0], dtype=torch.float32)


@torch.library.register_fake("megapar::cross_entropy_grad")
def _(
    dloss: Tensor, logits: Tensor, index: Tensor, lse: Tensor, ignored: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("megapar::cross_entropy_grad_")
def _(
    dloss: Tensor, logits: Tensor, index: Tensor, lse: Tensor, ignored: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> None:
    return None
