"""The main loop of every GEMM: a tile of C = A B as one fp32 sum along K, in ascending order.

A [m, k] and B [k, n] are pointers with the distance of neighbours in either dimension; one that is 1 is known to the compiler, so that one
loop serves every layout: rows of 16-byte vectors are copied along the dimension whose neighbours are adjacent. What a tile has beyond the
edges of A and B is 0, along K in both: 0 times infinity must not reach a result (tests/ops/test_linear_numbers.py::
test_not_finite_stays_in_its_row). Offsets are int64: a row may start beyond 2^31 elements.
"""

import triton
import triton.language as tl

from megapar.ops.triton.floats import INTERPRET, widen


@triton.jit
def place(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows and columns of this program's tile. Programs go down GROUP_M tiles, then to the next column of tiles."""
    program = tl.program_id(0)
    down, across = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = program // (GROUP_M * across) * GROUP_M
    high = min(down - first, GROUP_M)
    within = program % (GROUP_M * across)
    row, column = first + within % high, within // high
    return row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def dot(a, b, c):  # type: ignore[no-untyped-def]
    """c + a b. fp32 operands are multiplied as they are, never as TF32. The interpreter would multiply the bits of 16-bit floats."""
    if INTERPRET:
        return tl.dot(widen(a), widen(b), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def product(  # type: ignore[no-untyped-def]
    a, b, b2, row, column, m, n, k, a_row, a_step, b_step, b_column, BLOCK_K: tl.constexpr, PAIR: tl.constexpr
):
    """A B and, with PAIR, A B2 of the same shape and strides; the second is 0 otherwise. fp32 [BLOCK_M, BLOCK_N]."""
    step = tl.arange(0, BLOCK_K)
    left = row.to(tl.int64)[:, None] * a_row + step.to(tl.int64)[None, :] * a_step
    right = step.to(tl.int64)[:, None] * b_step + column.to(tl.int64)[None, :] * b_column
    rows, columns = row[:, None] < m, column[None, :] < n
    c = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    c2 = c
    for start in range(0, k, BLOCK_K):
        within = step < k - start
        x = tl.load(a + left, mask=rows & within[None, :], other=0.0)
        c = dot(x, tl.load(b + right, mask=within[:, None] & columns, other=0.0), c)
        if PAIR:
            c2 = dot(x, tl.load(b2 + right, mask=within[:, None] & columns, other=0.0), c2)
        a += BLOCK_K * tl.cast(a_step, tl.int64)
        b += BLOCK_K * tl.cast(b_step, tl.int64)
        if PAIR:
            b2 += BLOCK_K * tl.cast(b_step, tl.int64)
    return c, c2
