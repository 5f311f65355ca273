"""The GEMMs of a linear layer and the places their gradients go."""

import pytest
import torch

from megapar.ops.linear import linear, linear_bias_grad, linear_input_grad, linear_weight_grad


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_against_autograd(leading):
    x, weight, bias = normal(*leading, 4), normal(3, 4), normal(3)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y = torch.nn.functional.linear(x, weight, bias)
    dy = normal(*leading, 3)
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
    exact = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(linear(x, weight, bias), y, **exact)
    torch.testing.assert_close(linear_input_grad(dy, weight), dx, **exact)
    torch.testing.assert_close(linear_weight_grad(dy, x.detach()), dw, **exact)
    torch.testing.assert_close(linear_bias_grad(dy), db, **exact)
    for beta in (0.0, 1.0):
        # beta = 0 must not read what is there: fresh memory may hold nan.
        out_w, out_b = (torch.full_like(t, 2.0 if beta else torch.nan) for t in (dw, db))
        with torch.no_grad():
            assert linear_weight_grad(dy, x.detach(), out_w, beta) is out_w
            assert linear_bias_grad(dy, out_b, beta) is out_b
        torch.testing.assert_close(out_w, dw + 2 * beta, **exact)
        torch.testing.assert_close(out_b, db + 2 * beta, **exact)


def test_strided():
    x, dy = normal(4, 6).t(), normal(3, 6).t()
    torch.testing.assert_close(linear_weight_grad(dy, x), dy.t() @ x)
    torch.testing.assert_close(linear_weight_grad(dy, x, torch.zeros(3, 4, dtype=torch.float64)), dy.t() @ x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_grad_fp32(dtype):
    """Eight micro-batches into an fp32 main_grad: the 16-bit inputs multiply exactly, so only fp32 sums may err."""
    total, exact = torch.empty(24, 40), torch.zeros(24, 40, dtype=torch.float64)
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        x, dy = (torch.randn(64, n, generator=generator).to(dtype) for n in (40, 24))
        linear_weight_grad(dy, x, total, beta=float(i > 0))
        exact += dy.double().t() @ x.double()
        magnitude = dy.double().abs().t() @ x.double().abs()
    bound = 8 * (64 + 8) * 2.0**-24 * magnitude.max()
    assert float((total - exact).abs().max()) <= bound
    one_rounding = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    assert bound < one_rounding, "the bound must tell fp32 from a gradient that was 16 bits wide once"


def test_bias_grad_fp32():
    """Ones in bf16: a 16-bit running sum stops at 256."""
    dy = torch.ones(5000, 2, dtype=torch.bfloat16)
    out = torch.empty(2)
    linear_bias_grad(dy, out)
    linear_bias_grad(dy[:1], out, beta=1.0)
    assert out.tolist() == [5001.0, 5001.0]
