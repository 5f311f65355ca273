"""RoPE's kernel as compiled: registers, and 128 bits an access."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.rope import columns, rope_qkv, rope_qkv_backward
from tests.aot.common import assert_lean, assert_listed, assert_narrow, compiled, every_config, meta

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_SIZES = (64, 80, 128, 256, 60, 100, 250)


def forward_backward(b: int, s: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> None:
    angles = meta(b * s, d // 2, dtype=torch.float32)
    qkv = meta(b * s, (q_heads + 2 * kv_heads) * d, dtype=dtype)
    rope_qkv_backward(*rope_qkv(qkv, angles, angles, b, q_heads, kv_heads), angles, angles)


CALLS = {f"{str(dtype)[6:]}-{d}": lambda dtype=dtype, d=d: forward_backward(2, 64, 32, 8, d, dtype) for dtype in DTYPES for d in HEAD_SIZES}
WHOLE = [CALLS[name] for name in CALLS if int(name.split("-")[1]) % 16 == 0]


@every_config(CALLS, ["bfloat16-128", "bfloat16-80"], least=75)
def test_compiled(call, arch):
    for kernel in compiled(call, arch):
        assert_lean(kernel)
        assert kernel.occupancy() >= (0.5 if call in WHOLE else 0.25)
        if call in WHOLE:
            assert_narrow(kernel, 0, 0)
            assert kernel.layouts == 0


@given(st.integers(1, 3), st.integers(1, 200), st.integers(1, 40), st.integers(1, 9), st.integers(1, 300), st.sampled_from(DTYPES))
def test_list_is_complete(b, s, q_heads, kv_heads, half, dtype):
    assert_listed(lambda: forward_backward(b, s, q_heads, kv_heads, 2 * half, dtype), list(CALLS.values()))


@pytest.mark.parametrize("half,block", [(1, 32), (32, 32), (33, 64), (40, 64), (64, 64), (128, 128), (300, 128)])
def test_columns(half, block):
    assert columns(half) == block
