"""AdamW against fp64 within a derived bound, the remainder against the fp32 master bit for bit, rounding, skipping, refusals."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops import dispatch
from megapar.ops.adamw import Noise, adamw_, adamw_reference, join, noise, rounded, split
from megapar.ops.step_state import StepState
from tests.row_ops import cpu_only, drawn, examples, integers

F32, BF16, FP16, INT16 = torch.float32, torch.bfloat16, torch.float16, torch.int16
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}
# (weight, master)
KINDS = [(F32, None), (BF16, None), (FP16, None), (BF16, F32), (FP16, F32), (BF16, INT16)]
TINY = 2.0**-125
# The interpreter takes its time for each chunk, of 4096.
EDGES = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 1000]
EDGES += [4095, 4096, 4097, 12289] if dispatch.INTERPRETED else [65535, 65536, 65537]


@dataclass
class Lists:
    weights: list[Tensor]
    grads: list[Tensor]
    masters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]

    def clone(self) -> "Lists":
        return Lists(*([x.clone() for x in tensors] for tensors in vars(self).values()))

    def tensors(self) -> list[Tensor]:
        return [x for tensors in vars(self).values() for x in tensors]

    def part(self, begin: int, end: int) -> "Lists":
        return Lists(*(tensors[begin:end] for tensors in vars(self).values()))

    def wide(self, i: int) -> Tensor:
        """The weight as the formula sees it."""
        if not self.masters:
            return self.weights[i].float()
        return join(self.weights[i], self.masters[i]) if self.masters[i].dtype == INT16 else self.masters[i]


def lists(sizes: list[int], weight: torch.dtype, master: Any, grad: torch.dtype = F32, moment: torch.dtype = F32, seed: int = 0) -> Lists:
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        return drawn(n, generator=generator)

    full = [normal(n) for n in sizes]
    if master is INT16:
        weights, masters = [list(x) for x in zip(*map(split, full), strict=True)] if full else ([], [])
    else:
        weights, masters = [x.to(weight) for x in full], full if master else []
    grads = [normal(n).to(grad) for n in sizes]
    return Lists(weights, grads, masters, [(normal(n) / 8).to(moment) for n in sizes], [(normal(n) ** 2 / 9).to(moment) for n in sizes])


def state_at(step: int, betas: tuple[float, float] = (0.9, 0.99), grad_scale: float = 1.0, rows: int = 1) -> StepState:
    state = StepState.create(rows)
    state.grad_scale.fill_(grad_scale)
    state.counters.copy_(torch.tensor([step, 1 / (1 - betas[0] ** step), 1 / math.sqrt(1 - betas[1] ** step)]))
    return state


def step(x: Lists, state: StepState, threads: int = 2, **options: Any) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        adamw_(*vars(x).values(), state, [0] * len(x.weights), **{**OPTIONS, **options})
    finally:
        torch.set_num_threads(before)


def exact(w: Tensor, g: Tensor, m: Tensor, v: Tensor, state: StepState, o: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(w, m, v) in fp64 and a bound on the error of each in fp32.

    4 * 2^-23 of the sum of the magnitudes of its terms, those of m and v in w's as far as they move w; and what it moves where values
    below 2^-126 count as 0.
    """
    w, g, m, v = (x.double() for x in (w, g, m, v))
    (b1, b2), c1, c2 = o["betas"], state.counters[0, 1], state.counters[0, 2]
    g = g * state.grad_scale
    g_terms = g.abs()
    if not o["decoupled"]:
        g_terms = g_terms + (o["weight_decay"] * w).abs()
        g = g + o["weight_decay"] * w
    m_terms = m.abs() + (1 - b1) * (g_terms + m.abs())
    v_terms = v + (1 - b2) * (g_terms**2 + v)
    m, v = m + (1 - b1) * (g - m), v + (1 - b2) * (g * g - v)
    decay = o["lr"] * o["weight_decay"] if o["decoupled"] else 0.0
    denominator = v.sqrt() * c2 + o["eps"]
    scale = o["lr"] * c1 / denominator
    w_terms = w.abs() * (1 + decay) + scale * m_terms * (1 + v_terms / v.clamp(min=TINY))
    flushed = [TINY * (1 + scale) + scale * m.abs() * (TINY**0.5 * c2 / denominator), TINY, TINY]
    bounds = [4 * 2.0**-23 * terms + least for terms, least in zip((w_terms, m_terms, v_terms), flushed, strict=True)]
    return [w - decay * w - scale * m, m, v], bounds


