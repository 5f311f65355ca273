"""LayerNorm's kernels as compiled: registers, and 128 bits an access."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megapar.ops.triton.layer_norm import layer_norm, layer_norm_backward
from tests.aot.common import assert_listed, every_config
from tests.aot.norms import DTYPES, calls, check, tensors


def forward_backward(t: int, h: int, dtype: torch.dtype, weight_dtype: torch.dtype, summed: bool, biased: bool) -> None:
    x, weight, rstd = tensors(t, h, dtype, weight_dtype)
    residual = x if summed else None
    layer_norm(x, weight, weight if biased else None, 1e-6, residual)
    layer_norm_backward(x, residual, x, weight, rstd, rstd)


CALLS = calls(forward_backward, "residual", "bias")


@every_config(CALLS, ["bfloat16-256-residual-bias", "bfloat16-4096-residual-bias", "float32-8192-residual-bias"])
def test_compiled(call, arch):
    check(CALLS, call, arch)


@pytest.mark.every_config
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("float16")])
def test_compiled_for_sm_75(name):
    check(CALLS, CALLS[name], 75)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 300), st.integers(1, 70000), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_list_is_complete(t, h, dtypes, summed, biased):
    assert_listed(lambda: forward_backward(t, h, *dtypes, summed, biased), list(CALLS.values()))
