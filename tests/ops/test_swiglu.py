"""SwiGLU against its formula in fp64, whose gradient is autograd's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops.swiglu import swiglu, swiglu_backward_reference, swiglu_reference
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

FLUSHED = 4e-37
"""e^88.73 is the largest number of fp32: below gate = -88.7 the kernel gives 0 where gate * sigmoid(gate) is still as large as this."""


def check(gate_up: Tensor, dy: Tensor) -> None:
    """exp within 4 units, then an addition, a division and two products: ten units of y. In d_gate, 1 - s is off by some units of 1."""
    gate_up = gate_up.detach().requires_grad_()
    wide = gate_up.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    exact = gate * gate.sigmoid() * up
    y = swiglu(gate_up)
    assert y.dtype == gate_up.dtype
    up, gate = up.detach(), gate.detach()
    assert_within(y.detach(), exact.detach(), 10 * FP32 * exact.detach().abs() + FLUSHED * up.abs(), "y")
    y.backward(dy)
    exact.backward(dy.double())
    d = dy.double().abs()
    bounds = up.abs() * (gate.sigmoid() * (1 + gate.abs()) * 20 * FP32 + FLUSHED), gate.abs() * gate.sigmoid() * 10 * FP32 + FLUSHED
    assert_within(gate_up.grad, wide.grad, torch.cat([d * bound for bound in bounds], -1), "d_gate_up")


@settings(deadline=None, max_examples=examples(100))
@given(st.sampled_from(ROWS), st.sampled_from(WIDTHS), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([1.0, 30.0]))
def test_against_fp64(t, f, dtype, dense, scale):
    gate_up, dy = normal(t, 2 * f, dtype=dtype, scale=scale), normal(t, f, dtype=dtype, seed=1)
    check(gate_up if dense else strided(gate_up), dy if dense else strided(dy))


@pytest.mark.parametrize("f", [65535, 65536, 65537])
def test_wide_rows(f):
    check(normal(2, 2 * f, dtype=torch.bfloat16), normal(2, f, dtype=torch.bfloat16, seed=1))


def test_every_gate():
    """From where sigmoid is 0 to where it is 1, denormal numbers and zeros among them."""
    gate = torch.cat([torch.linspace(-110, 110, 4401), torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-149), 1e-25, -1e-25, 1e20, -1e20])])
    check(torch.stack([gate, torch.full_like(gate, 1.5)], -1), torch.full((len(gate), 1), 0.75))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 35, 69])
def test_not_finite_stays_in_its_place(value, place):
    gate_up = normal(3, 140, dtype=torch.float32)
    clean = swiglu(gate_up)
    for column in (place, place + 70):
        dirty = gate_up.clone()
        dirty[1, column] = value
        y = swiglu(dirty)
        assert not y[1, place].isfinite()
        y[1, place] = clean[1, place]
        assert torch.equal(y, clean)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype):
    gate_up, dy = normal(1003, 258, dtype=dtype), normal(1003, 129, dtype=dtype, seed=1)
    each_number_of_threads(lambda: (torch.ops.megapar.swiglu(gate_up), torch.ops.megapar.swiglu_backward(dy, gate_up)))


def test_leading_dimensions():
    gate_up = normal(2, 3, 10, dtype=torch.bfloat16)
    assert torch.equal(swiglu(gate_up), swiglu(gate_up.view(6, 10)).view(2, 3, 5))
    assert torch.equal(swiglu(gate_up[0, 0]), swiglu(gate_up)[0, 0])
    assert swiglu(gate_up[..., :0]).shape == (2, 3, 0)


def test_gradcheck_of_the_wiring():
    assert torch.autograd.gradcheck(swiglu, normal(3, 8, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    gate_up, dy = normal(7, 80, dtype=dtype), normal(7, 40, dtype=dtype, seed=1)
    for ours, theirs in (
        (torch.ops.megapar.swiglu(gate_up), swiglu_reference(gate_up)),
        (torch.ops.megapar.swiglu_backward(dy, gate_up), swiglu_backward_reference(dy, gate_up)),
    ):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert float((ours.double() - theirs.double()).abs().max()) <= (2 * UNIT[dtype] + 20 * FP32) * float(theirs.double().abs().max())


def test_opcheck():
    gate_up = normal(3, 20, dtype=torch.bfloat16)
    check_op("swiglu", gate_up)
    check_op("swiglu_backward", gate_up[:, :10].contiguous(), gate_up)


@kernels_only
def test_refusals():
    for run, told in (
        (lambda: swiglu(torch.ones(3, 5)), "gate_up is 5 wide and must hold gate and up: give it an even width"),
        (lambda: swiglu(torch.ones(3, 4, dtype=torch.int32)), "gate_up has dtype Int"),
        (lambda: torch.ops.megapar.swiglu_backward(torch.ones(3, 4), torch.ones(3, 4)), "dy must be half as wide"),
        (lambda: torch.ops.megapar.swiglu_backward(torch.ones(3, 2).half(), torch.ones(3, 4)), "dy has dtype Half and gate_up Float"),
    ):
        with pytest.raises(ValueError) as caught:
            run()
        assert told in str(caught.value)