def assert_right(before: Lists, after: Lists, state: StepState, o: dict[str, Any]) -> None:
    for i in range(len(before.weights)):
        m, v = before.exp_avgs[i], before.exp_avg_sqs[i]
        values, bounds = exact(before.wide(i), before.grads[i], m, v, state, o)
        found = [after.wide(i), after.exp_avgs[i], after.exp_avg_sqs[i]]
        kept = [found[0].dtype if before.masters else before.weights[i].dtype, m.dtype, v.dtype]
        for name, got, value, bound, dtype in zip("wmv", found, values, bounds, kept, strict=True):
            bound = bound + torch.finfo(dtype).eps * (dtype != F32) * value.abs()
            if dtype == FP16:
                bound = bound + 2.0**-25  # half of its smallest subnormal
            worst = ((got.double() - value).abs() / bound).max() if len(value) else torch.zeros(())
            assert worst <= 1, f"{name}[{i}]: {float(worst):.2f} of the bound"


@settings(max_examples=examples(35), deadline=None)
@given(
    st.sampled_from(KINDS), st.sampled_from([F32, BF16, FP16]), st.sampled_from([F32, BF16]), st.lists(st.sampled_from(EDGES), max_size=4),
    st.booleans(), st.integers(1, 2000), st.sampled_from([1.0, 2.0**-16, 0.013]), st.sampled_from([(0.9, 0.99), (0.0, 0.5), (0.95, 0.9)]),
    st.sampled_from([0.0, 0.1]), st.sampled_from([1e-8, 1e-3]),
)  # fmt: skip
def test_against_fp64(kind, grad, moment, sizes, decoupled, at, grad_scale, betas, weight_decay, eps):
    before = lists(sizes, *kind, grad, moment, seed=at)
    after, state = before.clone(), state_at(at, betas, grad_scale)
    options = {**OPTIONS, "betas": betas, "weight_decay": weight_decay, "eps": eps, "decoupled": decoupled}
    step(after, state, **options)
    assert_right(before, after, state, options)
    for i, (weight, master) in enumerate(zip(after.weights, after.masters, strict=False)):
        expected = split(after.wide(i))[0] if master.dtype == INT16 else master.to(weight.dtype)
        assert torch.equal(weight, expected), "the 16-bit weight is the master, rounded"
    plain = before.clone()
    numbers = {"beta1": betas[0], "beta2": betas[1], **{k: v for k, v in options.items() if k != "betas"}}
    adamw_reference(*vars(plain).values(), state.scalars, state.counters, [0] * len(sizes), **numbers)
    assert_right(before, plain, state, options)


@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[3:4] + KINDS[5:])
def test_extremes(kind):
    """Denormals, 1e-25, 1e18 (whose square fp32 still holds) in every place of the formula."""
    values = torch.tensor([0.0, 1e-45, 1e-40, 1e-38, 1e-25, 1e-19, 1.0, 1e18])
    g, m, v = (x.flatten() for x in torch.meshgrid(values, values, values, indexing="ij"))
    for w in (0.0, 1e-40, 1e-25, 1.0, 1e20):
        full = torch.full_like(g, w)
        weight, master = split(full) if kind[1] is INT16 else (full.to(kind[0]), full)
        before = Lists([weight], [g], [master] if kind[1] else [], [m.clone()], [v.clone()])
        after, state = before.clone(), state_at(3)
        step(after, state)
        assert_right(before, after, state, OPTIONS)


