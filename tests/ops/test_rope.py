"""Rotary positions against complex multiplication in fp64, in every dtype and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops.rope import rope_angles, rope_qkv, rope_qkv_backward_reference, rope_qkv_reference
from tests.row_ops import DTYPES, FP32, UNIT, assert_within, check_op, each_number_of_threads, examples, integers, kernels_only, normal

op, op_backward = torch.ops.megapar.rope_qkv.default, torch.ops.megapar.rope_qkv_backward.default


def turned(qkv: Tensor, position_ids: Tensor, theta: float, b: int, q_heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    """fp64: element i and element i + d/2 of a head are one complex number, turned by p theta^(-2i/d)."""
    t, n = qkv.shape[0], q_heads + 2 * kv_heads
    x = qkv.double().view(t, n, -1)
    d = x.shape[-1]
    angle = position_ids.double()[:, None, None] * torch.tensor([theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    y = torch.cat([torch.cat([z.real, z.imag], -1)[:, : q_heads + kv_heads], x[:, q_heads + kv_heads :]], 1)
    heads = y.view(b, t // b, n, d).permute(0, 2, 1, 3)
    return heads.split([q_heads, kv_heads, kv_heads], 1)


@settings(deadline=None, max_examples=examples(120))
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 15, 16, 17, 33]),
    st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 0)]),
    st.sampled_from([2, 6, 30, 32, 34, 64, 80]),
    st.sampled_from(DTYPES),
    st.sampled_from(["dense", "wide rows", "gaps"]),
)
def test_against_fp64(b, s, heads, d, dtype, layout):
    """cos and sin are rounded once, two products and a sum follow: four units of |x_i| + |x_{i+d/2}|."""
    (q_heads, kv_heads), t = heads, b * s
    width = (q_heads + 2 * kv_heads) * d
    qkv = normal(t, width, dtype=dtype)
    if layout != "dense":
        base = torch.full((t, 2 * width + 3), torch.nan, dtype=dtype)
        view = base[:, 3 : 3 + width] if layout == "wide rows" else base[:, 3::2][:, :width]
        qkv = view.copy_(qkv)
    qkv = qkv.detach().requires_grad_()
    position_ids = integers(0, 5000, t, seed=t)
    outputs = rope_qkv(qkv, *rope_angles(position_ids, d, 100.0), b=b, q_heads=q_heads, kv_heads=kv_heads)
    wide = qkv.detach().double().requires_grad_()
    exact = turned(wide, position_ids, 100.0, b, q_heads, kv_heads)
    for name, got, wanted in zip("qkv", outputs, exact, strict=True):
        assert got.dtype == dtype and got.is_contiguous()
        assert_within(got.detach(), wanted.detach(), 4 * FP32 * pairs(wanted.detach()), name)
    # As attention returns them: dense, heads beside each other, or one number for all.
    grads = [normal(*z.shape, dtype=dtype, seed=i) for i, z in enumerate(outputs)]
    grads[0] = grads[0].transpose(1, 2).contiguous().transpose(1, 2)
    grads[1] = grads[1].transpose(2, 3).contiguous().transpose(2, 3)
    grads[2] = grads[2][:1, :1, :1, :1].expand_as(grads[2]) if kv_heads else grads[2]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(exact, [z.double() for z in grads])
    size = torch.cat([pairs(z.double()) for z in grads], 1).permute(0, 2, 1, 3).reshape(t, width)
    assert_within(qkv.grad, wide.grad, 4 * FP32 * size, "d_qkv")


def pairs(x: Tensor) -> Tensor:
    """|x_i| + |x_{i+d/2}| of each element."""
    return x.abs() + x.abs().roll(x.shape[-1] // 2, -1)


def test_v_is_copied():
    qkv = normal(6, 3 * 8, dtype=torch.bfloat16)
    v = rope_qkv(qkv, *rope_angles(torch.arange(6), 8, 100.0), b=2, q_heads=1, kv_heads=1)[2]
    assert torch.equal(v.view(6, 8), qkv[:, 16:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_angles(dtype):
    """A product in fp32 would be off by 2^-24 of the angle: 0.06 at a million."""
    position_ids = torch.tensor([0, 1, 131071, 10**6])
    cos, sin = rope_angles(position_ids, 8, 1e4, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert cos.dtype == sin.dtype == wide and cos.shape == sin.shape == (4, 4)
    angle = position_ids.double()[:, None] * torch.tensor([1e4 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    assert float((cos.double() - angle.cos()).abs().max()) <= FP32
    assert float((sin.double() - angle.sin()).abs().max()) <= FP32


def test_scores_depend_on_distance():
    """What rotary positions are for: q(p) . k(r) is a function of p - r."""
    qkv = normal(2, 3 * 8, dtype=torch.float64)

    def score(p: int, r: int) -> float:
        q, k, _ = rope_qkv(qkv, *rope_angles(torch.tensor([p, r]), 8, 1e4, torch.float64), b=1, q_heads=1, kv_heads=1)
        return float((q[0, 0, 0] * k[0, 0, 1]).sum())

    assert abs(score(7, 3) - score(104, 100)) < 1e-12
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_gradcheck_of_the_wiring():
    qkv = normal(6, 4 * 6, dtype=torch.float64).requires_grad_()
    cos, sin = rope_angles(torch.tensor([0, 5, 2, 1, 1, 7]), 6, 10.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rope_qkv(x, cos, sin, b=2, q_heads=2, kv_heads=1), qkv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    qkv, angles = normal(6, 4 * 32, dtype=dtype), rope_angles(torch.arange(6), 32, 100.0)
    ours, theirs = op(qkv, *angles, 2, 2, 1), rope_qkv_reference(qkv, *angles, 2, 2, 1)
    back = op_backward(*ours, *angles), rope_qkv_backward_reference(*ours, *angles)
    for a, b in zip((*ours, back[0]), (*theirs, back[1]), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert float((a.double() - b.double()).abs().max()) <= (2 * UNIT[dtype] + 4 * FP32) * float(b.double().abs().max())


def test_threads():
    qkv, angles = normal(1003, 6 * 64, dtype=torch.bfloat16), rope_angles(torch.arange(1003), 64, 100.0)

    def run() -> tuple[Tensor, ...]:
        heads = op(qkv, *angles, 1, 2, 2)
        return *heads, op_backward(*heads, *angles)

    each_number_of_threads(run)


def test_rows_beyond_2_31_elements():
    """Three rows, so far apart that 32-bit offsets would wrap; the memory between them is never touched."""
    stride = 2**31 + 5
    try:
        base = torch.empty(2 * stride + 24, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space of 8 GiB")
    rows, angles = base.as_strided((3, 24), (stride, 1)), rope_angles(torch.arange(3), 8, 100.0)
    dense = rows.copy_(normal(3, 24, dtype=torch.bfloat16)).clone()
    assert all(torch.equal(a, b) for a, b in zip(op(rows, *angles, 1, 1, 1), op(dense, *angles, 1, 1, 1), strict=True))


def test_no_tokens():
    q, k, v = op(torch.empty(0, 32), *rope_angles(torch.arange(0), 8, 100.0), 1, 2, 1)
    assert q.shape == (1, 2, 0, 8) and k.shape == v.shape == (1, 1, 0, 8)


def test_opcheck():
    qkv, angles = normal(6, 4 * 8, dtype=torch.bfloat16), rope_angles(torch.arange(6), 8, 100.0)
    check_op("rope_qkv", qkv, *angles, 2, 2, 1)
    check_op("rope_qkv_backward", *op(qkv, *angles, 2, 2, 1), *angles)


@kernels_only
@pytest.mark.parametrize(
    "change,told",
    [
        ({"qkv": torch.ones(6, 4, 8)}, "qkv has shape [6, 4, 8] and must be [t, (q_heads + 2 kv_heads) d]"),
        ({"qkv": torch.ones(6, 31)}, "qkv is 31 wide and must hold 2 + 2 * 1 heads of 8: correct the heads"),
        ({"b": 4}, "b=4 must divide the 6 rows of qkv"),
        ({"b": 0}, "b=0 must divide"),
        ({"cos": torch.ones(6, 3)}, "cos and sin have shapes [6, 3] and [6, 4]"),
        ({"cos": torch.ones(5, 4), "sin": torch.ones(5, 4)}, "they must be [t, d / 2] with t = 6"),
        ({"sin": torch.ones(6, 4).double()}, "cos and sin have dtypes Float and Double: they must be float32"),
    ],
)
def test_refusals(change, told):
    arguments = {"qkv": torch.ones(6, 32), "cos": torch.ones(6, 4), "sin": torch.ones(6, 4), "b": 2, "q_heads": 2, "kv_heads": 1}
    with pytest.raises(ValueError) as caught:
        rope_qkv(**arguments | change)
    assert told in str(caught.value)
