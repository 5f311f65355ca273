"""RMSNorm against its formula in fp64, whose gradients are autograd's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops.rms_norm import rms_norm, rms_norm_backward_reference, rms_norm_reference
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

op, op_backward = torch.ops.megapar.rms_norm.default, torch.ops.megapar.rms_norm_backward.default


def exact(s: Tensor, weight: Tensor, eps: float, dy: Tensor, ds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) in fp64."""
    s, weight = s.double().requires_grad_(), weight.double().requires_grad_()
    y = s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    loss = (y * dy.double()).sum() + (0 if ds is None else (s * ds.double()).sum())
    return y.detach(), *torch.autograd.grad(loss, [s, weight])


def check(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dy: Tensor, ds: Tensor | None) -> None:
    """Bounds: a sum over h is at most h / 64 + 10 additions deep, one over t at most t / 64 + 80, and each adds a unit of the terms'
    magnitude; besides, each result takes fewer than ten operations."""
    x, residual, weight = (z if z is None else z.detach().requires_grad_() for z in (x, residual, weight))
    t, h = x.shape
    out = rms_norm(x, weight, eps, residual)
    y, s = (out, x) if residual is None else out
    assert y.dtype == x.dtype and torch.equal(s, x if residual is None else x + residual), "s must be rounded as a sum of two tensors is"
    wanted, dx, dw = exact(s.detach(), weight.detach(), eps, dy, ds)
    depth = FP32 * (h / 64 + 20)
    assert_within(y.detach(), wanted, depth * wanted.abs(), "y")
    outputs, grads = ([y], [dy]) if ds is None else ([y, s], [dy, ds])
    torch.autograd.backward(outputs, grads)
    rstd = (s.detach().double().square().mean(-1, keepdim=True) + eps).rsqrt()
    z, g = s.detach().double() * rstd, dy.double() * weight.detach().double()
    size = rstd * (g.abs() + z.abs() * (g * z).abs().mean(-1, keepdim=True)) + (0 if ds is None else ds.double().abs())
    assert_within(x.grad, dx, depth * size, "dx")
    assert residual is None or torch.equal(residual.grad, x.grad)
    assert weight.grad.dtype == weight.dtype
    assert_within(weight.grad, dw, (depth + FP32 * (t / 64 + 80)) * (dy.double() * z).abs().sum(0), "dw")


@settings(deadline=None, max_examples=examples(120))
@given(
    st.sampled_from(ROWS),
    st.sampled_from(WIDTHS),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1e-6, 0.5]),
)
def test_against_fp64(t, h, dtype, wide_weight, with_residual, dense, eps):
    x, residual, dy, ds = (normal(t, h, dtype=dtype, seed=i) for i in range(4))
    weight = normal(h, dtype=torch.float32 if wide_weight else dtype, seed=4, shift=1.0)
    if not dense:
        x, residual, dy, ds, weight = (strided(z) for z in (x, residual, dy, ds, weight))
    check(x, residual if with_residual else None, weight, eps, dy, ds if with_residual else None)


@pytest.mark.parametrize("h", [65535, 65536, 65537])
def test_wide_rows(h):
    x, residual, dy, ds = (normal(3, h, dtype=torch.bfloat16, seed=i) for i in range(4))
    check(x, residual, normal(h, dtype=torch.bfloat16, seed=4), 1e-6, dy, ds)


@kernels_only
@pytest.mark.parametrize("scale", [1e-25, 1e-36, 1e20, 3e37])
def test_range(scale):
    """Rows whose squares underflow or overflow in fp32, beside ordinary ones."""
    x = normal(4, 70, dtype=torch.float32)
    x[1:3] *= scale
    check(x, None, normal(70, dtype=torch.float32), 0.0, normal(4, 70, dtype=torch.float32, seed=1), None)


def test_denormals():
    x = torch.full((2, 33), 2.0**-140)
    y = rms_norm(x, torch.ones(33), 1e-6)
    assert_within(y, 1e3 * x.double(), 1e-6 * 1e3 * x.double())
    assert rms_norm(torch.zeros(2, 33), torch.ones(33), 1e-6).count_nonzero() == 0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 35, 69])
def test_not_finite_stays_in_its_row(value, place):
    x = normal(3, 70, dtype=torch.float32)
    clean = rms_norm(x, torch.ones(70), 1e-6)
    x[1, place] = value
    y = rms_norm(x, torch.ones(70), 1e-6)
    assert torch.equal(y[::2], clean[::2])
    assert y[1, place].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype):
    """Also where the number of threads does not divide the blocks."""
    x, dy = (normal(1003, 129, dtype=dtype, seed=i) for i in range(2))
    weight = normal(129, dtype=dtype)

    def run() -> tuple[Tensor, ...]:
        y, _, rstd = op(x, weight, 1e-6, None)
        return y, rstd, *op_backward(dy, None, x, weight, rstd)

    each_number_of_threads(run)