@pytest.mark.parametrize("grad", [F32, BF16])
def test_a_remainder_is_an_fp32_master(grad):
    """Five steps: the same bits, where the rounding of the weight differs too."""
    ours, theirs = lists([5000, 33], BF16, INT16, grad), lists([5000, 33], BF16, F32, grad)
    for at in range(1, 6):
        for x in (ours, theirs):
            step(x, state_at(at))
        assert all(torch.equal(ours.wide(i), theirs.masters[i]) for i in range(2))


def patterns() -> Tensor:
    """Every upper half with the lower halves around each edge, and random ones."""
    high = torch.arange(1 << 16) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    rest = integers(0, 1 << 32, 500_000, seed=1)
    return torch.cat([(high[:, None] + low).flatten(), rest]).to(torch.int32).view(F32)


def test_split_and_join_are_inverses():
    x = patterns()
    high, low = split(x)
    assert torch.equal(join(high, low).view(torch.int32), x.view(torch.int32))
    quiet = x.isnan() & (x.view(torch.int32) & 0x400000 != 0)
    assert high[quiet].isnan().all() and not high[~x.isnan()].isnan().any()
    assert torch.equal(high[~x.isnan()].float().isinf(), x[~x.isnan()].abs() >= 3.3961775e38), "the midpoint below infinity"


def test_the_kernel_splits_and_joins_alike():
    """With lr 0 a master comes back as it was, unless it is denormal; NaNs stay NaNs."""
    x = patterns()[:: 13 if dispatch.INTERPRETED else 1]
    x = x[(x.abs() >= 2.0**-126) | x.isnan()]
    weight, remainder = split(x)
    zeros = [torch.zeros_like(x) for _ in range(3)]
    found = Lists([weight.clone()], [zeros[0]], [remainder.clone()], [zeros[1]], [zeros[2]])
    step(found, state_at(1), lr=0.0)
    finite = x.isfinite()
    assert torch.equal(found.weights[0].view(INT16)[finite], weight.view(INT16)[finite])
    assert torch.equal(found.masters[0][finite], remainder[finite])
    assert found.weights[0][~finite].isnan().all(), "also inf, of which 0 times is subtracted"


def test_skips():
    before = lists([1000, 17], BF16, F32)
    after, state = before.clone(), state_at(1)
    state.skip.fill_(1)
    step(after, state)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), after.tensors(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", [False, True])
def test_the_same_however_it_is_cut(kind, drawn):
    if drawn and kind == (FP16, None):
        pytest.skip("refused")
    sizes = [4097, 0, 40] if dispatch.INTERPRETED else [70_000, 1, 333, 65_537, 0, 40_001]
    whole, found = lists(sizes, *kind, moment=BF16), [lists(sizes, *kind, moment=BF16) for _ in range(4)]
    ids = list(range(10, 10 + len(sizes)))
    step(whole, state_at(7), threads=1, noise=Noise(3, ids) if drawn else None)
    if dispatch.INTERPRETED:
        found = found[2:]  # there are no threads
    for threads, x in enumerate(found[:-1], 1):
        step(x, state_at(7), threads=threads, noise=Noise(3, ids) if drawn else None)
    for begin, end in ((0, 2), (2, len(sizes))):
        step(found[-1].part(begin, end), state_at(7), noise=Noise(3, ids[begin:end]) if drawn else None)
    for x in found:
        assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), x.tensors(), strict=True))


