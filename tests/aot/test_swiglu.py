"""SwiGLU's kernels as compiled: registers, and 128 bits an access."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.elementwise import tile
from megapar.ops.triton.swiglu import swiglu, swiglu_backward
from tests.aot.common import assert_full_width, assert_lean, assert_listed, compiled, every_config, meta

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (128, 256, 512, 4096, 4097)


def forward_backward(t: int, f: int, dtype: torch.dtype) -> None:
    swiglu_backward(swiglu(meta(t, 2 * f, dtype=dtype)), meta(t, 2 * f, dtype=dtype))


CALLS = {f"{str(dtype)[6:]}-{f}": lambda dtype=dtype, f=f: forward_backward(64, f, dtype) for dtype in DTYPES for f in WIDTHS}
ODD = [CALLS[name] for name in CALLS if name.endswith("4097")]
FP32 = [CALLS[name] for name in CALLS if name.startswith("float32")]


@every_config(CALLS, ["bfloat16-4096", "bfloat16-128"], least=75)
def test_compiled(call, arch):
    forward, backward = compiled(call, arch)
    assert_lean(forward)
    assert_lean(backward)
    if call not in ODD:
        accesses = 2 if call in FP32 else 1  # of 16 bytes for a thread's eight elements
        assert_full_width(forward, 2 * accesses, accesses)
        assert_full_width(backward, 3 * accesses, 2 * accesses)
        assert min(forward.occupancy(), backward.occupancy()) >= 0.75


@given(st.integers(1, 300), st.integers(1, 70000), st.sampled_from(DTYPES))
def test_list_is_complete(t, f, dtype):
    assert_listed(lambda: forward_backward(t, f, dtype), list(CALLS.values()))


@given(st.integers(1, 10**6))
def test_tile(width):
    rows, block = tile(width)
    assert rows * block == 1024 and block & (block - 1) == 0
    assert width <= 64 or 2 * min(width, block) > block, "more than half of the lanes idle"
