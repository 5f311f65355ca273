"""exp for where its relative error counts.

tl.exp is 2^(x log2(e)), and rounding that product alone is |x| units of the result: 20 at x = -20. Here the integer part of the product is
split off before anything is rounded. Some ten operations, two of them of the special function unit: kernels that read an element and write
one for each have them to spare.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    """Of fp32: within a few units of the result, denormal results and infinities too (tests/ops/test_cross_entropy.py::test_exp)."""
    n = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634), -160.0), 160.0)
    # ln 2 in two parts, of which n times the first is exact.
    rest = x - n * 0.693359375 + n * 2.12194440054690583e-4
    # tl.exp2 gives 0 for denormal results, a product does not.
    low = n < -64
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(tl.where(low, n + 64, n)) * tl.where(low, 5.421010862427522e-20, 1.0)  # 2^-64