@cpu_only
@pytest.mark.parametrize("weight", [BF16, FP16])
@pytest.mark.parametrize("offset", [0, 8, 16])
def test_streamed_weights_are_the_same(weight, offset):
    """A call that moves more than the cache holds writes its weights past it; where they are not aligned it cannot."""
    n = 3_000_017
    whole = lists([n + offset], weight, F32)
    whole = Lists(*([x[offset:] for x in tensors] for tensors in vars(whole).values()))
    parts = whole.clone()
    step(whole, state_at(2))
    for begin in range(0, n, 500_000):
        step(Lists(*([x[begin : begin + 500_000] for x in tensors] for tensors in vars(parts).values())), state_at(2))
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), parts.tensors(), strict=True))


@cpu_only
@pytest.mark.parametrize("columns", [33, 48])
def test_streamed_weights_of_any_width(columns):
    """A row may start anywhere: a streamed store there would fault."""
    rows = 3_000_000 // columns
    whole = lists([rows * columns], BF16, F32, moment=BF16)
    parts = whole.clone()
    noise = Noise(3, [7], [(0, columns, columns)])
    adamw_(*vars(whole).values(), state_at(2), [0], **OPTIONS, noise=noise)
    half = rows // 2 * columns
    for begin, end in ((0, half), (half, rows * columns)):
        noise = Noise(3, [7], [(begin, columns, columns)])
        adamw_(*([x[begin:end] for x in tensors] for tensors in vars(parts).values()), state_at(2), [0], **OPTIONS, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), parts.tensors(), strict=True))


def test_rows():
    """Each tensor has its own counter, and what another one says does not matter."""
    x, state = lists([50, 60], F32, None), state_at(1, rows=3)
    state.counters[1:] = torch.tensor([[9.0, 1 / (1 - 0.9**9), 1 / math.sqrt(1 - 0.99**9)], [0.0, math.nan, math.nan]])
    alone = x.clone()
    adamw_(*vars(x).values(), state, [1, 0], **OPTIONS)
    step(alone.part(0, 1), state_at(9))
    step(alone.part(1, 2), state_at(1))
    torch.testing.assert_close(x.weights, alone.weights, rtol=1e-6, atol=0)


def test_stochastic_rounding_is_unbiased():
    """A moment that is 0.3 of the way between two bf16 numbers, and a weight; within 4 standard deviations of the draws' mean."""
    n, ulp = 1 << (17 if dispatch.INTERPRETED else 20), 2.0**-7
    value = 1.0 + 0.3 * ulp
    x = Lists([torch.ones(n, dtype=BF16)], [torch.full((n,), -value)], [], [torch.zeros(n, dtype=BF16)], [torch.zeros(n, dtype=BF16)])
    options = {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, "lr": 0.3 * ulp}
    step(x, state_at(1, (0.0, 0.0)), noise=Noise(1, [0]), **options)
    for found, expected, low in ((x.weights[0], value, 1.0), (-x.exp_avgs[0], value, 1.0), (x.exp_avg_sqs[0], value**2, 1.0)):
        share = (float(torch.tensor(expected)) - low) / ulp
        assert set(found.unique().tolist()) == {low, low + ulp}
        sigma = ulp * math.sqrt(share * (1 - share) / n)
        assert abs(float(found.double().mean()) - expected) <= 4 * sigma + 2.0**-16 * ulp
    up = [x.weights[0] > 1, x.exp_avgs[0] < -1, x.exp_avg_sqs[0] > 1]
    for i in range(3):
        for j in range(i):
            joint, apart = float((up[i] & up[j]).double().mean()), float(up[i].double().mean() * up[j].double().mean())
            assert abs(joint - apart) <= 4 / math.sqrt(n), "the bits of weight and moments are independent"
    again = x.clone()
    step(again, state_at(2, (0.0, 0.0)), noise=Noise(1, [0]), **options)
    assert (again.exp_avgs[0] != x.exp_avgs[0]).double().mean() > 0.3, "another step, other bits"


