"""Cross-entropy's kernels as compiled: registers, and 128 bits an access."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megapar.ops.triton.cross_entropy import cross_entropy_grad, cross_entropy_grad_, cross_entropy_statistics
from tests.aot.common import assert_lean, assert_listed, assert_narrow, compiled, every_config, meta

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (32768, 32771)


def forward_backward(t: int, v: int, dtype: torch.dtype, smoothing: float, *, overwrite: bool = False) -> None:
    logits, index, lse = meta(t, v, dtype=dtype), meta(t, dtype=torch.int64), meta(t, dtype=torch.float32)
    cross_entropy_statistics(logits, index, smoothing != 0)
    grad = cross_entropy_grad_ if overwrite else cross_entropy_grad
    grad(lse, logits, index, lse, meta(t, dtype=torch.bool), v, smoothing, 0.0)


CALLS = {
    f"{str(dtype)[6:]}-{v}-{smoothing}": lambda dtype=dtype, v=v, smoothing=smoothing: forward_backward(64, v, dtype, smoothing)
    for dtype in DTYPES
    for v in WIDTHS
    for smoothing in (0.0, 0.1)
}
ODD = [CALLS[name] for name in CALLS if "32771" in name]


@every_config(CALLS, ["bfloat16-32768-0.0", "float32-32768-0.1"], least=75)
def test_compiled(call, arch):
    statistics, grad = compiled(call, arch)
    assert_lean(statistics)
    assert_lean(grad)
    if call not in ODD:
        assert statistics.layouts == grad.layouts == 0
        assert_narrow(statistics, 2, 4)  # index and its logit; the four statistics
        assert_narrow(grad, 4, 0)  # dloss, index, lse and ignored
        assert statistics.occupancy() >= (0.375 if arch > 75 else 0.5) and grad.occupancy() >= 0.5


@given(st.integers(1, 300), st.integers(1, 300000), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.1]), st.booleans())
def test_list_is_complete(t, v, dtype, smoothing, overwrite):
    assert_listed(lambda: forward_backward(t, v, dtype, smoothing, overwrite=overwrite), list(CALLS.values()))
