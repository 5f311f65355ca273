"""Rows that are no whole vectors of 16 bytes, of GPT-2's vocabulary say, take other tiles than the rest: they must not spill either."""

from functools import partial

import pytest
import torch

from megapar.ops.triton.ahead_of_time import compile_launch
from megapar.ops.triton.layer_norm import layer_norm, layer_norm_backward
from megapar.ops.triton.rms_norm import rms_norm, rms_norm_backward
from tests.aot.common import Call, assert_lean, every_config, launches
from tests.aot.norms import tensors
from tests.aot.test_linear import BF16, FP16, FP32, forward, gemms


def norms(h: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight, rstd = tensors(64, h, dtype, weight_dtype)
    layer_norm(x, weight, weight, 1e-6, x)
    layer_norm_backward(x, x, x, weight, rstd, rstd)
    rms_norm(x, weight, 1e-6, x)
    rms_norm_backward(x, x, x, weight, rstd)


def linears(n: int, dtype: torch.dtype) -> dict[str, Call]:
    return {f"{name}-{n}": partial(call, 2048, n, 1024) for name, call in gemms(dtype).items()}


DTYPES = ((BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32))
CALLS = {f"norms-{h}-{str(x)[6:]}-{str(w)[6:]}": partial(norms, h, x, w) for h in (255, 1001, 8191, 16383) for x, w in DTYPES}
# Triton tells multiples of 16 alone apart.
CALLS |= linears(2731, BF16) | linears(50257, FP16)


@every_config(CALLS, ["bfloat16-forward-none-2731", "norms-8191-bfloat16-bfloat16"])
def test_lean(call, arch):
    for launch in launches(call, arch):
        assert_lean(compile_launch(launch, arch))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_widths_that_vectors_divide_take_large_tiles(arch):
    """Those above are small because of their width, not everywhere."""
    sizes = [launches(partial(forward, "none", BF16, 8192, n, 1024), arch)[0].options["BLOCK_M"] for n in (8192, 8200)]
    assert sizes == [128, 64]