def test_stochastic_rounding_draws_what_the_plain_body_draws():
    """m = g / 2 is exact, so its bf16 differs only if the bits do; a GPU's second chunk starts inside a row; also past 2^32 elements."""
    shape, places = (130, 48), [(0, 48, 48), (5, 48, 100), (2**32 - 700, 48, 64), (2**45, 48, 48)]
    for place in places:
        g = drawn(*shape, generator=torch.Generator().manual_seed(5))
        x = Lists([torch.zeros(shape)], [g], [], [torch.zeros(shape, dtype=BF16)], [torch.zeros(shape, dtype=BF16)])
        step(x, state_at(4), noise=Noise(9, [77], [place]), betas=(0.5, 0.5))
        bits = noise(g, 9, torch.tensor(4), 77, place)
        assert torch.equal(x.exp_avgs[0], rounded(g / 2, BF16, bits >> 16))


@pytest.mark.parametrize("columns", [48, 33])
def test_any_sharding_rounds_alike(columns):
    """A logical matrix [60, 48] (or 33), whole and as shards of its columns and of its rows, far into a larger index."""
    options = {"lists": ((60, columns), BF16, None, F32, BF16)}
    n = 60 * columns
    whole = lists([n], *options["lists"][1:])
    whole = Lists(*([x.view(60, columns) for x in tensors] for tensors in vars(whole).values()))
    source = whole.clone()
    step(whole, state_at(3), noise=Noise(2, [5]))
    cut = columns // 3
    boxes = [(slice(0, 60), slice(0, cut)), (slice(0, 20), slice(cut, columns)), (slice(20, 60), slice(cut, columns))]
    shards = [Lists(*([x[box].contiguous() for x in tensors] for tensors in vars(source).values())) for box in boxes]
    for (rows, cols), shard in zip(boxes, shards, strict=True):
        place = (rows.start * columns + cols.start, cols.stop - cols.start, columns)
        step(shard, state_at(3), noise=Noise(2, [5], [place]))
        for a, b in zip(whole.tensors(), shard.tensors(), strict=True):
            assert torch.equal(a[rows, cols], b)


@cpu_only
@pytest.mark.parametrize(("dtype", "weight_decay"), [(F32, 0.0), (torch.float64, 0.1)])
def test_a_thousand_steps_of_torch(dtype, weight_decay):
    """Each on its own noisy way down a bowl: within 1e-6 of the largest weight.

    With decay torch's fp64 is the yardstick: its fp32 multiplies by 1 - lr * weight_decay, rounded, and is 2e-6 from it after these steps.
    """
    generator = torch.Generator().manual_seed(0)
    ours = lists([300, 41], F32, None)
    ours.exp_avgs, ours.exp_avg_sqs = ([torch.zeros(n) for n in (300, 41)] for _ in range(2))
    goal, steepness = ([torch.randn(n, generator=generator) for n in (300, 41)] for _ in range(2))
    params = [torch.nn.Parameter(w.to(dtype, copy=True)) for w in ours.weights]
    theirs = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=weight_decay)
    for at in range(1, 1001):
        for i, param in enumerate(params):
            noisy = torch.randn(param.shape, generator=generator)
            param.grad, ours.grads[i] = ((w - goal[i]) * steepness[i].exp() + noisy for w in (param.detach(), ours.weights[i]))
        step(ours, state_at(at), weight_decay=weight_decay)
        theirs.step()
    largest = max(float(p.detach().abs().max()) for p in params)
    worst = max(float((p.detach() - w).abs().max()) for p, w in zip(params, ours.weights, strict=True))
    assert worst <= 1e-6 * largest


@cpu_only
def test_flushing_ends_with_the_call():
    step(lists([100_000], F32, None), state_at(1))
    assert float((torch.full((100_000,), 1e-40) * 0.5).sum()) > 0


