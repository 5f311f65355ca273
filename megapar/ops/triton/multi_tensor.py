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
def load_halves(p, row, left, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `row` [ROWS] of p, of which `left` elements exist, in its dtype as two tiles [ROWS, 4]; 0 where there is nothing.

    WHOLE: only rows that lie in it wholly. Else elements are accessed one by one: of the row that the end cuts, and of tensors that are
    not aligned.
    """
    if WHOLE:
        mask = row[:, None] * 8 + 8 <= left
        if p.dtype.element_ty.primitive_bitwidth == 32:
            at = row[:, None] * 8 + tl.arange(0, 4)[None, :]
            a, b = tl.load(p + at, mask=mask, other=0), tl.load(p + at + 4, mask=mask, other=0)
        else:
            x = tl.load(p + (row[:, None] * 8 + tl.arange(0, 8)[None, :]), mask=mask, other=0)
            a, b = tl.split(tl.permute(tl.reshape(x, [row.shape[0], 2, 4]), (0, 2, 1)))
    else:
        at = row[:, None] * 8 + tl.arange(0, 4)[None, :]
        a, b = tl.load(p + at, mask=at < left, other=0), tl.load(p + at + 4, mask=at + 4 < left, other=0)
    return a, b


@triton.jit
def store_halves(p, a, b, row, left, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse."""
    if WHOLE:
        mask = row[:, None] * 8 + 8 <= left
        if p.dtype.element_ty.primitive_bitwidth == 32:
            at = row[:, None] * 8 + tl.arange(0, 4)[None, :]
            tl.store(p + at, a, mask=mask)
            tl.store(p + at + 4, b, mask=mask)
        else:
            x = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [row.shape[0], 8])
            tl.store(p + (row[:, None] * 8 + tl.arange(0, 8)[None, :]), x, mask=mask)
    else:
        at = row[:, None] * 8 + tl.arange(0, 4)[None, :]
        tl.store(p + at, a, mask=at < left)
        tl.store(p + at + 4, b, mask=at + 4 < left)
