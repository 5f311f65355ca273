"""exp and sigmoid for where their relative error counts.

tl.exp is 2^(x log2(e)), and rounding that product alone is |x| units of the result: 20 at x = -20. Here the integer part of the product is
split off before anything is rounded. Some ten operations, two of them of the special function unit: kernels that read an element and write
one for each have them to spare, and so has a GEMM, with hundreds of products for each element that its epilogue activates.
"""

import triton
import triton.language as tl


@triton.jit
def _parts(x):  # type: ignore[no-untyped-def]
    """n, an integer, and e^x / 2^n, of which the second is infinite, 0 or NaN where x is beyond all floats."""
    n = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634), -160.0), 160.0)
    # ln 2 in two parts, of which n times the first is exact.
    rest = x - n * 0.693359375 + n * 2.12194440054690583e-4
    return n, tl.exp2(rest * 1.4426950408889634)


@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    """Of fp32: within a few units of the result, denormal results and infinities too (tests/ops/test_cross_entropy.py::test_exp)."""
    n, part = _parts(x)
    # tl.exp2 gives 0 for denormal results, a product does not.
    low = n < -64
    return part * tl.exp2(tl.where(low, n + 64, n)) * tl.where(low, 5.421010862427522e-20, 1.0)  # 2^-64


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-x) where accumulators leave few registers, of fp32; 0 below 2^-128.

    In quarters, as the division of GPUs gives 0 for divisors above 2^126.
    """
    n, part = _parts(-x)
    return 0.25 / (0.25 + part * tl.exp2(n - 2))
