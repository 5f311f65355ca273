"""16-bit floats in kernels: loads widen at once, stores round to nearest even.

Triton's interpreter keeps bf16 as bit patterns, cuts off where it should round, and computes with the patterns. So no kernel computes in 16
bits, and where the interpreter runs, rounding to bf16 is integer arithmetic; compiled it is the instruction for it.
"""

import triton
import triton.language as tl

from megapar.ops.dispatch import INTERPRETED

INTERPRET = tl.constexpr(INTERPRETED)


@triton.jit
def widen(x):  # type: ignore[no-untyped-def]
    """To fp32, exactly. The interpreter's own conversion makes 0 of a bf16 denormal: tests/ops/test_grad_norm.py::test_extremes."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load(pointer, mask):  # type: ignore[no-untyped-def]
    """As fp32; 0 where the mask is off."""
    return widen(tl.load(pointer, mask=mask, other=0.0))


@triton.jit
def round_to(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x to `dtype`, ties to even; a NaN stays a NaN."""
    if INTERPRET and dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        high = tl.where(x != x, (u >> 16) | 0x40, (u + 0x7FFF + ((u >> 16) & 1)) >> 16)
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def store(pointer, x, mask):  # type: ignore[no-untyped-def]
    """fp32 x in the pointer's dtype."""
    tl.store(pointer, round_to(x, pointer.dtype.element_ty), mask=mask)
