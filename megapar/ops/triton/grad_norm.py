"""Formula and bounds: megapar/ops/grad_norm.py. Three launches and one more for each further dtype, no atomics.

sums_kernel      a program for NORM_CHUNK elements of a tensor writes their sum of squares, and how many are not finite or 0
tensors_kernel   a program for each tensor adds its chunks' in an order that depends on the tensor alone
total_kernel     one program adds the tensors' to the total, one after the other, so that a list may be cut into calls

Squares of 16-bit elements are added in fp32 over the eight that a thread reads at once, then in fp64. Where the chunk's sum is so small
that squares may have underflowed, or so large that one may have overflowed, it is taken again in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from megapar.ops.dispatch import INTERPRETED
from megapar.ops.multi_tensor import NORM_CHUNK, grad_norm_tables
from megapar.ops.triton.floats import widen
from megapar.ops.triton.launch import launch
from megapar.ops.triton.multi_tensor import POINTEE, load_halves, pointer

NUM_WARPS = 8
ROWS = NORM_CHUNK // 8 if INTERPRETED else 32 * NUM_WARPS
LANES, UNROLL = 1024, 1 if INTERPRETED else 16
"""Partial sums that tensors_kernel takes at once, and tensors that total_kernel does."""


@triton.jit
def row_squares(a, b, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS] fp64, of two tiles [ROWS, 4]; WIDE: squares and all sums in fp64."""
    if WIDE:
        a, b = a.to(tl.float64), b.to(tl.float64)
    return tl.sum(a * a + b * b, axis=1).to(tl.float64)


