"""RMSNorm, LayerNorm and SwiGLU against their formulas in fp64."""

import pytest
import torch
from torch import Tensor

from megapar.ops.layer_norm import layer_norm
from megapar.ops.rms_norm import rms_norm
from megapar.ops.swiglu import swiglu

# One rounding of the result, and for fp32 a few of the statistics.
ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return (2 + torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)).to(dtype)


def check(y: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert y.dtype == dtype
    assert float((y.double() - exact).abs().max()) <= ERROR[dtype] * float(exact.abs().max())


@pytest.mark.parametrize("dtype", ERROR)
def test_rms_norm(dtype):
    x, weight = normal(2, 3, 64, dtype=dtype), normal(64, dtype=dtype)
    wide = x.double()
    check(rms_norm(x, weight, 0.5), wide / (wide.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight.double(), dtype)


@pytest.mark.parametrize("dtype", ERROR)
def test_layer_norm(dtype):
    x, weight, bias = normal(2, 3, 64, dtype=dtype), normal(64, dtype=dtype), normal(64, dtype=dtype)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    exact = centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight.double()
    check(layer_norm(x, weight, bias, 0.5), exact + bias.double(), dtype)
    check(layer_norm(x, weight, None, 0.5), exact, dtype)


@pytest.mark.parametrize("dtype", ERROR)
def test_swiglu(dtype):
    gate_up = normal(2, 3, 10, dtype=dtype)
    gate, up = gate_up[..., :5].double(), gate_up[..., 5:].double()
    check(swiglu(gate_up), gate / (1 + (-gate).exp()) * up, dtype)
