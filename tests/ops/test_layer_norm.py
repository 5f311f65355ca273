"""LayerNorm against its formula in fp64, whose gradients are autograd's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops.layer_norm import layer_norm, layer_norm_backward_reference, layer_norm_reference
from tests.row_ops import (
    DTYPES,
    FP32,
    ROWS,
    UNIT,
    WIDTHS,
    assert_within,
    check_op,
    each_number_of_threads,
    examples,
    kernels_only,
    normal,
    strided,
)

op, op_backward = torch.ops.megapar.layer_norm.default, torch.ops.megapar.layer_norm_backward.default


def formula(s: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = s - s.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dy: Tensor, ds: Tensor | None) -> None:
    """Bounds as in test_rms_norm.py; the mean, a sum over h too, is off by as many units of mean |s|, which moves every centred value."""
    x, residual, weight, bias = (z if z is None else z.detach().requires_grad_() for z in (x, residual, weight, bias))
    t, h = x.shape
    out = layer_norm(x, weight, bias, eps, residual)
    y, s = (out, x) if residual is None else out
    assert y.dtype == x.dtype and torch.equal(s, x if residual is None else x + residual)
    wide = [z if z is None else z.detach().double().requires_grad_() for z in (s, weight, bias)]
    wanted = formula(*wide, eps)
    (wanted * dy.double() + (0 if ds is None else wide[0] * ds.double())).sum().backward()
    exact, w = wide[0].detach(), wide[1].detach()
    depth = FP32 * (h / 64 + 20)
    centred = exact - exact.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    z = centred * rstd
    moved = depth * (z.abs() + exact.abs().mean(-1, keepdim=True) * rstd)
    assert_within(y.detach(), wanted.detach(), moved * w.abs() + 2 * FP32 * wanted.detach().abs(), "y")
    torch.autograd.backward([y] if ds is None else [y, s], [dy] if ds is None else [dy, ds])
    g = dy.double() * w
    slope = (g * z).abs().mean(-1, keepdim=True)
    error = depth * (g.abs() + g.abs().mean(-1, keepdim=True) + z.abs() * slope) + moved * slope
    error = error + z.abs() * (g.abs() * moved).mean(-1, keepdim=True)
    assert_within(x.grad, wide[0].grad, rstd * error + (0 if ds is None else 2 * FP32 * ds.double().abs()), "dx")
    rows = FP32 * (t / 64 + 80)
    assert_within(weight.grad, wide[1].grad, (dy.double().abs() * (rows * z.abs() + moved)).sum(0), "dw")
    if bias is not None:
        assert bias.grad.dtype == bias.dtype
        assert_within(bias.grad, wide[2].grad, rows * dy.double().abs().sum(0), "db")


@settings(deadline=None, max_examples=examples(120))
@given(st.sampled_from(ROWS), st.sampled_from(WIDTHS), st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_against_fp64(t, h, dtype, wide_weight, with_residual, with_bias, dense):
    x, residual, dy, ds = (normal(t, h, dtype=dtype, seed=i, shift=0.5) for i in range(4))
    weight, bias = (normal(h, dtype=torch.float32 if wide_weight else dtype, seed=i, shift=1.0) for i in (4, 5))
    if not dense:
        x, residual, dy, ds, weight, bias = (strided(z) for z in (x, residual, dy, ds, weight, bias))
    check(x, residual if with_residual else None, weight, bias if with_bias else None, 1e-2, dy, ds if with_residual else None)


@pytest.mark.parametrize("h", [65535, 65536, 65537])
def test_wide_rows(h):
    x, residual, dy, ds = (normal(3, h, dtype=torch.bfloat16, seed=i) for i in range(4))
    weight, bias = (normal(h, dtype=torch.bfloat16, seed=i) for i in (4, 5))
    check(x, residual, weight, bias, 1e-6, dy, ds)


def test_a_mean_far_from_zero():
    """mean_h(x^2) - mean^2 in fp32 would have lost the variance."""
    x = normal(4, 700, dtype=torch.float32, shift=1000.0)
    check(x, None, torch.ones(700), None, 0.0, normal(4, 700, dtype=torch.float32, seed=1), None)


@kernels_only
@pytest.mark.parametrize("scale", [1e-25, 1e20, 3e37])
def test_range(scale):
    """Rows whose squares underflow or overflow in fp32, or whose sum does."""
    x = normal(4, 70, dtype=torch.float32, shift=1.0)
    x[1:3] *= scale
    check(x, None, torch.ones(70), None, 0.0, normal(4, 70, dtype=torch.float32, seed=1), None)


def test_constant_rows():
    bias = normal(33, dtype=torch.float32)
    assert torch.equal(layer_norm(torch.full((2, 33), 3.0), torch.ones(33), bias, 1e-5), bias.expand(2, 33))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 35, 69])
def test_not_finite_stays_in_its_row(value, place):
    x = normal(3, 70, dtype=torch.float32)
    clean = layer_norm(x, torch.ones(70), None, 1e-6)
    x[1, place] = value
    y = layer_norm(x, torch.ones(70), None, 1e-6)
    assert torch.equal(y[::2], clean[::2])
    assert y[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype):
    x, dy = (normal(1003, 129, dtype=dtype, seed=i) for i in range(2))
    weight = normal(129, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        y, _, mean, rstd = op(x, weight, weight, 1e-6, None)
        return y, mean, rstd, *op_backward(dy, None, x, weight, mean, rstd)

    each_number_of_threads(run)


def test_gradients_that_do_not_arrive():
    x, residual, dy = (normal(5, 9, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    _, s = layer_norm(x, torch.ones(9), None, 1e-6, residual)
    s.backward(dy.detach())
    assert torch.equal(x.grad, dy.detach()) and torch.equal(residual.grad, dy.detach())


def test_gradcheck_of_the_wiring():
    x, residual = (normal(3, 5, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    weight, bias = (normal(5, dtype=torch.float64, seed=i).requires_grad_() for i in (2, 3))
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a[:3], 1e-3, a[3]), (x, weight, bias, residual))
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, None, 1e-3), (x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    x, residual, dy, ds = (normal(7, 40, dtype=dtype, seed=i) for i in range(4))
    weight, bias = normal(40, dtype=dtype), normal(40, dtype=dtype, seed=1)
    ours, theirs = op(x, weight, bias, 1e-6, residual), layer_norm_reference(x, weight, bias, 1e-6, residual)
    assert torch.equal(ours[1], theirs[1])
    for a, b in zip(
        (*ours, *op_backward(dy, ds, ours[1], weight, *ours[2:])),
        (*theirs, *layer_norm_backward_reference(dy, ds, theirs[1], weight, *theirs[2:])),
        strict=True,
    ):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert float((a.double() - b.double()).abs().max()) <= (2 * UNIT[a.dtype] + 40 * FP32) * float(b.double().abs().max())


def test_opcheck():
    x, weight, statistic = normal(3, 20, dtype=torch.bfloat16), normal(20, dtype=torch.float32), torch.ones(3)
    for residual, bias in ((None, None), (x.clone(), weight.clone())):
        check_op("layer_norm", x, weight, bias, 1e-6, residual)
        check_op("layer_norm_backward", x, residual, x.clone(), weight, statistic, statistic.clone())


@kernels_only
@pytest.mark.parametrize(
    "change,told",
    [
        ({"bias": torch.ones(7)}, r"bias has shape [7] and x [4, 8]: bias must be [8]"),
        ({"bias": torch.ones(8).bfloat16()}, "bias has dtype BFloat16 and weight Float: convert one of them"),
        ({"weight": torch.ones(8).half(), "bias": None}, "weight has dtype Half and x BFloat16"),
        ({"residual": torch.ones(8).bfloat16()}, "residual has shape [8] and x [4, 8]"),
        ({"eps": float("nan")}, "eps=nan must be 0 or more"),
    ],
)
def test_refusals(change, told):
    arguments = {"x": torch.ones(4, 8).bfloat16(), "weight": torch.ones(8), "bias": torch.ones(8), "eps": 1e-6, "residual": None} | change
    with pytest.raises(ValueError) as caught:
        layer_norm(**arguments)
    assert told in str(caught.value)
