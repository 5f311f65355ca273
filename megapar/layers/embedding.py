"""Vocabulary-parallel embedding: a stand-in for `nn.Embedding` with the rows cut over tp (arXiv:1909.08053, section 3).

The vocabulary need not be a multiple of tp: the first ranks hold one row more, and no padding rows exist.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar import grads
from megapar.collectives import check_same, run_eagerly
from megapar.mesh import Axis, TensorParallel, as_axis
from megapar.params import Init, ParamSpec, Piece, SpecParameter, draw, split
from megapar.transport import start_all_gather, start_all_reduce, start_reduce_scatter


class VocabParallelEmbedding(nn.Module):
    """ids, int [...], to rows [..., embedding_dim], the same on all ranks.

    With `sequence_parallel`, ids [t, ...] give this rank's share of the tokens, ceil(t / tp) of them along dimension 0, zeros past t.
    Initial values are nn.Embedding's from the same torch seed, whatever tp is. Raises ValueError for ids of a dtype that is not an
    integer's, ids outside the vocabulary (asserted on the device for CUDA ids), ids that differ between the ranks of tp (checked at each
    call on CPU, and at the first one elsewhere), and for a vocabulary smaller than tp.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        tp: TensorParallel = None,
        sequence_parallel: bool = False,
        init: Init | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tp = as_axis(tp)
        self.num_embeddings, self.embedding_dim, self.sequence_parallel = num_embeddings, embedding_dim, sequence_parallel
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim={embedding_dim} must be 1 or more: give the embedding some width")
        self._checked = False
        self.start, stop = split(num_embeddings, self.tp.size, what="num_embeddings")[self.tp.rank]
        piece = Piece("weight", (num_embeddings, embedding_dim), (self.start, 0), (stop, embedding_dim))
        weight = torch.empty(stop - self.start, embedding_dim, device=device, dtype=dtype)
        self.weight = SpecParameter.of(weight, ParamSpec((piece,), init or standard_normal, defers=True))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the full table from torch's generator, as nn.Embedding does, and keeps this rank's rows."""
        draw(self)

    def forward(self, ids: Tensor) -> Tensor:
        # First, so that ids which are wrong are wrong on every rank, and none is left waiting for one that raised.
        if self.tp.size > 1 and (ids.device.type == "cpu" or not self._checked):
            check_same_ids(ids, self.tp)
            self._checked = True
        check_ids(ids, self.num_embeddings, "token ids")
        return embed(ids, self.weight, self.tp, self.start, self.sequence_parallel)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tp={self.tp.rank}/{self.tp.size}"


def embed(ids: Tensor, weight: Tensor, axis: Axis, start: int = 0, sequence_parallel: bool = False) -> Tensor:
    """Rows of a table, of which this rank of the axis has those from `start` on. The gradient goes where `grads.accumulate` says."""
    if axis.size == 1 and not grads.has_main_grad(weight):
        return F.embedding(ids, weight)
    return run_eagerly(_VocabEmbedding, ids, weight, start, axis, sequence_parallel and axis.size > 1)


class _VocabEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, start: int, axis: Axis, sharded: bool) -> Tensor:
        index = ids - start
        elsewhere = (index < 0) | (index >= weight.shape[0])
        index = index.masked_fill(elsewhere, 0)
        ctx.save_for_backward(index, elsewhere)
        ctx.weight, ctx.axis, ctx.sharded = weight, axis, sharded
        rows = F.embedding(index, weight).masked_fill_(elsewhere[..., None], 0.0)
        if axis.size == 1:
            return rows
        return (start_reduce_scatter(rows, axis) if sharded else start_all_reduce(rows, axis)).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        index, elsewhere = ctx.saved_tensors
        if ctx.sharded:
            dy = start_all_gather(dy, ctx.axis).wait()[: index.shape[0]]
        dy, rows = dy.masked_fill(elsewhere[..., None], 0.0), ctx.weight.shape[0]

        def gradient() -> Tensor:
            # Deterministic on every device, which index_add_ is not on CUDA.
            return torch.ops.aten.embedding_dense_backward(dy, index, rows, -1, False)

        later = grads.accumulate(ctx.weight, lambda main_grad, beta: grads.put(main_grad, beta, gradient()))
        return None, None if later else gradient(), None, None, None


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: float, x: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, dy * ctx.factor


def with_gradient_times(factor: float, x: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`: GLM-130B's shrink of the embedding's (arXiv:2210.02414, section 3.1)."""
    return x if factor == 1.0 else _GradientTimes.apply(factor, x)


def standard_normal(full: Tensor, generator: torch.Generator | None) -> None:
    """nn.Embedding's initial table: N(0, 1)."""
    full.normal_(generator=generator)


@torch.compiler.disable
def check_same_ids(ids: Tensor, axis: Axis) -> None:
    """Raises the same ValueError on every rank unless all of them were given the same ids: each rank of tp needs the whole batch."""
    what = repr((ids.dtype, tuple(ids.shape))).encode()
    digest = zlib.crc32(what, zlib.crc32(ids.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()))
    digests = start_all_gather(torch.tensor([digest], device=ids.device), axis).wait()
    if int(digests.min()) != int(digests.max()):
        check_same({"dtype": str(ids.dtype), "shape": list(ids.shape), "crc32": digest}, axis, "token ids")


@torch.compiler.disable
def check_ids(ids: Tensor, size: int, what: str) -> None:
    """Raises ValueError unless `ids` are integers in [0, size). An id that no rank holds would silently become a zero row."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{what} have dtype {ids.dtype} and must be int64 or int32: convert them with .long()")
    if ids.numel() == 0:
        return
    low, high = torch.aminmax(ids)
    if ids.device.type != "cpu":
        torch._assert_async((low >= 0) & (high < size), f"{what} must lie in [0, {size})")
    elif int(low) < 0 or int(high) >= size:
        wrong = int(low) if int(low) < 0 else int(high)
        raise ValueError(f"{what} contain {wrong} and must lie in [0, {size}): check the tokenizer against the vocabulary size")
