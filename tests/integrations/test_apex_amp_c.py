"""apex's multi-tensor functions against fp64 within derived bounds, its flag, lists of mixed kinds, refusals."""

import math
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from megapar.integrations.apex import adam, amp_c, multi_tensor_applier
from megapar.ops.dispatch import FORCED
from tests.row_ops import drawn, kernels_only, on_cpu

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, FP16]
SIZES = [2048 * 32, 2048 * 32 + 1, 555, 33333, 7777 * 77, 1]
CHUNK = 2048 * 32


def flag(value: int = 0) -> Tensor:
    return torch.full((1,), value, dtype=torch.int32)


def draw(sizes: list[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [drawn(n, generator=generator).to(dtype) for n in sizes]


def places(sizes: list[int]) -> list[tuple[int, int]]:
    """First and last element of the first and last tensor, and one in the middle."""
    last = len(sizes) - 1
    return [(0, 0), (0, sizes[0] - 1), (last, 0), (last, sizes[last] - 1), (last // 2, sizes[last // 2] // 2)]


def assert_near(found: Tensor, exact: Tensor, roundings: float) -> None:
    """`roundings` of fp32, and the one to the dtype; denormals within half of its smallest."""
    info = torch.finfo(found.dtype)
    bound = exact.abs() * (roundings * 2.0**-24 + info.eps / 2) + info.smallest_normal * info.eps
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype_in", DTYPES)
@pytest.mark.parametrize("dtype_out", DTYPES)
def test_scale(dtype_in, dtype_out):
    ins, noop = draw(SIZES, dtype_in), flag()
    outs = [torch.full_like(x, math.nan, dtype=dtype_out) for x in ins]
    amp_c.multi_tensor_scale(CHUNK, noop, [ins, outs], 1 / 3)
    for x, out in zip(ins, outs, strict=True):
        assert_near(out, x.double() * float(torch.tensor(1 / 3)), 1)
    assert noop.tolist() == [0]
    amp_c.multi_tensor_scale(CHUNK, noop, [ins, ins], 0.5)
    assert all(torch.equal(x, fresh * 0.5) for x, fresh in zip(ins, draw(SIZES, dtype_in), strict=True)), "in place"


def test_scale_does_not_overflow_before_it_scales():
    out, noop = torch.empty(3, dtype=FP16), flag()
    amp_c.multi_tensor_scale(CHUNK, noop, [[torch.full((3,), 1e6)], [out]], 1e-3)
    assert out.tolist() == [1000.0] * 3 and noop.tolist() == [0]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_flag_sees_every_element(bad, dtype):
    def found(call: Any, *args: Any) -> int:
        noop = flag()
        multi_tensor_applier(call, noop, *args)
        return int(noop)

    sizes = [555, 33333, 1, 2048 * 32 + 1]
    for i, at in places(sizes):
        ins, outs, fine = draw(sizes, dtype), draw(sizes, F32), draw(sizes, F32)
        ins[i][at] = bad
        assert found(amp_c.multi_tensor_scale, [ins, outs], 0.0) == 1
        assert not outs[i][at].isfinite(), "what is not finite stays so"
        assert found(amp_c.multi_tensor_l2norm, [ins]) == found(amp_c.multi_tensor_l2norm_mp, [ins], True) == 1
        assert found(amp_c.multi_tensor_l2norm_scale, [ins, outs], 2.0) == 1
        assert found(amp_c.multi_tensor_unscale_l2norm, [ins], torch.ones(1)) == 1
        for arg, x_bad, y_bad in ((-1, 1, 1), (0, 1, 0), (1, 0, 1)):
            assert found(amp_c.multi_tensor_axpby, [ins, fine, outs], 1.0, 1.0, arg) == x_bad
            assert found(amp_c.multi_tensor_axpby, [fine, ins, outs], 1.0, 1.0, arg) == y_bad


def test_a_flag_that_is_set_stays_set():
    x, ones = draw([55] * 55, F32), torch.ones(1)
    for call in (
        lambda noop: amp_c.multi_tensor_scale(CHUNK, noop, [x, draw([55] * 55, F32)], 2.0),
        lambda noop: amp_c.multi_tensor_axpby(CHUNK, noop, [x, x, draw([55] * 55, F32)], 2.0, 1.0, -1),
        lambda noop: amp_c.multi_tensor_l2norm(CHUNK, noop, [x]),
        lambda noop: amp_c.multi_tensor_unscale_l2norm(CHUNK, noop, [x], ones),
    ):
        for noop in (flag(1), torch.tensor(1, dtype=torch.int32)):
            call(noop)
            assert int(noop) == 1


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, BF16), (FP16, BF16, F32)])
def test_axpby(dtypes):
    xs, ys, outs = (draw(SIZES, dtype, i) for i, dtype in enumerate(dtypes))
    noop = flag()
    amp_c.multi_tensor_axpby(CHUNK, noop, [xs, ys, outs], 2.5, -0.25, -1)
    for x, y, out in zip(xs, ys, outs, strict=True):
        a, b = 2.5 * x.double(), -0.25 * y.double()
        info = torch.finfo(out.dtype)
        bound = 3 * 2.0**-24 * (a.abs() + b.abs()) + (a + b).abs() * info.eps / 2 * 1.01 + info.smallest_normal * info.eps
        assert bool(((out.double() - a - b).abs() <= bound).all())
    assert noop.tolist() == [0]
    amp_c.multi_tensor_axpby(CHUNK, noop, [outs, ys, outs], 0.0, 1.0, -1)
    assert all(torch.equal(out, y.to(out.dtype)) for y, out in zip(ys, outs, strict=True)), "over an input"


@pytest.mark.parametrize("per_tensor", [None, False, True])
def test_norms(per_tensor):
    """Of a list of mixed dtypes and shapes; 1.1e-6 is the bound of `grad_norm_` and 2^-24 the rounding to fp32."""
    xs = [x for i, dtype in enumerate(DTYPES) for x in draw(SIZES, dtype, i)] + [torch.randn(6, 5).t(), torch.tensor(2.0)] * 20
    squares = torch.stack([x.double().square().sum() for x in xs])
    outs, noop = [torch.empty_like(x) for x in xs], flag()
    for norm, each in (
        amp_c.multi_tensor_l2norm(CHUNK, noop, [xs], per_tensor),
        amp_c.multi_tensor_l2norm_mp(CHUNK, noop, [xs], per_tensor),
        amp_c.multi_tensor_l2norm_scale(CHUNK, noop, [xs, outs], 0.5, per_tensor),
        [x * 8 for x in amp_c.multi_tensor_unscale_l2norm(CHUNK, noop, [xs], torch.tensor([0.125]), per_tensor)],
    ):
        torch.testing.assert_close(norm.double(), squares.sum().sqrt()[None], rtol=1.2e-6, atol=0)
        torch.testing.assert_close(each.double(), squares.sqrt() if per_tensor else squares[:0], rtol=1.2e-6, atol=0)
        assert norm.dtype == each.dtype == F32
    assert noop.tolist() == [0] and all(torch.equal(out, x * 0.5) for x, out in zip(xs, outs, strict=True))


def test_squares_do_not_overflow():
    noop = flag()
    norm, _ = amp_c.multi_tensor_l2norm(CHUNK, noop, [[torch.full((4,), 1e30)]])
    assert float(norm) == pytest.approx(2e30, rel=1e-6) and noop.tolist() == [0]
    norm, _ = amp_c.multi_tensor_l2norm(CHUNK, noop, [[torch.full((4,), 3e38)]])
    assert norm.isinf().all() and noop.tolist() == [1], "but a norm beyond fp32 does"


def test_mp_is_skipped():
    norm, each = amp_c.multi_tensor_l2norm_mp(CHUNK, flag(1), [draw([5, 6], F32)], True)
    assert norm.tolist() == [0] and each.tolist() == [0, 0]


@on_cpu
@pytest.mark.skipif(FORCED is not None, reason="only the compiled kernel reads that much in place, and in seconds")
def test_more_than_2_to_the_31_elements():
    """Zero pages that are never written, so that they take no memory; the last element is beyond what 32 bits can index."""
    n = 2**31 + 3
    pages = mmap.mmap(-1, 2 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # one fault for 2 MB
    x = torch.frombuffer(pages, dtype=BF16)
    x[-1] = 3.0
    noop = flag()
    assert float(amp_c.multi_tensor_l2norm(CHUNK, noop, [[x]])[0]) == 3.0 and noop.tolist() == [0]


def test_nothing_is_read_on_the_host():
    """A meta tensor has no value to read, and so does a GPU's until one waits; sizes beyond 32 bits in all lists."""
    with torch.device("meta"):
        sizes, noop, one, step = [2**31 + 5, 3], torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.ones(1, dtype=torch.int32)

        def drawn(dtype: torch.dtype = F32) -> list[Tensor]:
            return [torch.empty(n, dtype=dtype) for n in sizes]

        amp_c.multi_tensor_scale(CHUNK, noop, [drawn(), drawn(BF16)], 2.0)
        amp_c.multi_tensor_axpby(CHUNK, noop, [drawn(), drawn(FP16), drawn(BF16)], 2.0, 1.0, -1)
        for norm, each in (
            amp_c.multi_tensor_l2norm(CHUNK, noop, [drawn()], True),
            amp_c.multi_tensor_l2norm_mp(CHUNK, noop, [drawn()], True),
            amp_c.multi_tensor_l2norm_scale(CHUNK, noop, [drawn(), drawn()], 2.0, True),
            amp_c.multi_tensor_unscale_l2norm(CHUNK, noop, [drawn()], one, True),
        ):
            assert norm.shape == (1,) and each.shape == (2,)
        args = [one, 0.9, 0.99, 1e-8, step, 1, 1, 0.1, one]
        moments = [drawn(), drawn()]
        adam.multi_tensor_adam(CHUNK, noop, [drawn(BF16), drawn(BF16), *moments], 0.1, 0.9, 0.99, 1e-8, 3, 1, 1, 0.1)
        adam.multi_tensor_adam_capturable(CHUNK, noop, [drawn(BF16), drawn(BF16), *moments], *args)
        for dtype in (BF16, F32):
            adam.multi_tensor_adam_capturable_master(CHUNK, noop, [drawn(BF16), drawn(dtype), *moments, drawn()], *args)
        assert amp_c.update_scale_hysteresis(one, step, step.clone(), one.clone(), 2.0, 0.5, 4, 2) is one


def numbers(
    capturable: bool, step: int = 3, mode: int = 1, bias_correction: int = 1, inv_scale: float = 1.0, lr: float = 1e-2
) -> list[Any]:
    rest = [0.9, 0.99, 1e-8, step, mode, bias_correction, 0.1]
    if not capturable:
        return [lr, *rest]
    rest[3] = torch.tensor([step], dtype=torch.int32)
    return [torch.tensor(lr), *rest, torch.tensor([inv_scale])]


def state(sizes: list[int], dtype: torch.dtype, grad: torch.dtype, master: bool) -> list[list[Tensor]]:
    """[g, p, m, v] or [g, p, m, v, p_master]"""
    full = draw(sizes, F32, 1)
    lists = [draw(sizes, grad, 2), [x.to(dtype) for x in full], draw(sizes, F32, 3), [x**2 for x in draw(sizes, F32, 4)]]
    return [*lists, full] if master else lists


def assert_adam(
    before: list[list[Tensor]], after: list[list[Tensor]], mode: int, bias_correction: int, inv_scale: float, step: int
) -> None:
    """fp64, within 8 roundings of each term; 2^-24 of what divides, which the two bias corrections are."""
    for g, p, m, v, *master in zip(*before, strict=True):
        i = next(i for i, x in enumerate(before[1]) if x is p)
        w = (master[0] if master else p).double()
        g, m, v = g.double() * inv_scale, m.double(), v.double()
        g_terms = g.abs() + (0 if mode else 0.1 * w.abs())
        g = g if mode else g + 0.1 * w
        m_terms = 0.9 * m.abs() + 0.1 * g_terms
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        c1, c2 = (1 / (1 - 0.9**step), 1 / (1 - 0.99**step) ** 0.5) if bias_correction else (1.0, 1.0)
        scale = 1e-2 * c1 / (v.sqrt() * c2 + 1e-8)
        new = w - (1e-3 if mode else 0) * w - scale * m
        v_terms = 0.01 * g_terms**2 + 0.99 * before[3][i].double()
        bound = 8 * 2.0**-24 * (w.abs() + scale * m_terms * (1 + v_terms / v)) + 1e-36
        found = after[4][i] if master else after[1][i]
        info = torch.finfo(found.dtype)
        bound = bound + (0 if found.dtype == F32 else new.abs() * info.eps * 0.51 + info.smallest_normal * info.eps)
        assert bool(((found.double() - new).abs() <= bound).all())
        for x, exact, terms in ((after[2][i], m, m_terms), (after[3][i], v, v_terms)):
            assert bool(((x.double() - exact).abs() <= 8 * 2.0**-24 * terms + 1e-36).all()), "moments are fp32"
        if master:
            assert torch.equal(after[1][i], after[4][i].to(p.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("kind", ["host", "capturable", "master"])
def test_adam(dtype, grad, mode, kind):
    sizes = [555, 2048 * 32 + 1, 1, 0, 3333]
    function = {"host": "multi_tensor_adam", "capturable": "multi_tensor_adam_capturable", "master": "multi_tensor_adam_capturable_master"}
    for bias_correction in (0, 1):
        before = state(sizes, dtype, grad, kind == "master")
        if kind == "master" and dtype == F32:
            before[4] = [x.clone() for x in before[1]]
        after = [[x.clone() for x in tensors] for tensors in before]
        inv_scale = 1.0 if kind == "host" else 0.3
        args = numbers(kind != "host", 3, mode, bias_correction, inv_scale)
        multi_tensor_applier(getattr(adam, function[kind]), flag(), after, *args)
        exact_scale = float(torch.tensor(inv_scale))
        assert_adam(before, after, mode, bias_correction, exact_scale, 3)
        for g, left in zip(before[0], after[0], strict=True):
            assert torch.equal(left, (g.float() * torch.tensor(exact_scale)).to(grad)), "unscaled, where capturable"


@pytest.mark.parametrize("kind", ["multi_tensor_adam", "multi_tensor_adam_capturable", "multi_tensor_adam_capturable_master"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_adam_is_skipped(kind, dtype):
    lists = state([555, 33], dtype, BF16, kind.endswith("master"))
    if kind.endswith("master"):
        lists[4] = [x + 1 for x in lists[4]]  # nor is a master that differs copied
    before = [[x.clone() for x in tensors] for tensors in lists]
    noop = flag(1)
    multi_tensor_applier(getattr(adam, kind), noop, lists, *numbers("capturable" in kind, inv_scale=0.5))
    assert all(torch.equal(a, b) for old, new in zip(before, lists, strict=True) for a, b in zip(old, new, strict=True))
    assert noop.tolist() == [1]


def test_adam_of_a_list_of_everything():
    """All dtypes at once, and parameters with and without need of a master: each as it would be alone."""
    kinds = [(p, g) for p in DTYPES for g in DTYPES] * 6 + [(BF16, F32)]  # 55 tensors
    columns = [state([100 + i], p, g, True) for i, (p, g) in enumerate(kinds)]
    for column in columns:
        if column[1][0].dtype == F32:
            column[4][0] = column[1][0].clone()
    alone = [[[x.clone() for x in tensors] for tensors in column] for column in columns]
    together = [[column[k][0] for column in columns] for k in range(5)]
    args = numbers(True, inv_scale=0.5)
    adam.multi_tensor_adam_capturable_master(CHUNK, flag(), together, *args)
    for i, column in enumerate(alone):
        adam.multi_tensor_adam_capturable_master(CHUNK, flag(), column, *args)
        assert all(torch.equal(column[k][0], together[k][i]) for k in range(5))


def test_adam_of_a_channels_last_parameter():
    """Its elements lie without gaps, as those of its moments do; a gradient may lie as it likes."""
    flat = state([2 * 3 * 4 * 5], F32, F32, False)
    given = [[x.view(2, 3, 4, 5).clone() for x in tensors] for tensors in flat]
    last = [[x[0].to(memory_format=torch.channels_last)] for x in given]
    last[0] = given[0]
    for lists in (given[:], last):
        adam.multi_tensor_adam(CHUNK, flag(), lists, *numbers(False))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(given, last, strict=True))


def test_a_parameter_that_requires_grad():
    """As it comes from a module, outside no_grad."""
    p = torch.ones(5, requires_grad=True)
    lists = [[torch.ones(5)], [p], [torch.zeros(5)], [torch.zeros(5)]]
    adam.multi_tensor_adam_capturable(CHUNK, flag(), lists, *numbers(True))
    assert p.is_leaf and not torch.equal(p, torch.ones(5))


@pytest.mark.parametrize("found", [0.0, 1.0, math.inf, math.nan, 3.0])
def test_update_scale_hysteresis(found):
    """Against the rule in plain Python, from every state."""
    for growth in range(4):
        for tracker in range(-1, 4):
            for start in (65536.0, 3e38):
                scale, tensors = torch.full((1,), start), [torch.tensor([n], dtype=torch.int32) for n in (growth, tracker)]
                returned = amp_c.update_scale_hysteresis(scale, *tensors, torch.tensor([found]), 2.0, 0.5, 4, 2)
                expected = (start, growth + 1, 2)
                if found != 0:
                    expected = (start if tracker - 1 > 0 else start / 2, 0, tracker - 1)
                elif growth + 1 == 4:
                    expected = (start * 2 if start * 2 < 3.4e38 else start, 0, 2)
                assert returned is scale
                assert (float(scale), *map(int, tensors)) == pytest.approx(expected, rel=1e-7)


def test_a_caller_like_megatron():
    """megatron/core/optimizer/clip_grads.py: the norm of all, then the gradients scaled in place."""
    grads = draw(SIZES, F32)
    before = [g.clone() for g in grads]
    norm, _ = multi_tensor_applier(amp_c.multi_tensor_l2norm, flag(), [grads], False)
    total = ((norm**2.0).item()) ** 0.5
    coefficient = 1.0 / (total + 1.0e-6)
    assert coefficient < 1
    multi_tensor_applier(amp_c.multi_tensor_scale, flag(), [grads, grads], coefficient)
    for g in before:
        g.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(before, 1.0)
    for g, clipped in zip(grads, before, strict=True):
        torch.testing.assert_close(g, clipped.grad, rtol=1e-5, atol=0)


def test_empty_lists():
    noop, ones = flag(), torch.ones(1)
    amp_c.multi_tensor_scale(CHUNK, noop, [[], []], 2.0)
    amp_c.multi_tensor_axpby(CHUNK, noop, [[], [], []], 2.0, 1.0, -1)
    for norm, each in (
        amp_c.multi_tensor_l2norm(CHUNK, noop, [[]], True),
        amp_c.multi_tensor_l2norm_mp(CHUNK, noop, [[]], True),
        amp_c.multi_tensor_l2norm_scale(CHUNK, noop, [[], []], 2.0, True),
        amp_c.multi_tensor_unscale_l2norm(CHUNK, noop, [[]], ones, True),
    ):
        assert norm.tolist() == [0] and each.tolist() == []
    adam.multi_tensor_adam(CHUNK, noop, [[], [], [], []], *numbers(False))
    adam.multi_tensor_adam_capturable(CHUNK, noop, [[], [], [], []], *numbers(True))
    adam.multi_tensor_adam_capturable_master(CHUNK, noop, [[], [], [], [], []], *numbers(True))
    assert noop.tolist() == [0]


BY_KERNELS = ("lr", "strides", "moments")


def refused() -> dict[str, tuple[Any, str]]:
    x, y, meta = [torch.ones(4), torch.ones(3)], [torch.ones(4)], [torch.ones(4, device="meta")]
    good = [[torch.ones(3, 4)] for _ in range(4)]
    strided = [*good[:2], [torch.ones(4, 3).t()], good[3]]
    half = [*good[:2], [good[2][0].half()], [good[3][0].half()]]
    master, one = [*good, [torch.ones(3, 4).bfloat16()]], flag()

    def capturable(lists: Any, at: int, value: Any) -> None:
        args = numbers(True)
        args[at] = value
        adam.multi_tensor_adam_capturable(CHUNK, one, lists, *args)

    return {
        "lengths": (lambda: amp_c.multi_tensor_scale(CHUNK, one, [x, y], 1.0), r"lengths \[2, 1\]: give 2 of one length, for in, out"),
        "depth": (lambda: amp_c.multi_tensor_l2norm(CHUNK, one, [x, x]), r"lengths \[2, 2\]: give 1 of one length"),
        "shapes": (lambda: amp_c.multi_tensor_scale(CHUNK, one, [y, x[1:]], 1.0), r"out\[0\] has shape \(3,\) and in\[0\] \(4,\)"),
        "devices": (lambda: amp_c.multi_tensor_scale(CHUNK, one, [y, meta], 1.0), rf"out\[0\] is on meta and noop_flag on {one.device}"),
        "integers": (lambda: amp_c.multi_tensor_l2norm(CHUNK, one, [[flag()]]), r"x\[0\] has dtype torch.int32 and must be"),
        "doubles": (lambda: amp_c.multi_tensor_scale(CHUNK, one, [y, [y[0].double()]], 1.0), r"out\[0\] has dtype torch.float64"),
        "flag": (lambda: amp_c.multi_tensor_l2norm(CHUNK, torch.zeros(1), [x]), "noop_flag is torch.float32 .* must be one torch.int32"),
        "flags": (lambda: amp_c.multi_tensor_l2norm(CHUNK, torch.zeros(2, dtype=torch.int32), [x]), r"noop_flag is .* of shape \(2,\)"),
        "checked": (lambda: amp_c.multi_tensor_axpby(CHUNK, one, [y, y, y], 1.0, 1.0, 2), "arg_to_check=2 must be 0"),
        "inv_scale": (lambda: amp_c.multi_tensor_unscale_l2norm(CHUNK, one, [x], torch.ones(2)), "inv_scale is .* one torch.float32"),
        "mode": (lambda: adam.multi_tensor_adam(CHUNK, one, good, *numbers(False, mode=2)), "mode=2 must be 0"),
        "lr": (lambda: adam.multi_tensor_adam(CHUNK, one, good, *numbers(False, lr=-1.0)), r"lr=-1(\.0)? must not be negative"),
        "lr tensor": (lambda: capturable(good, 0, torch.ones((), dtype=torch.float64)), "lr is torch.float64 .* one torch.float32 number"),
        "step": (lambda: capturable(good, 4, torch.ones(1)), "step is torch.float32 .* one torch.int32 number"),
        "expanded": (lambda: capturable([[torch.ones(1, 1).expand(3, 4)], *good[1:]], 0, torch.ones(1)), r"g\[0\] has strides \(0, 0\)"),
        "unscale": (lambda: capturable(good, 8, torch.ones(1, device="meta")), f"inv_scale is .* on meta and must be .* on {one.device}"),
        "strides": (lambda: adam.multi_tensor_adam(CHUNK, one, strided, *numbers(False)), r"exp_avgs\[0\] has strides \[1, 3\]"),
        "moments": (lambda: adam.multi_tensor_adam(CHUNK, one, half, *numbers(False)), r"exp_avgs\[0\] has dtype Half .* must be float32"),
        "master": (
            lambda: adam.multi_tensor_adam_capturable_master(CHUNK, one, master, *numbers(True)),
            "p_master has dtypes torch.bfloat16 and must be float32",
        ),
        "tracker": (
            lambda: amp_c.update_scale_hysteresis(torch.ones(1), torch.ones(1), one, torch.ones(1), 2.0, 0.5, 4, 2),
            "growth_tracker is torch.float32 .* one torch.int32 number",
        ),
    }


@pytest.mark.parametrize("case", [pytest.param(c, marks=kernels_only) if c in BY_KERNELS else c for c in refused()])
def test_lists_that_do_not_fit(case):
    call, message = refused()[case]
    with pytest.raises(ValueError, match=message):
        call()
