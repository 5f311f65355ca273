"""SwiGLU's kernels as compiled: registers, and 128 bits an access."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.swiglu import swiglu, swiglu_backward
from tests.aot.common import assert_full_width, assert_lean, compiled, config, every_config, launches, meta

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward_backward(t: int, f: int, dtype: torch.dtype) -> None:
    swiglu_backward(swiglu(meta(t, 2 * f, dtype=dtype)), meta(t, 2 * f, dtype=dtype))


CALLS = {f"{str(dtype)[6:]}-{f}": lambda dtype=dtype, f=f: forward_backward(64, f, dtype) for dtype in DTYPES for f in (4096, 4097)}


@every_config(CALLS, ["bfloat16-4096"], least=75)
def test_compiled(call, arch):
    forward, backward = compiled(call, arch)
    assert_lean(forward)
    assert_lean(backward)
    if call in [CALLS[name] for name in CALLS if name.endswith("4096")]:
        accesses = 2 if call is CALLS["float32-4096"] else 1  # of 16 bytes for a thread's eight elements
        assert_full_width(forward, 2 * accesses, accesses)
        assert_full_width(backward, 3 * accesses, 2 * accesses)


@given(st.integers(1, 300), st.integers(1, 70000), st.sampled_from(DTYPES))
def test_list_is_complete(t, f, dtype):
    listed = {config(x) for call in CALLS.values() for x in launches(call, 80)}
    assert {config(x) for x in launches(lambda: forward_backward(t, f, dtype), 80)} <= listed