def test_a_backward_notices():
    """What autograd saved has changed under it."""
    w = torch.ones(5, requires_grad=True)
    y = (w * w).sum()
    with torch.no_grad():
        step(Lists([w], [torch.ones(5)], [], [torch.zeros(5)], [torch.zeros(5)]), state_at(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_noise_leaves_a_nan_a_nan():
    """The pattern that a GPU gives every NaN, and to which nothing may be added: the next one is -0."""
    x = lists([100], BF16, None, moment=BF16)
    x.grads[0].view(torch.int32).fill_(0x7FFFFFFF)
    step(x, state_at(1), noise=Noise(1, [2]))
    assert all(tensors[0].isnan().all() for tensors in (x.weights, x.exp_avgs, x.exp_avg_sqs))


def test_nothing_to_do():
    state, before = state_at(1), state_at(1)
    step(Lists([], [], [], [], []), state)
    assert torch.equal(state.scalars, before.scalars) and torch.equal(state.counters, before.counters)


def test_gradients_may_have_any_strides():
    x = lists([12, 12], F32, None)
    x = Lists(*([t.view(3, 4) for t in tensors] for tensors in vars(x).values()))
    y = x.clone()
    x.grads = [x.grads[0].t().contiguous().t(), torch.full((1, 1), 2.0).expand(3, 4)]
    y.grads[1] = torch.full((3, 4), 2.0)
    for lists_ in (x, y):
        step(lists_, state_at(1))
    assert all(torch.equal(a, b) for a, b in zip(x.weights, y.weights, strict=True))


def bad_lists() -> dict[str, tuple[Lists, str]]:
    x = lists([64, 8], BF16, F32)
    flat = torch.zeros(200)
    square = [torch.zeros(8, 8).t(), torch.zeros(8)]
    fp16 = lists([64, 8], FP16, F32)
    return {
        "weight and gradient": (
            replace(x, weights=[flat[:64], *x.weights[1:]], grads=[flat[60:124], x.grads[1]], masters=[]),
            "weights.0. shares memory with grads.0.",
        ),
        "moments": (
            replace(x, exp_avgs=[flat[:64], x.exp_avgs[1]], exp_avg_sqs=[flat[63:127], x.exp_avg_sqs[1]]),
            "exp_avg_sqs.0. shares memory with exp_avgs",
        ),
        "master and moment": (replace(x, masters=[x.exp_avgs[0], x.masters[1]]), "masters.0. shares memory with exp_avgs"),
        "expanded gradient": (
            replace(x, grads=[flat[:1].expand(64), x.grads[1]], exp_avgs=[flat[:64], x.exp_avgs[1]]),
            "exp_avgs.0. shares memory with grads",
        ),
        "remainder of fp16": (
            replace(fp16, masters=[m.to(INT16) for m in fp16.masters]),
            r"masters.0. has dtype Short and weights.0. Half",
        ),
        "master of fp32": (replace(x, weights=[w.float() for w in x.weights]), "masters.0. has dtype Float and weights.0. Float"),
        "moments of two kinds": (replace(x, exp_avgs=[m.bfloat16() for m in x.exp_avgs]), "both must be float32, or both bfloat16"),
        "moments in fp16": (
            replace(x, exp_avgs=[m.half() for m in x.exp_avgs], exp_avg_sqs=[m.half() for m in x.exp_avg_sqs]),
            "both must be float32",
        ),
        "gradient of integers": (replace(x, grads=[g.int() for g in x.grads]), "a gradient has dtype Int"),
        "shape of a gradient": (replace(x, grads=[x.grads[1], x.grads[1]]), r"grads.0. has shape \[8\] and weights.0. \[64\]"),
        "shape of a moment": (replace(x, exp_avgs=[x.exp_avgs[0].view(8, 8), x.exp_avgs[1]]), r"exp_avgs.0. has shape \[8, 8\]"),
        "strides of a moment": (
            replace(Lists(*([t[0].view(8, 8), t[1]] for t in vars(x).values())), exp_avgs=square),
            r"exp_avgs.0. has strides \[1, 8\]",
        ),
        "one gradient": (replace(x, grads=x.grads[:1]), "there are 2 weights, 1 grads"),
        "one master": (replace(x, masters=x.masters[:1]), "1 masters"),
    }


@pytest.mark.parametrize("case", list(bad_lists()))
def test_lists_that_do_not_fit(case):
    x, message = bad_lists()[case]
    before = x.clone()
    with pytest.raises(ValueError, match=message):
        step(x, state_at(1))
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), x.tensors(), strict=True)), "nothing is written"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1 must not be negative"), ({"lr": math.nan}, "lr=nan must not"), ({"eps": -1e-9}, "eps=-1e-09 must not"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must not"), ({"betas": (1.0, 0.9)}, r"beta1=1 must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1)}, r"beta2=-0.1 must lie in \[0, 1\)"), ({"noise": Noise(1, [0])}, "1 ids"),
        ({"noise": Noise(1, [0, 1], [(0, 64, 32), (0, 8, 8)])}, r"places.0. is base 0, columns 64 and stride 32"),
    ],
)  # fmt: skip
def test_options_out_of_range(options, message):
    x = lists([64, 8], BF16, None)
    before = x.clone()
    with pytest.raises(ValueError, match=message):
        step(x, state_at(1), **options)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), x.tensors(), strict=True))
    with pytest.raises(ValueError, match="float16 and stochastic rounding"):
        step(lists([64], FP16, None), state_at(1), noise=Noise(1, [0]))
    with pytest.raises(ValueError, match=r"row 1 must lie in \[0, 1\)"):
        adamw_(*vars(before).values(), state_at(1), [0, 1], **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("lr", [torch.tensor(0.3), torch.tensor([1e-3]).double(), torch.tensor(0.1).bfloat16(), torch.zeros(())])
def test_a_rate_in_memory_is_the_number(kind, decoupled, lr):
    """Bit for bit, in the kernel and in plain PyTorch; and times the number beside it."""
    number, given = lists([70, 1], *kind), lists([70, 1], *kind)
    step(number, state_at(3), lr=float(lr), decoupled=decoupled)
    step(given, state_at(3), lr=lr, decoupled=decoupled)
    assert all(torch.equal(a, b) for a, b in zip(number.tensors(), given.tensors(), strict=True))
    plain = [lists([70, 1], *kind) for _ in range(2)]
    rest = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": decoupled}
    state = state_at(3)
    for x, rates in zip(plain, ({"lr": float(lr)}, {"lr": 2.0, "lr_scale": lr.double() / 2}), strict=True):
        adamw_reference(*vars(x).values(), state.scalars, state.counters, [0, 0], **rates, **rest)
    assert all(torch.equal(a, b) for a, b in zip(plain[0].tensors(), plain[1].tensors(), strict=True))


@pytest.mark.parametrize(
    ("lr_scale", "message"),
    [
        (torch.ones(()), r"lr_scale is Float of shape \[\] on .* and must be one float64 number"),
        (torch.ones(2, dtype=torch.float64), r"lr_scale is Double of shape \[2\]"),
    ],
)
def test_a_rate_that_is_no_number(lr_scale, message):
    x, state = lists([64, 8], BF16, F32), state_at(1)
    before = x.clone()
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "lr_scale": lr_scale}
    with pytest.raises(ValueError, match=message):
        torch.ops.megapar.adamw_.default(*vars(x).values(), state.scalars, state.counters, [0, 0], **numbers)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), x.tensors(), strict=True))


@pytest.mark.parametrize("lr_scale", [None, torch.tensor([0.5], dtype=torch.float64)])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]])
def test_opcheck(kind, lr_scale):
    x, state = lists([33, 5], *kind), state_at(1)
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "lr_scale": lr_scale}
    torch.library.opcheck(torch.ops.megapar.adamw_.default, (*vars(x).values(), state.scalars, state.counters, [0, 0]), numbers)
