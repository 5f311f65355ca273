"""Attention against the formula in fp64: every edge of its blocks of 48 queries and 192 keys, every dtype, layout and kind of span."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops import dispatch
from megapar.ops.attention import attention, attention_backward_reference, attention_reference, has_kernel, scores_reference
from tests.row_ops import DTYPES, FP32, UNIT, assert_within, check_op, cpu_only, each_number_of_threads, examples, integers, normal

pytestmark = cpu_only
op, op_backward = torch.ops.megapar.attention.default, torch.ops.megapar.attention_backward.default
LENGTHS = (1, 2, 5, 7, 31, 47, 48, 49, 96, 97, 191, 192, 193, 300, 400)


def spans_of(kind: str, b: int, s: int, seed: int) -> Tensor | None:
    if kind == "causal":
        return None
    index = torch.arange(s).expand(b, s)
    first = integers(0, s, b, s, seed=seed) if kind == "any" else integers(0, 100, b, s, seed=seed).eq(0).mul(index).cummax(1).values
    last = first + integers(0, s + 1, b, s, seed=seed + 1).remainder(s - first + 1) if kind == "any" else index + 1
    return torch.stack([first, last], -1).int()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, with heads beside each other, with gaps between rows, or with the numbers of a row apart."""
    if layout == "by token":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        b, heads, s, d = x.shape
        return torch.full((2 * b, 2 * heads, 2 * s, d + 3), torch.nan, dtype=x.dtype)[::2, ::2, ::2, 1 : d + 1].copy_(x)
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout == "apart" else x


