"""What adamw and grad_norm share in their kernels: tensors that a table names, eight elements to a thread.

Rows of 8 elements: of 16 bits they are one access of 128 bits, of 32 bits two. Triton gives a thread no more than 128 bits of what it
stores, so tiles [ROWS, 8] of fp32 beside bf16 would be laid out differently, 4 to a thread, and go through shared memory between one layout
and the other. Here every value is a pair of tiles [ROWS, 4], the halves of its rows: fp32 is two loads, 16 bits are one whose registers are
then called by two names. tests/aot/test_adamw.py finds no conversion.

A row that is whole is accessed by a mask that is the same for all of it, which keeps it one access. The row that a tensor's end cuts is a
tile of its own, element by element.
"""

import torch
import triton
import triton.language as tl

POINTEE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int16: tl.uint16}


@triton.jit
def pointer(table, dtype: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """To what the table's entry has the address of."""
    p = tl.load(table).to(tl.pointer_type(dtype))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def offsets(row, WIDTH: tl.constexpr, half: tl.constexpr):  # type: ignore[no-untyped-def]
    return row[:, None] * 8 + (tl.arange(0, WIDTH)[None, :] + half)


@triton.jit
def inside(row, at, left, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the elements `at` of `row` are to be accessed, of `left` elements: of whole rows, or of the one that is not."""
    if WHOLE:
        return (row * 8 + 8 <= left)[:, None]
    else:
        return at < left


@triton.jit
def halves(x):  # type: ignore[no-untyped-def]
    """[ROWS, 8] as two tiles [ROWS, 4]: other names for the same registers."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 4]), (0, 2, 1)))


@triton.jit
def load_halves(p, row, left, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `row` [ROWS] of p, in its dtype, as two tiles [ROWS, 4]; 0 where there is nothing."""
    if p.dtype.element_ty.primitive_bitwidth == 32 or not WHOLE:
        low, high = offsets(row, 4, 0), offsets(row, 4, 4)
        a = tl.load(p + low, mask=inside(row, low, left, WHOLE), other=0)
        b = tl.load(p + high, mask=inside(row, high, left, WHOLE), other=0)
    else:
        at = offsets(row, 8, 0)
        a, b = halves(tl.load(p + at, mask=inside(row, at, left, WHOLE), other=0))
    return a, b


@triton.jit
def store_halves(p, a, b, row, left, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse."""
    if p.dtype.element_ty.primitive_bitwidth == 32 or not WHOLE:
        low, high = offsets(row, 4, 0), offsets(row, 4, 4)
        tl.store(p + low, a, mask=inside(row, low, left, WHOLE))
        tl.store(p + high, b, mask=inside(row, high, left, WHOLE))
    else:
        at = offsets(row, 8, 0)
        x = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [row.shape[0], 8])
        tl.store(p + at, x, mask=inside(row, at, left, WHOLE))
