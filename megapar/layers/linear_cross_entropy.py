"""Output projection and cross-entropy as one, in chunks of tokens: the logits of all tokens never exist, nor does their gradient.

    loss = sum_t cross_entropy(x w^T)_t          over the vocabulary that the ranks of tp share

Forward computes a chunk's logits, its loss, and at once its gradients, which then only have to be multiplied by what arrives in backward:
three GEMMs a token as usual, none of them twice. Memory: one chunk of logits and an fp32 gradient of the weight (Liger's way,
arXiv:2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megapar import grads
from megapar.collectives import run_eagerly
from megapar.layers.cross_entropy import local_targets
from megapar.mesh import Axis, TensorParallel, as_axis
from megapar.ops.cross_entropy import cross_entropy_grad, cross_entropy_join, cross_entropy_loss, cross_entropy_statistics
from megapar.ops.linear import linear_forward, linear_input_grad, linear_weight_grad
from megapar.transport import start_all_gather, start_all_reduce, start_reduce_scatter

CPU_BYTES = 48 << 20
"""Of a chunk's logits at most: enough rows for an efficient GEMM. Two or more times as many tokens as one may have are in
chunks of 32 MiB or more, which glibc gives back at once; of 28 MiB it kept three (`python -m benchmarks.linear_cross_entropy`: peak MB)."""
GPU_ROWS = 2048
GPU_TILES = 8 * 148


def chunk_rows(device_type: str, columns: int, itemsize: int) -> int:
    """Tokens of a chunk at most, whose logits are `columns` wide on a rank and of `itemsize` bytes.

    On a GPU (computed, not measured), for each weight a chunk moves 12 bytes, for 6 FLOPs a row: the weight twice, its fp32 gradient in
    and out. A B200, A100 or H100 has 280, 150 or 300 FLOPs a byte of its memory: 2048 rows keep the weight's traffic below a third of
    the products' time. Narrow logits get more rows: eight tiles of 128 x 256 for each of 148 multiprocessors, of whose last round a
    part may be idle. A vocabulary of 128256 in bf16 then is 501 MiB of logits on one GPU.
    """
    if device_type == "cuda":
        return max(GPU_ROWS, GPU_TILES * 128 * 256 // columns)
    return max(1, CPU_BYTES // (columns * itemsize))


def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    tp: TensorParallel,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    loss_scale: float | Tensor = 1.0,
    token_losses: Tensor | None = None,
) -> Tensor:
    """The fp32 sum of the losses of vocab_parallel_cross_entropy(x weight^T, target), 0-d.

    x [..., h], the same on all ranks, or with `sequence_parallel` this rank's ceil(t / tp) tokens; weight [this rank's part of the
    vocabulary, h]; target int64, one for each token. loss_scale: what backward will be called with. Any other seed gives the same
    gradients too; but those of fp16 are computed in forward, at this scale, and would underflow without it. token_losses: [t], is
    filled with what the sum is of. One collective forward for each chunk (four fp32 numbers a token), one backward. Raises as
    vocab_parallel_cross_entropy does, and for a number loss_scale <= 0 and token_losses of another size.
    """
    axis = as_axis(tp)
    if not isinstance(loss_scale, Tensor) and not loss_scale > 0:
        raise ValueError(f"loss_scale={loss_scale} must be above 0: leave it out, or pass what backward will be called with")
    sharded = sequence_parallel and axis.size > 1
    rows, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    held = -(-flat.numel() // axis.size) if sharded else flat.numel()
    if rows.shape[0] != held:
        raise ValueError(f"x has {rows.shape[0]} tokens and {held} of the {flat.numel()} targets are this rank's: give one for each")
    if token_losses is not None and token_losses.shape != flat.shape:
        raise ValueError(f"token_losses has shape {tuple(token_losses.shape)} and must be [{flat.numel()}]: give a place for each target")
    index, ignored, size = local_targets(flat, weight.shape[0], axis, vocab_size, ignore_index, label_smoothing, z_loss)
    options = {"vocab_size": size, "label_smoothing": label_smoothing, "z_loss": z_loss}
    needs = (x.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else (False, False)
    return run_eagerly(_LinearCrossEntropy, rows, weight, index, ignored, axis, sharded, options, loss_scale, needs, token_losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        index: Tensor,
        ignored: Tensor,
        axis: Axis,
        sharded: bool,
        options: dict[str, Any],
        loss_scale: float | Tensor,
        needs: tuple[bool, bool],
        token_losses: Tensor | None,
    ) -> Tensor:
        t = index.shape[0]
        full = start_all_gather(x, axis).wait()[:t] if sharded else x
        dx = torch.empty_like(full) if needs[0] else None
        dw = weight.new_empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32)) if needs[1] else None
        scale = torch.as_tensor(loss_scale, dtype=torch.float64, device=x.device).clone()  # of this step, also when the next one moves it
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        # The same on every rank, though the parts of the vocabulary may differ by one: each chunk is a collective.
        most = chunk_rows(x.device.type, -(-options["vocab_size"] // axis.size), x.element_size())
        rows = -(-t // -(-t // most)) if t else 1
        for start in range(0, t, rows):
            chunk = slice(start, min(start + rows, t))
            logits = linear_forward(full[chunk], weight)
            local = cross_entropy_statistics(logits, index[chunk], options["label_smoothing"])
            parts = local if axis.size == 1 else start_all_gather(local, axis).wait()
            lse, at_target, summed = cross_entropy_join(parts.view(axis.size, *local.shape))
            losses = cross_entropy_loss(lse, at_target, summed, ignored[chunk], **options)
            total += losses.sum()
            if token_losses is not None:
                token_losses[chunk] = losses
            if any(needs):
                seed = scale.to(lse).expand(lse.shape[0])
                logits = cross_entropy_grad(seed, logits, index[chunk], lse, ignored[chunk], **options, overwrite=True)
            if dx is not None:
                dx[chunk] = linear_input_grad(logits, weight)
            if dw is not None:
                linear_weight_grad(logits, full[chunk], dw, float(start > 0))
            del logits  # before the next chunk's are made (test_linear_cross_entropy.py::test_one_chunk_at_a_time)
        if dw is not None and t == 0:
            dw.zero_()
        ctx.save_for_backward(dx, dw)
        ctx.weight, ctx.axis, ctx.sharded, ctx.scale = weight, axis, sharded, scale
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        ratio = dloss / ctx.scale.to(dloss)
        reducing = None
        if dx is not None:
            # In fp32: a ratio rounded to 16 bits would put the same error on every gradient (test_linear_cross_entropy.py::test_any_seed).
            dx = (dx.to(ratio.dtype) * ratio).to(dx.dtype)
            if ctx.axis.size > 1:
                reducing = start_reduce_scatter(dx, ctx.axis) if ctx.sharded else start_all_reduce(dx, ctx.axis)
        if dw is not None:
            dw = _deliver(ctx.weight, dw, ratio)
        return reducing.wait() if reducing is not None else dx, dw, None, None, None, None, None, None, None, None


def _deliver(weight: Tensor, dw: Tensor, ratio: Tensor) -> Tensor | None:
    """Adds ratio * dw to the weight's main_grad in one pass, or returns it for autograd."""

    def write(main_grad: Tensor, beta: float) -> None:
        if beta:
            main_grad.addcmul_(dw, ratio)
        else:
            torch.mul(dw, ratio, out=main_grad)

    if grads.accumulate(weight, write):
        return None
    grad = torch.empty_like(weight)
    for part, wide in zip(grad.split(1024), dw.split(1024), strict=True):  # no second fp32 gradient of the whole weight
        part.copy_(wide * ratio)
    return grad
