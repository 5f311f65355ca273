"""Cross-entropy's parts: statistics of any cut of the vocabulary join to the whole's, and the kernels are the formulas in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar import vocab_parallel_cross_entropy
from megapar.ops.cross_entropy import (
    cross_entropy_grad,
    cross_entropy_grad_reference,
    cross_entropy_join,
    cross_entropy_loss,
    cross_entropy_statistics,
    cross_entropy_statistics_reference,
)
from tests.row_ops import (
    DTYPES,
    FP32,
    LEAST,
    UNIT,
    assert_within,
    check_op,
    each_number_of_threads,
    examples,
    integers,
    kernels_only,
    normal,
    strided,
)

OPTIONS = {"vocab_size": 9, "label_smoothing": 0.2, "z_loss": 0.01}
PLAIN = {"vocab_size": 4, "label_smoothing": 0.0, "z_loss": 0.0}
logit = st.one_of(st.floats(-50, 50), st.sampled_from([1e4, -1e4, -torch.inf]))


def statistics(z: torch.Tensor, target: torch.Tensor, edges: list[int], smoothing: float) -> torch.Tensor:
    """[parts, 4, t] with the vocabulary cut at `edges`."""
    parts = []
    for a, b in zip([0, *edges], [*edges, z.shape[1]], strict=True):
        inside = (target >= a) & (target < b)
        parts.append(cross_entropy_statistics(z[:, a:b], torch.where(inside, target - a, -1), smoothing))
    return torch.stack(parts)


@settings(deadline=None)
@given(st.lists(logit, min_size=9, max_size=9), st.integers(0, 8), st.sets(st.integers(1, 8), max_size=4))
def test_any_cut(row, y, edges):
    z, target = torch.tensor([row], dtype=torch.float64), torch.tensor([y])
    lse, at_target, total = cross_entropy_join(statistics(z, target, sorted(edges), 0.2))
    torch.testing.assert_close(lse, z.logsumexp(-1), rtol=1e-13, atol=1e-13)
    assert torch.equal(at_target, z[:, y])
    torch.testing.assert_close(total, z.sum(-1), rtol=1e-12, atol=2e-10)  # 9 x 9e4 x 2^-52: terms of 1e4 cancel


@settings(deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=9, max_size=9), st.integers(0, 8), st.booleans())
def test_gradient(row, y, ignored):
    z = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    target, ignore = torch.tensor([y]), torch.tensor([ignored])
    lse, at_target, total = cross_entropy_join(statistics(z, target, [], 0.2))
    loss = cross_entropy_loss(lse, at_target, total, ignore, **OPTIONS)
    (expected,) = torch.autograd.grad(loss.sum() * 3, z)
    lse, dloss = lse.detach(), torch.tensor([3.0], dtype=torch.float64)
    got = cross_entropy_grad(dloss, z.detach(), target, lse, ignore, **OPTIONS)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_statistics_of_16_bits_are_fp32():
    z = torch.zeros(1, 5000, dtype=torch.bfloat16)
    parts = cross_entropy_statistics(z, torch.tensor([7]), 0.1)
    assert parts.dtype == torch.float32 and parts[1].item() == 5000.0, "a bf16 sum of ones stops at 256"


def test_ignored_rows_may_hold_anything():
    z = torch.tensor([[torch.inf, torch.nan, 0.0]])
    index, ignored = torch.tensor([-1]), torch.tensor([True])
    lse, at_target, total = cross_entropy_join(cross_entropy_statistics(z, index, 0.1)[None])
    assert cross_entropy_loss(lse, at_target, total, ignored, **OPTIONS).tolist() == [0.0]
    assert cross_entropy_grad(torch.tensor([torch.nan]), z, index, lse, ignored, **OPTIONS).tolist() == [[0.0] * 3]


def test_exp():
    """exp itself, which is the gradient where lse = 0: within 2 ulp of fp32, 4 units, from where it is 0 to where it is inf."""
    ends = [0.0, -0.0, 2.0**-149, -(2.0**-149), 88.7228, 88.73, -103.97, -103.98, torch.inf, -torch.inf, torch.nan, 3e38, -3e38]
    z = torch.cat([torch.linspace(-110, 95, 2_000_001), torch.tensor(ends)])[None]
    got = cross_entropy_grad(
        torch.ones(1), z, torch.tensor([-1]), torch.zeros(1), torch.tensor([False]), **PLAIN | {"vocab_size": z.shape[1]}
    )
    exact = z.double().exp()
    at_the_end = (z > 88.72) & (z < 88.73)  # the largest numbers of fp32 may round to inf
    got, exact = got[~at_the_end], exact[~at_the_end]
    assert_within(got, exact, 3 * FP32 * exact.nan_to_num(posinf=0.0) + LEAST[torch.float32])


def check(z: Tensor, index: Tensor, smoothing: float, z_loss: float, dloss: Tensor) -> None:
    """Statistics and gradient of the kernels.

    The sum: a chain is at most 4096 / 64 + 10 additions deep; exp is within 4 units, and its argument within one of |z - max|, where
    |x| exp(-|x|) < 1. The gradient: exp(z - lse) as before, three operations on it, and uniform and target terms rounded once or twice.
    """
    t, v = z.shape
    wide = z.double()
    parts = cross_entropy_statistics(z, index, smoothing)
    assert parts.dtype == torch.float32 and parts.shape == (4, t)
    most = wide.amax(-1)
    total = (wide - most[:, None]).exp().sum(-1)
    assert torch.equal(parts[0].double(), most)
    assert_within(parts[1], total, 80 * FP32 * total, "sum of exp")
    here = index >= 0
    at_target = torch.where(here, wide.gather(1, index.clamp(min=0)[:, None])[:, 0], 0.0)
    assert torch.equal(parts[2].double(), at_target)
    assert_within(parts[3], wide.sum(-1) if smoothing else torch.zeros(t), 80 * FP32 * wide.abs().sum(-1), "sum of z")
    lse, ignored = wide.logsumexp(-1).float(), torch.zeros(t, dtype=torch.bool)
    options = {"vocab_size": v + 3, "label_smoothing": smoothing, "z_loss": z_loss}
    got = cross_entropy_grad(dloss, z, index, lse, ignored, **options)
    assert got.dtype == z.dtype
    softmax = (wide - lse.double()[:, None]).exp() * (1 + 2 * z_loss * lse.double())[:, None]
    uniform, chosen = smoothing / (v + 3), torch.zeros_like(wide)
    chosen[here.nonzero()[:, 0], index[here]] = 1 - smoothing
    scale = dloss.double()[:, None]
    bound = FP32 * scale.abs() * (softmax.abs() * (10 + (wide - lse.double()[:, None]).abs()) + 4 * uniform + 4 * chosen)
    denormal = 2 * LEAST[torch.float32] * (1 + (scale * (1 + 2 * z_loss * lse.double()[:, None])).abs())
    assert_within(got, (softmax - chosen - uniform) * scale, bound + denormal, "gradient")
    over = z.clone()
    assert cross_entropy_grad(dloss, over, index, lse, ignored, **options, overwrite=True) is over
    assert torch.equal(over, got)


@settings(deadline=None, max_examples=examples(120))
@given(
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([1, 15, 16, 17, 63, 64, 65, 129, 4095, 4096, 4097, 8193]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.01]),
    st.sampled_from([1.0, 20.0]),
    st.sampled_from(["dense", "wide rows", "gaps"]),
)
def test_against_fp64(t, v, dtype, smoothing, z_loss, scale, layout):
    z = normal(t, v, dtype=dtype, scale=scale)
    z = torch.cat([z, torch.full_like(z, torch.nan)], 1)[:, :v] if layout == "wide rows" else strided(z) if layout == "gaps" else z
    index = integers(-1, v, t, seed=v)
    check(z, index, smoothing, z_loss, normal(t, dtype=torch.float32, seed=1))


@pytest.mark.parametrize("v", [65535, 65536, 65537])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabulary(v, dtype):
    check(normal(3, v, dtype=dtype), torch.tensor([0, v - 1, -1]), 0.1, 0.01, torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_of_a_real_vocabulary(dtype):
    """1e-6 of the loss, against fp64 of the same logits: 80 units of the sum are 5e-6 of its logarithm, which is above 10."""
    z = normal(9, 32768, dtype=dtype)
    target = torch.arange(9) * 4000
    loss = vocab_parallel_cross_entropy(z, target, tp=None)
    exact = torch.nn.functional.cross_entropy(z.double(), target, reduction="none")
    assert float(((loss - exact) / exact).abs().max()) < 1e-6


@pytest.mark.parametrize("place", [0, 1, 4096, 9000])
def test_not_finite(place):
    """A finite logit behind a block of -inf, and what makes the whole row nan or inf: other rows never notice."""
    index = torch.tensor([0, 5, 9000])
    z = torch.full((3, 9001), -torch.inf)
    z[1] = normal(9001, dtype=torch.float32)
    z[0, place] = 3.0
    most, total, _, _ = cross_entropy_statistics(z, index, 0.0)
    assert (most[0], total[0], most[2], total[2]) == (3.0, 1.0, -torch.inf, 0.0)
    assert total[1].isfinite()
    for value in (torch.nan, torch.inf):
        z[0, place] = value
        parts = cross_entropy_statistics(z, index, 0.0)
        lse, _, _ = cross_entropy_join(parts[None])
        assert lse[0].isnan() and torch.equal(parts[:, 1], cross_entropy_statistics(z[1:2], index[1:2], 0.0)[:, 0])
        assert lse[0].isnan() == cross_entropy_join(cross_entropy_statistics_reference(z, index, False)[None])[0][0].isnan()


def test_ignored_rows_in_place():
    z = torch.full((2, 40), torch.nan).bfloat16()
    z[1] = 1.0
    args = torch.ones(2), z, torch.tensor([-1, 3]), torch.ones(2), torch.tensor([True, False])
    got = cross_entropy_grad(*args, vocab_size=40, label_smoothing=0.1, z_loss=0.1, overwrite=True)
    assert got[0].count_nonzero() == 0 and got[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    z, index = normal(5, 100, dtype=dtype), torch.tensor([0, 99, 5, -1, 7])
    parts, theirs = cross_entropy_statistics(z, index, 0.1), cross_entropy_statistics_reference(z, index, True)
    torch.testing.assert_close(parts, theirs, rtol=200 * FP32, atol=200 * FP32)
    args = (torch.ones(5), z, index, theirs[1].log() + theirs[0], torch.tensor([False, False, True, False, False]), 100, 0.1, 0.01)
    ours, wanted = torch.ops.megapar.cross_entropy_grad(*args), cross_entropy_grad_reference(*args)
    assert float((ours.double() - wanted.double()).abs().max()) <= 2 * UNIT[dtype] + 20 * FP32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overwritten_logits(dtype):
    """The same gradient, in the memory of the logits; a second backward would read it as logits, and is refused."""
    z, target = normal(4, 50, dtype=dtype), torch.tensor([1, 2, -100, 3])
    grads = []
    for overwrite in (False, True):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1
        loss = vocab_parallel_cross_entropy(logits, target, tp=None, overwrite_logits=overwrite).sum()
        loss.backward(retain_graph=True)
        grads.append(leaf.grad)
        assert torch.equal(logits.detach(), leaf.grad if overwrite else z)
        if overwrite:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    assert torch.equal(*grads)


def test_threads():
    z, index = normal(103, 3001, dtype=torch.bfloat16), torch.arange(103)
    options = (103, 3001, 0.1, 0.01)

    def run() -> tuple[Tensor, ...]:
        parts = torch.ops.megapar.cross_entropy_statistics(z, index, True)
        lse = parts[0] + parts[1].log()
        return parts, torch.ops.megapar.cross_entropy_grad(torch.ones(103), z, index, lse, index < 5, *options[1:])

    each_number_of_threads(run)


def test_rows_beyond_2_31_elements():
    """Three rows, so far apart that 32-bit offsets would wrap; the memory between them is never touched."""
    stride = 2**31 + 5
    try:
        base = torch.empty(2 * stride + 24, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no address space of 8 GiB")
    rows = base.as_strided((3, 24), (stride, 1))
    check(rows.copy_(normal(3, 24, dtype=torch.bfloat16)), torch.tensor([0, 23, 5]), 0.1, 0.0, torch.ones(3))


def test_opcheck():
    z, index = normal(3, 20, dtype=torch.bfloat16), torch.tensor([0, -1, 19])
    check_op("cross_entropy_statistics", z, index, True)
    args = (torch.ones(3), z, index, torch.ones(3), torch.tensor([False, True, False]), 20, 0.1, 0.01)
    check_op("cross_entropy_grad", *args)
    check_op("cross_entropy_grad_", *args)


@kernels_only
@pytest.mark.parametrize(
    "change,told",
    [
        ({"logits": torch.ones(3)}, "logits have shape [3] and must be [t, v]: flatten them"),
        ({"logits": torch.ones(3, 4).int()}, "logits has dtype Int"),
        ({"index": torch.tensor([0, 1])}, "index has shape [2] and dtype Long: give one int64 for each of the 3 rows of logits"),
        ({"index": torch.tensor([0, 1, 4])}, "index contains 4 and the logits are 4 wide"),
        ({"index": torch.zeros(3)}, "index has shape [3] and dtype Float"),
        ({"dloss": torch.ones(2)}, "dloss has shape [2] and dtype Float"),
        ({"dloss": torch.ones(3).bfloat16()}, "dloss has shape [3] and dtype BFloat16"),
        ({"lse": torch.ones(3, 1)}, "lse has shape [3, 1]"),
        ({"ignored": torch.ones(3)}, "ignored has shape [3] and dtype Float: give one Bool"),
        ({"vocab_size": 3}, "vocab_size=3 must be at least the 4 logits of a row"),
        ({"logits": torch.ones(1, 4).expand(3, 4), "overwrite": True}, "must have dense rows that do not overlap"),
        ({"logits": torch.ones(3, 8)[:, ::2], "overwrite": True}, "must have dense rows that do not overlap"),
    ],
)
def test_refusals(change, told):
    arguments = {"dloss": torch.ones(3), "logits": torch.ones(3, 4), "index": torch.tensor([0, 1, 3]), "lse": torch.ones(3)}
    arguments |= {"ignored": torch.zeros(3, dtype=torch.bool), **PLAIN}
    with pytest.raises(ValueError) as caught:
        cross_entropy_grad(**arguments | change)
    assert told in str(caught.value)


@kernels_only
def test_refuses_an_output_that_is_an_input():
    memory = torch.ones(12)
    with pytest.raises(ValueError, match="dloss and lse must not share the memory of logits"):
        cross_entropy_grad(
            memory[:3], memory.view(3, 4), torch.tensor([0, 1, 3]), torch.ones(3), torch.zeros(3) > 0, **PLAIN, overwrite=True
        )