def drawn(b: int, heads: int, kv_heads: int, s: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """dy, q, k, v."""
    shapes = [(b, heads, s, d)] * 2 + [(b, kv_heads, s, d)] * 2
    return [normal(*shape, dtype=dtype, seed=i, scale=scale if i else 1.0) for i, shape in enumerate(shapes)]


def bounds(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Of y, lse, dq, dk, dv: what is exact, and how far fp32 sums and P and dS in bf16 may be from it; to first order, twice."""
    kv_heads, s, d = k.shape[1], k.shape[2], k.shape[3]
    dy, q, k, v = (x.double().unflatten(1, (kv_heads, -1)) for x in (dy, q, k, v))
    scores = scores_reference(q.flatten(1, 2), k[:, :, 0], spans)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.nan_to_num(neginf=0)).exp()
    y = weights @ v
    scale, narrow = d**-0.5, UNIT[dtype] if dtype == torch.bfloat16 else 0.0
    # A score is a sum of d products, scaled; a weight is off by as much as its score and the log of its sum.
    off = (d + 4) * FP32 * (q.abs() @ k.abs().mT * scale).amax(-1, keepdim=True) + (s + 16) * FP32
    sums = (4 * s * q.shape[2] + d) * FP32
    dweights, delta = dy @ v.mT, (dy * y).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta)
    wrong = dy.abs() @ v.abs().mT * (d + 4) * FP32 + (dy.abs() * y.abs()).sum(-1, keepdim=True) * (UNIT[dtype] + (d + 4) * FP32)
    wrong = weights * (wrong + (off + narrow + sums) * (dweights.abs() + delta.abs()))
    return [
        (2 * (narrow + off) * (weights @ v.abs()), y),
        (2 * (off + FP32 * lse.abs().nan_to_num(posinf=0)), lse),
        (2 * scale * wrong @ k.abs(), dscores @ k * scale),
        (2 * scale * (wrong.mT @ q.abs()).sum(2), (dscores.mT @ q).sum(2) * scale),
        (2 * (weights.mT @ (dy.abs() * (off + narrow + sums))).sum(2), (weights.mT @ dy).sum(2)),
    ]


@settings(deadline=None, max_examples=examples(150))
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (3, 1)]),
    st.sampled_from(LENGTHS),
    st.sampled_from([1, 2, 15, 16, 33, 64, 80, 128]),
    st.sampled_from(DTYPES),
    st.sampled_from(["causal", "documents", "any"]),
    st.sampled_from(["by head", "by token", "gaps", "apart"]),
)
def test_against_fp64(b, heads, s, d, dtype, kind, layout):
    dy, q, k, v = (laid_out(x, layout) for x in drawn(b, *heads, s, d, dtype))
    spans = spans_of(kind, b, s, seed=s)
    y, lse = op(q, k, v, spans)
    assert y.dtype == dtype and y.transpose(1, 2).is_contiguous()
    got = [y, lse, *op_backward(dy, q, k, v, y, lse, spans)]
    for name, value, (bound, exact) in zip(("y", "lse", "dq", "dk", "dv"), got, bounds(dy, q, k, v, spans, dtype), strict=True):
        assert_within(value, exact.reshape(value.shape), bound.reshape(value.shape), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    """Scores of some 10^4, beyond the range of exp: the softmax is all but one key, and nothing overflows."""
    dy, q, k, v = drawn(1, 2, 2, 200, 64, dtype, scale=60.0)
    y, lse = op(q, k, v, None)
    grads = op_backward(dy, q, k, v, y, lse, None)
    assert all(bool(x.isfinite().all()) for x in (y, lse, *grads)) and float(lse.abs().max()) > 5e3
    best = scores_reference(q.double(), k.double(), None)[:, :, 0].argmax(-1)
    picked = v.gather(2, best[..., None].expand_as(v))
    alone = (scores_reference(q.double(), k.double(), None)[:, :, 0].softmax(-1).amax(-1) > 1 - 1e-6)[..., None].expand_as(v)
    assert float(alone.double().mean()) > 0.9
    assert float((y - picked)[alone].abs().max()) <= 1e-6 * float(v.abs().max()), "what is left of the other keys"


def test_nothing_to_attend_to():
    """Zeros, which no gradient leaves; the other queries of its tile are as they were."""
    dy, q, k, v = drawn(1, 1, 1, 60, 16, torch.float32)
    spans = spans_of("documents", 1, 60, seed=0)
    empty = spans.clone()
    empty[0, [0, 7, 50], 1] = empty[0, [0, 7, 50], 0]
    (y, lse), (full, _) = op(q, k, v, empty), op(q, k, v, spans)
    assert not y[0, 0, [0, 7, 50]].any() and (lse[0, 0, [0, 7, 50]] == -torch.inf).all()
    dq, dk, dv = op_backward(dy, q, k, v, y, lse, empty)
    assert not dq[0, 0, [0, 7, 50]].any() and all(bool(x.isfinite().all()) for x in (dk, dv))
    others = [i for i in range(60) if i not in (0, 7, 50)]
    assert torch.equal(y[0, 0, others], full[0, 0, others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinitely_far_keys(dtype):
    """A whole block of keys with scores of -inf before the first that counts: as if they were not there."""
    _, q, k, v = drawn(1, 1, 1, 300, 16, dtype)
    q = q.abs() + 1
    far = k.clone()
    far[:, :, :200] = -torch.inf
    spans = torch.tensor([0, 300]).expand(1, 300, 2).int().contiguous()
    near = torch.tensor([200, 300]).expand(1, 300, 2).int().contiguous()
    (y, lse), (wanted, wanted_lse) = op(q, far, v, spans), op(q, k, v, near)
    torch.testing.assert_close(y, wanted, rtol=4 * UNIT[dtype], atol=4 * UNIT[dtype])
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-6, atol=1e-6)


def test_gradients_accumulate_over_the_heads_of_a_group():
    """Those of a shared KV head are the sums of what each query head alone gives it."""
    dy, q, k, v = drawn(2, 4, 2, 70, 32, torch.float32)
    y, lse = op(q, k, v, None)
    _, dk, dv = op_backward(dy, q, k, v, y, lse, None)
    copies = [x.repeat_interleave(2, 1) for x in (k, v)]
    apart = op_backward(dy, q, *copies, y, lse, None)
    for shared, each in zip((dk, dv), apart[1:], strict=True):
        torch.testing.assert_close(shared, each.unflatten(1, (2, 2)).sum(2), rtol=0, atol=70 * 4 * FP32 * float(each.abs().max()))


@pytest.mark.parametrize("kind", ["causal", "documents", "any"])
def test_reference(kind):
    dy, q, k, v = drawn(2, 4, 2, 70, 32, torch.float32)
    spans = spans_of(kind, 2, 70, seed=1)
    (y, lse), (wanted, wanted_lse) = op(q, k, v, spans), attention_reference(q, k, v, spans)
    pairs = [(y, wanted), (lse, wanted_lse)]
    pairs += zip(op_backward(dy, q, k, v, y, lse, spans), attention_backward_reference(dy, q, k, v, y, lse, spans), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert float((a - b).nan_to_num().abs().max()) <= 200 * FP32 * float(b.nan_to_num(neginf=0).abs().max())


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_gradcheck_of_the_wiring(kind):
    _, q, k, v = (x.requires_grad_() for x in drawn(2, 4, 2, 5, 3, torch.float64))
    assert torch.autograd.gradcheck(lambda *heads: attention(*heads, spans_of(kind, 2, 5, seed=3)), (q, k, v))


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_op(dtype, spans):
    dy, q, k, v = drawn(2, 4, 2, 50, 16, dtype)
    given = spans_of("documents", 2, 50, seed=2) if spans else None
    check_op("attention", q, k, v, given)
    check_op("attention_backward", dy, q, k, v, *op(q, k, v, given), given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype):
    dy, q, k, v = drawn(2, 3, 1, 300, 64, dtype)

    def run() -> tuple[Tensor, ...]:
        y, lse = op(q, k, v, None)
        return y, lse, *op_backward(dy, q, k, v, y, lse, None)

    each_number_of_threads(run)


def test_where_there_is_a_kernel():
    x = torch.zeros(1)
    assert has_kernel(x) and has_kernel(x.half()) and has_kernel(x.bfloat16())
    assert not has_kernel(x.double()) and not has_kernel(x.to("meta"))
    assert dispatch.FORCED in (None, "cpu")


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (1, 2, 3, 0)])
def test_empty(shape):
    b, heads, s, d = shape
    dy, q, k, v = drawn(b, heads, 1, s, d, torch.float32)
    y, lse = op(q, k, v, None)
    grads = op_backward(dy, q, k, v, y, lse, None)
    assert y.shape == q.shape and [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    reference = attention_reference(q, k, v, None)[0], *attention_backward_reference(dy, q, k, v, y, lse, None)
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), reference, strict=True))


def spans_with(row: int, first: int, last: int) -> Tensor:
    spans = torch.stack([torch.zeros(1, 6), torch.arange(1, 7).expand(1, 6)], -1).int()
    spans[0, row] = torch.tensor([first, last])
    return spans


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": torch.zeros(1, 2, 5, 8)}, "they must be \\[b, heads, s, d\\], k and v alike"),
        ({"v": torch.zeros(1, 1, 6, 8)}, "they must be \\[b, heads, s, d\\], k and v alike"),
        ({"q": torch.zeros(1, 3, 6, 8)}, "q has 3 heads and k 2: the first must be a multiple of the second"),
        ({"q": torch.zeros(1, 4, 6, 8).bfloat16()}, "k has dtype Float and q BFloat16: convert one of them"),
        ({"q": torch.zeros(4, 6, 8)}, "they must be \\[b, heads, s, d\\]"),
        ({"spans": torch.zeros(1, 6, 2)}, "spans are Float of shape \\[1, 6, 2\\] on cpu and must be contiguous int32"),
        ({"spans": torch.zeros(1, 5, 2).int()}, "must be contiguous int32 \\[b, s, 2\\] = \\[1, 6, 2\\]"),
        ({"spans": spans_with(3, 0, 7)}, "query 3 of sequence 0 attends to keys \\[0, 7\\) and there are 6"),
        ({"spans": spans_with(2, -1, 2)}, "query 2 of sequence 0 attends to keys \\[-1, 2\\)"),
        ({"spans": spans_with(5, 4, 3)}, "query 5 of sequence 0 attends to keys \\[4, 3\\)"),
    ],
)
def test_bad_input(change, told):
    given = {"q": torch.zeros(1, 4, 6, 8), "k": torch.zeros(1, 2, 6, 8), "v": torch.zeros(1, 2, 6, 8), "spans": None} | change
    if isinstance(change.get("k"), Tensor):
        given["v"] = change["k"][:, :, :4]
    with pytest.raises(ValueError, match=told):
        op(*given.values())


def test_bad_input_of_backward():
    dy, q, k, v = drawn(1, 2, 2, 6, 8, torch.float32)
    y, lse = op(q, k, v, None)
    with pytest.raises(ValueError, match="dy and y have shapes"):
        op_backward(dy[:, :, :5], q, k, v, y, lse, None)
    with pytest.raises(ValueError, match="lse is Double of shape"):
        op_backward(dy, q, k, v, y, lse.double(), None)
    with pytest.raises(ValueError, match="dy has dtype BFloat16 and q Float"):
        op_backward(dy.bfloat16(), q, k, v, y, lse, None)
