"""Hashes of csrc/common, bit for bit: AdamW's noise and dropout's masks start from the same finaliser of 64 bits."""

import triton
import triton.language as tl  # noqa: F401 - the interpreter refuses a function whose module does not have it


@triton.jit
def mix64(x):  # type: ignore[no-untyped-def]
    """splitmix64's finaliser, of uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