def test_gradients_that_do_not_arrive():
    """Where only one of y and s is used."""
    x, residual, dy = (normal(5, 9, dtype=torch.float32, seed=i).requires_grad_() for i in range(3))
    weight = torch.ones(9, requires_grad=True)
    _, s = rms_norm(x, weight, 1e-6, residual)
    s.backward(dy.detach())
    assert torch.equal(x.grad, dy.detach()) and torch.equal(residual.grad, dy.detach()) and weight.grad is None
    y, _ = rms_norm(x, weight, 1e-6, residual.detach())
    x.grad = None
    y.backward(dy.detach())
    wanted = exact((x + residual).detach(), weight.detach(), 1e-6, dy.detach(), None)
    torch.testing.assert_close(x.grad.double(), wanted[1], rtol=1e-5, atol=1e-6)


def test_leading_dimensions():
    x, weight = normal(2, 3, 20, dtype=torch.bfloat16), normal(20, dtype=torch.bfloat16)
    flat = rms_norm(x.view(6, 20), weight, 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), flat.view(2, 3, 20))
    assert torch.equal(rms_norm(x[0, 0], weight, 1e-6), flat[0])
    assert rms_norm(x.view(6, 20)[:, :0], weight[:0], 1e-6).shape == (6, 0)


def test_gradcheck_of_the_wiring():
    x, residual = (normal(3, 5, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    weight = normal(5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: rms_norm(a[0], a[1], 1e-3, a[2]), (x, weight, residual))
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-3), (x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    """The reference and the kernel differ by rounding: at most two units of the result, and of the sum for dw."""
    x, residual, dy, ds = (normal(7, 40, dtype=dtype, seed=i) for i in range(4))
    weight = normal(40, dtype=dtype)
    ours, theirs = op(x, weight, 1e-6, residual), rms_norm_reference(x, weight, 1e-6, residual)
    assert torch.equal(ours[1], theirs[1])
    for a, b in zip(
        (*ours, *op_backward(dy, ds, ours[1], weight, ours[2])),
        (*theirs, *rms_norm_backward_reference(dy, ds, theirs[1], weight, theirs[2])),
        strict=True,
    ):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert float((a.double() - b.double()).abs().max()) <= (2 * UNIT[a.dtype] + 40 * FP32) * float(b.double().abs().max())


def test_opcheck():
    x, weight = normal(3, 20, dtype=torch.bfloat16), normal(20, dtype=torch.float32)
    rstd = torch.ones(3)
    for residual in (None, x.clone()):
        check_op("rms_norm", x, weight, 1e-6, residual)
        check_op("rms_norm_backward", x, residual, x.clone(), weight, rstd)


@kernels_only
@pytest.mark.parametrize(
    "change,told",
    [
        ({"weight": torch.ones(7)}, r"weight has shape [7] and x [4, 8]: weight must be [8]"),
        ({"weight": torch.ones(1, 8)}, "weight must be [8]"),
        ({"weight": torch.ones(8).half()}, "weight has dtype Half and x BFloat16: use that of x or float32"),
        ({"residual": torch.ones(3, 8).bfloat16()}, "residual has shape [3, 8] and x [4, 8]"),
        ({"residual": torch.ones(4, 8)}, "residual has dtype Float and x BFloat16"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "x has dtype Long and the kernels know float32, bfloat16 and float16"),
        ({"eps": -1.0}, "eps=-1 must be 0 or more"),
    ],
)
def test_refusals(change, told):
    arguments = {"x": torch.ones(4, 8).bfloat16(), "weight": torch.ones(8), "eps": 1e-6, "residual": None} | change
    with pytest.raises(ValueError) as caught:
        rms_norm(**arguments)
    assert told in str(caught.value)


def test_backward_refuses():
    x, weight, rstd = torch.ones(4, 8), torch.ones(8), torch.ones(4)
    for args, told in (
        ((x[:3], None, x, weight, rstd), "dy has shape [3, 8] and s [4, 8]"),
        ((x, x[:3], x, weight, rstd), "ds has shape [3, 8] and s [4, 8]"),
        ((x, None, x, weight, rstd[:3]), "rstd has shape [3]"),
        ((x, None, x, weight, rstd.bfloat16()), "rstd has shape [4] and dtype BFloat16: give what the forward returned"),
    ):
        with pytest.raises(ValueError) as caught:
            op_backward(*args)
        assert told in str(caught.value)
