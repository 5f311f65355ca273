"""RMSNorm's kernels as compiled: registers, and 128 bits an access."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.ops.triton.norm import WIDEST, tile
from megapar.ops.triton.norm_backward import WARPS_AN_SM, WIDEST_BACKWARD, programs
from megapar.ops.triton.rms_norm import rms_norm, rms_norm_backward
from tests.aot.common import assert_listed, every_config
from tests.aot.norms import DTYPES, calls, check, tensors


def forward_backward(t: int, h: int, dtype: torch.dtype, weight_dtype: torch.dtype, summed: bool) -> None:
    x, weight, rstd = tensors(t, h, dtype, weight_dtype)
    residual = x if summed else None
    rms_norm(x, weight, 1e-6, residual)
    rms_norm_backward(x, residual, x, weight, rstd)


CALLS = calls(forward_backward, "residual")


@every_config(CALLS, ["bfloat16-256-residual", "bfloat16-4096-residual", "float32-8192-residual"])
def test_compiled(call, arch):
    check(CALLS, call, arch)


@pytest.mark.every_config
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("float16")])
def test_compiled_for_sm_75(name):
    check(CALLS, CALLS[name], 75)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 70000), st.sampled_from(DTYPES), st.booleans())
def test_list_is_complete(t, h, dtypes, summed):
    assert_listed(lambda: forward_backward(t, h, *dtypes, summed), list(CALLS.values()))


@given(st.integers(1, WIDEST))
def test_tile(h):
    """Holds the row, in threads of at most 32 elements; backward, which holds four tensors, of at most 16."""
    chosen = tile(h)
    assert h <= chosen.block and chosen.num_warps <= 16
    a_thread = chosen.rows * chosen.block // (32 * chosen.num_warps)
    assert 8 <= a_thread <= (16 if h <= WIDEST_BACKWARD else 32)


@given(st.integers(0, 10**9), st.integers(1, WIDEST_BACKWARD), st.sampled_from([40, 108, 132, 148]))
def test_programs(t, h, sms):
    """All resident at once; none without rows; sums that stay far below what the rows move."""
    chosen = tile(h)
    count = programs(t, sms, chosen)
    assert 1 <= count <= max(1, sms * WARPS_AN_SM // chosen.num_warps)
    assert count <= max(1, -(-t // chosen.rows)) and 8 * (count - 1) <= t
