"""Formulas and bytes: megapar/ops/cross_entropy.py.

Statistics: a program walks one row in chunks and reads each logit once. Gradient: a program takes one chunk of one row, which it alone
reads and writes, so that it may write over the logits. A chunk is 16 elements a thread: two 128-bit accesses of 16 bits on their way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.checks import check_float, named, require
from megapar.ops.triton.exp import exp
from megapar.ops.triton.floats import load, store
from megapar.ops.triton.launch import ceil_div, launch

CHUNK, NUM_WARPS = 4096, 8
GRAD_CHUNK, GRAD_WARPS = 2048, 4


@triton.jit(do_not_specialize=["t"])
def cross_entropy_statistics_kernel(logits, index, out, t, v, stride, WITH_SUM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums are kept a lane: a chain is v / BLOCK additions deep, and after it 16 elements of a thread and 8 steps of a tree.

    tl.exp's error of |x| units is less than one unit of the sum, since |x| exp(-|x|) < 1/2.
    """
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * stride
    most = float("-inf")
    totals, sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, v, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < v
        x = load(z + column, inside)
        if WITH_SUM:
            sums += x
        x = tl.where(inside, x, float("-inf"))
        top = tl.maximum(most, tl.max(x, 0))
        # exp(-inf - 0) = 0 is the right term of a row that has been -inf so far, exp(-inf + inf) would be NaN.
        shift = tl.where(top == float("-inf"), 0.0, top)
        totals = totals * tl.exp(most - shift) + tl.exp(x - shift)
        most = top
    target = tl.load(index + row)
    at_target = tl.load(z + target, mask=(target >= 0) & (target < v), other=0.0).to(tl.float32)
    tl.store(out + row, most)
    tl.store(out + t + row, tl.sum(totals, 0))
    # No host looks at the index on a GPU: what lies beyond the row makes the loss NaN.
    tl.store(out + 2 * t.to(tl.int64) + row, tl.where(target >= v, float("nan"), at_target))
    tl.store(out + 3 * t.to(tl.int64) + row, tl.sum(sums, 0))


@triton.jit
def cross_entropy_grad_kernel(  # type: ignore[no-untyped-def]
    dloss, logits, out, index, lse, ignored, v, stride, out_stride, smoothing, uniform, z_loss, BLOCK: tl.constexpr
):
    """A chunk of one token's row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    skip = tl.load(ignored + row).to(tl.int1)
    shift, target = tl.load(lse + row), tl.load(index + row)
    # An ignored token's logits may hold anything, also inf: 0 * nan must not reach the weights.
    softmax = exp(load(logits + row * stride + column, (column < v) & (skip == 0)) - shift) * (1 + 2 * z_loss * shift)
    grad = tl.where(column == target, softmax + (smoothing - 1), softmax) - uniform
    store(out + row * out_stride + column, tl.where(skip, 0.0, grad * tl.load(dloss + row)), column < v)


def cross_entropy_statistics(logits: Tensor, index: Tensor, with_sum: bool) -> Tensor:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/cross_entropy.py."""
    check_float(logits, "logits")
    index = _check_index(index, logits)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    t, v = logits.shape
    out = logits.new_empty(4, t, dtype=torch.float32)
    options = {"WITH_SUM": with_sum, "BLOCK": CHUNK, "num_warps": NUM_WARPS}
    launch(cross_entropy_statistics_kernel, (t,), logits, index, out, t, v, logits.stride(0), **options)
    return out


def cross_entropy_grad(
    dloss: Tensor, logits: Tensor, index: Tensor, lse: Tensor, ignored: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """The same."""
    check_float(logits, "logits")
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = logits.new_empty(logits.shape)
    _write_grad(dloss, logits, index, lse, ignored, vocab_size, label_smoothing, z_loss, out)
    return out


def cross_entropy_grad_(
    dloss: Tensor, logits: Tensor, index: Tensor, lse: Tensor, ignored: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> None:
    """The same, over the logits."""
    check_float(logits, "logits")
    require(logits.dim() == 2, f"logits have shape {list(logits.shape)} and must be [t, v]: flatten them")
    t, v = logits.shape
    require(
        t * v == 0 or ((v == 1 or logits.stride(1) == 1) and (t == 1 or logits.stride(0) >= v)),
        f"logits have strides {list(logits.stride())} and must have dense rows that do not overlap: make them contiguous",
    )
    for other in (dloss, lse):
        require(
            logits.is_meta or other.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr() or t * v == 0,
            "dloss and lse must not share the memory of logits, which is overwritten: clone them",
        )
    _write_grad(dloss, logits, index, lse, ignored, vocab_size, label_smoothing, z_loss, logits)


def _check_index(index: Tensor, logits: Tensor) -> Tensor:
    """int64 [t], below v; where negative, the target is not among these logits. On a GPU values are not looked at: the host would wait."""
    require(logits.dim() == 2, f"logits have shape {list(logits.shape)} and must be [t, v]: flatten them")
    t, v = logits.shape
    require(
        index.dtype == torch.int64 and index.shape == (t,) and index.device == logits.device,
        f"index has shape {list(index.shape)} and dtype {named(index.dtype)}: give one int64 for each of the {t} rows of logits",
    )
    if index.device.type == "cpu":
        most = int(index.max()) if t else -1
        require(most < v, f"index contains {most} and the logits are {v} wide: correct it")
    return index.contiguous()


def _per_row(x: Tensor, dtype: torch.dtype, logits: Tensor, name: str) -> Tensor:
    t = logits.shape[0]
    require(
        x.dtype == dtype and x.shape == (t,) and x.device == logits.device,
        f"{name} has shape {list(x.shape)} and dtype {named(x.dtype)}: give one {named(dtype)} for each of the {t} rows of logits",
    )
    return x.contiguous()


def _write_grad(
    dloss: Tensor,
    logits: Tensor,
    index: Tensor,
    lse: Tensor,
    ignored: Tensor,
    vocab_size: int,
    smoothing: float,
    z_loss: float,
    out: Tensor,
) -> None:
    index = _check_index(index, logits)
    t, v = logits.shape
    require(vocab_size >= v, f"vocab_size={vocab_size} must be at least the {v} logits of a row: raise it")
    dloss, lse = _per_row(dloss, torch.float32, logits, "dloss"), _per_row(lse, torch.float32, logits, "lse")
    ignored = _per_row(ignored, torch.bool, logits, "ignored")
    numbers = smoothing, smoothing / vocab_size if vocab_size else 0.0, z_loss
    grid, options = (t, ceil_div(v, GRAD_CHUNK)), {"BLOCK": GRAD_CHUNK, "num_warps": GRAD_WARPS}
    args = (dloss, logits, out, index, lse, ignored, v, logits.stride(0), out.stride(0), *numbers)
    launch(cross_entropy_grad_kernel, grid, *args, **options)