@triton.jit
def chunk_squares(p, left, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of squares of a chunk in fp64; WIDE, each square too."""
    squares = tl.zeros([ROWS], tl.float64)
    for i in range(0, CHUNK // 8, ROWS):
        a, b = load_halves(p, i + tl.arange(0, ROWS), left, ALIGNED)
        squares += row_squares(widen(a), widen(b), WIDE)
    total = tl.sum(squares)
    if ALIGNED and left % 8 != 0:
        a, b = load_halves(p, left // 8 + tl.arange(0, 1), left, False)
        total += tl.sum(row_squares(widen(a), widen(b), WIDE))
    return total


@triton.jit
def count(a, b):  # type: ignore[no-untyped-def]
    """How many elements of two tiles are not finite, and how many are 0."""
    a, b = a.to(tl.uint32, bitcast=True) & 0x7FFFFFFF, b.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    nonfinite = (a >= 0x7F800000).to(tl.int32) + (b >= 0x7F800000).to(tl.int32)
    return tl.sum(nonfinite), tl.sum((a == 0).to(tl.int32) + (b == 0).to(tl.int32))


@triton.jit
def store_counts(  # type: ignore[no-untyped-def]
    out, p, left, ZEROS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """How many elements of a chunk are not finite, and how many are 0."""
    # What is not in the chunk was loaded as zeros.
    nonfinite = left * 0
    zeros, padding = nonfinite, CHUNK - left
    for i in range(0, CHUNK // 8, ROWS):
        a, b = load_halves(p, i + tl.arange(0, ROWS), left, ALIGNED)
        more_nonfinite, more_zeros = count(widen(a), widen(b))
        nonfinite += more_nonfinite
        zeros += more_zeros
    if ALIGNED:
        a, b = load_halves(p, left // 8 + tl.arange(0, 1), left, False)
        more_nonfinite, more_zeros = count(widen(a), widen(b))
        nonfinite += more_nonfinite
        zeros += more_zeros
        padding += 8
    tl.store(out + 1, nonfinite.to(tl.float64))
    if ZEROS:
        tl.store(out + 2, (zeros - padding).to(tl.float64))
    else:
        tl.store(out + 2, 0.0)


@triton.jit
def sums_kernel(  # type: ignore[no-untyped-def]
    table, chunks, partials, grad_dtype: tl.constexpr, ALIGNED: tl.constexpr, COUNT_ZEROS: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The three sums of one chunk, to its place in `partials`."""
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(chunks + 2 * program).to(tl.int64) * 3
    chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
    left = tl.minimum(tl.load(entry + 1) - chunk * CHUNK, CHUNK).to(tl.int32)
    p = pointer(entry, grad_dtype, ALIGNED) + chunk * CHUNK
    out = partials + (tl.load(entry + 2) + chunk) * 3
    squares = chunk_squares(p, left, ALIGNED, CHUNK, ROWS, grad_dtype == tl.float32)
    # Each square that underflows loses less than 2^-126, all of them 2^-22 of what is left alone here; one that overflows is infinite.
    # The bounds are 2^-90 and 2^120.
    if grad_dtype != tl.float32 and not ((squares > 8.077935669463161e-28) & (squares < 1.329227995784916e36)):
        squares = chunk_squares(p, left, ALIGNED, CHUNK, ROWS, True)
    tl.store(out, squares)
    if COUNT_ZEROS:
        store_counts(out, p, left, True, ALIGNED, CHUNK, ROWS)
    elif squares < float("inf"):  # squares of finite elements do not overflow in fp64
        tl.store(out + 1, 0.0)
        tl.store(out + 2, 0.0)
    else:
        store_counts(out, p, left, False, ALIGNED, CHUNK, ROWS)


@triton.jit
def tensors_kernel(table, partials, sums, CHUNK: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of one tensor's chunks, by lane and then in a tree: an order that its size alone decides."""
    tensor = tl.program_id(0).to(tl.int64)
    entry = table + tensor * 3
    count, first = (tl.load(entry + 1) + CHUNK - 1) // CHUNK, partials + tl.load(entry + 2) * 3
    lane = tl.arange(0, LANES)
    squares, nonfinite, zeros = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    for at in range(0, count, LANES):
        mask = at + lane < count
        squares += tl.load(first + (at + lane) * 3, mask=mask, other=0.0)
        nonfinite += tl.load(first + (at + lane) * 3 + 1, mask=mask, other=0.0)
        zeros += tl.load(first + (at + lane) * 3 + 2, mask=mask, other=0.0)
    tl.store(sums + tensor * 3, tl.sum(squares))
    tl.store(sums + tensor * 3 + 1, tl.sum(nonfinite))
    tl.store(sums + tensor * 3 + 2, tl.sum(zeros))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["total"])
def total_kernel(sums, total, n, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def]
    """total += the sums of the tensors, one after the other."""
    squares, nonfinite, zeros = tl.load(total), tl.load(total + 1), tl.load(total + 2)
    for i in range(0, n, UNROLL):
        for k in tl.static_range(UNROLL):  # so that their loads are in flight together
            inside = i + k < n
            squares += tl.load(sums + (i + k) * 3, mask=inside, other=0.0)
            nonfinite += tl.load(sums + (i + k) * 3 + 1, mask=inside, other=0.0)
            zeros += tl.load(sums + (i + k) * 3 + 2, mask=inside, other=0.0)
    tl.store(total, squares)
    tl.store(total + 1, nonfinite)
    tl.store(total + 2, zeros)


def grad_norm_(total: Tensor, grads: Sequence[Tensor], count_zeros: bool = False) -> None:
    """Body of the op: shapes, dtypes and errors are those of megapar/ops/grad_norm.py."""
    tables, partials = grad_norm_tables(total, grads)
    if partials == 0:
        return
    table = tables.table.on_this_stream()
    found, sums = total.new_empty(partials, 3), total.new_empty(len(grads), 3)
    for group in tables.groups:
        (dtype,), chunks = group.dtypes, group.chunks.on_this_stream()
        assert dtype is not None
        launch(
            sums_kernel, (len(chunks),), table, chunks, found,
            grad_dtype=POINTEE[dtype], ALIGNED=group.aligned, COUNT_ZEROS=count_zeros, CHUNK=NORM_CHUNK, ROWS=ROWS, num_warps=NUM_WARPS,
        )  # fmt: skip
    launch(tensors_kernel, (len(grads),), table, found, sums, CHUNK=NORM_CHUNK, LANES=LANES, num_warps=4)
    launch(total_kernel, (1,), sums, total, len(grads), UNROLL=UNROLL, num_warps=1)
