"""The kernels of a linear layer against fp64, within bounds that follow from K roundings to fp32 and one to the result's dtype.

An element of A B is a sum of K products: |error| <= gamma(K) |A| |B| whatever the order (Higham, Accuracy and Stability, section 3.1), and
an epilogue adds what its own operations round. Run once by itself, and again for each body by tests/ops/test_linear.py.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar.ops import dispatch
from megapar.ops.linear import linear_bias_grad, linear_input_grad, linear_weight_grad
from tests.row_ops import DEVICE, cpu_only, examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "gelu", "silu", "swiglu")
FP32 = 2.0**-24
FLUSHED = 4e-37
"""e^88.73 is the largest number of fp32: sigmoid is 0 where it is still as large as this over z."""
# 0 and 1; around 16 lanes, panels of 2, 6, 8, 32, 16 and 48, blocks of 126 and 128 rows and 384 (two parts: 192) columns.
SIZES = (0, 1, 2, 3, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 95, 97, 126, 127, 128, 129, 191, 192, 193, 257, 383, 384, 385, 400)
# Around 16 units of one number or two, and the 128 units that stay in L1.
DEPTHS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 513)
LAYOUTS = ("dense", "wide rows", "transposed", "leading")
any_size, any_depth, any_layout, any_dtype = (st.sampled_from(values) for values in (SIZES, DEPTHS, LAYOUTS, DTYPES))
any_beta = st.sampled_from([0.0, 1.0, 0.5])
many = settings(deadline=None, max_examples=examples(80))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads change no bit, but beside other processes they wait for each other for longer than small sizes compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device=DEVICE, dtype=dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers of x [t, n], elsewhere."""
    t, n = x.shape
    if layout == "wide rows":
        wide = torch.full((t, n + 5), torch.nan, dtype=x.dtype)
        wide[:, :n] = x
        return wide[:, :n]
    if layout == "transposed":
        return x.t().contiguous().t()
    return x.reshape(1, t, 1, n) if layout == "leading" else x


def gamma(n: int) -> float:
    return n * FP32 / (1 - n * FP32)


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a b in fp64, and what an fp32 sum may be off."""
    wide = a.double() @ b.double()
    return wide, gamma(a.shape[1] + 1) * (a.double().abs() @ b.double().abs())


def assert_within(found: Tensor, exact: Tensor, error: Tensor) -> None:
    """Within `error` before the rounding to found's dtype, half an ulp of which is added here."""
    info = torch.finfo(found.dtype)
    rounding = 0.0 if found.dtype == torch.float32 else (exact.abs() + error) * info.eps / 2
    off = (found.double() - exact).abs() - error - rounding - info.smallest_normal * info.eps
    assert bool((off <= 0).all()), f"above the bound by {float(off.max()):.2e}, where the largest number is {float(exact.abs().max()):.2e}"


def sigmoid_error(arg: Tensor, arg_error: float) -> tuple[Tensor, Tensor]:
    """Sigmoid in fp64, and the error of the kernel's: e^-x within 2 ulp at an argument off by arg_error, an addition and a division."""
    s = arg.sigmoid()
    return s, s * ((1 - s) * (4 * FP32 + arg_error * arg.abs()) + 2 * FP32) + FLUSHED / (1 + arg.abs())


def activated(kind: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """The activation in fp64, and what fp32 may be off at this z."""
    if kind == "none":
        return z, torch.zeros_like(z)
    if kind == "gelu":
        s, ds = sigmoid_error(1.5957691216057308 * (z + 0.044715 * z**3), 6 * FP32)
        # torch's 1 + tanh cancels, also in fp64.
        return z * s, z.abs() * (ds + FP32 * s)
    gate, up = z.chunk(2, -1) if kind == "swiglu" else (z, torch.ones_like(z))
    s, ds = sigmoid_error(gate, 0.0)
    return torch.nn.functional.silu(gate) * up, (gate * up).abs() * (ds + 2 * FP32 * s)


def sloped(kind: str, z: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """d times the slope at z, by autograd in fp64, and what fp32 may be off for this d and z."""
    z = z.detach().requires_grad_()
    (exact,) = torch.autograd.grad(activated(kind, z)[0], z, d)
    z, d = z.detach(), d.abs()
    if kind == "gelu":
        s, ds = sigmoid_error(1.5957691216057308 * (z + 0.044715 * z**3), 6 * FP32)
        steep = z.abs() * (1.5957691216057308 + 3 * 0.044715 * 1.5957691216057308 * z**2)
        # s + z s (1 - s) (...): 1 - s is off by what s is, and by half an ulp of 1.
        return exact, d * (ds + steep * (ds + s * (ds + FP32)) + 8 * FP32 * (s + steep * s * (1 - s)))
    gate, up = z.chunk(2, -1) if kind == "swiglu" else (z, torch.ones_like(z))
    s, ds = sigmoid_error(gate, 0.0)
    lean = 1 + gate.abs() * (1 - s)
    error = d * up.abs() * (ds * lean + s * gate.abs() * (ds + FP32) + 5 * FP32 * s * lean)
    return exact, torch.cat([error, d * gate.abs() * (ds + 2 * FP32 * s)], -1) if kind == "swiglu" else error


def slope_limit(kind: str, z: Tensor) -> Tensor:
    """By how much an error of the pre-activation may grow: 1.13 is GELU's and SiLU's largest slope."""
    if kind == "swiglu":
        gate, up = z.chunk(2, -1)
        return 1.13 * torch.maximum(up.abs(), gate.abs()) * 2 + 1
    return torch.full_like(z, 1.13)


@many
@given(any_size, any_depth, any_size, any_dtype, st.sampled_from(ACTIVATIONS), st.booleans(), any_layout)
def test_forward(t, n, out, dtype, kind, biased, layout):
    out += kind == "swiglu" and out % 2
    x, weight, bias = normal(t, n, dtype=dtype), normal(out, n, dtype=dtype, seed=1), normal(out, dtype=dtype, seed=2) if biased else None
    exact, error = product(x, weight.t())
    if bias is not None:
        exact = exact + bias.double()
        error = error + FP32 * (exact.abs() + error)
    given_x = laid_out(x, layout)
    y, z = torch.ops.megapar.linear(given_x, weight, bias, kind, True)
    width = out // 2 if kind == "swiglu" else out
    assert y.shape == (*given_x.shape[:-1], width) and z.shape == (*given_x.shape[:-1], out)
    assert_within(z.reshape(t, out), exact, error)
    # Forward activated the z that it rounded.
    assert_within(y.reshape(t, width), *activated(kind, z.reshape(t, out).double()))
    plain, nothing = torch.ops.megapar.linear(given_x, weight, bias, kind, False)
    assert nothing.numel() == 0
    value, own = activated(kind, exact)
    worst = (error[:, :width] + error[:, width:]) if kind == "swiglu" else error
    assert_within(plain.reshape(t, width), value, own + slope_limit(kind, exact) * worst)


@many
@given(any_size, any_depth, any_size, any_dtype, st.sampled_from(ACTIVATIONS), any_layout)
def test_input_grad(t, out, n, dtype, kind, layout):
    dy, weight = normal(t, out, dtype=dtype), normal(out, n, dtype=dtype, seed=1)
    wide = 2 * n if kind == "swiglu" else n
    z = None if kind == "none" else normal(t, wide, dtype=dtype, seed=2) * 3
    d, error = product(dy, weight)
    given_dy = laid_out(dy, layout)
    dx = linear_input_grad(given_dy, weight, None if z is None else laid_out(z, layout), kind)
    assert dx.shape == (*given_dy.shape[:-1], wide)
    if z is None:
        return assert_within(dx.reshape(t, wide), d, error)
    exact, own = sloped(kind, z.double(), d)
    # The slope is linear in d: its error is the slope at d's.
    carried = sloped(kind, z.double(), torch.ones_like(d))[0].abs() * (torch.cat([error, error], -1) if kind == "swiglu" else error)
    assert_within(dx.reshape(t, wide), exact, own + carried + own.clamp(max=1) * gamma(out + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gelu", "silu", "swiglu"])
def test_every_gate(kind, dtype):
    """From where sigmoid is 0 to where it is 1, on to squares and cubes that overflow; zeros and denormal numbers among them."""
    special = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-149), 1e-25, -1e-25, 1e20, -1e20, 3e38, -3e38])
    z = torch.cat([torch.linspace(-110, 110, 4401), special]).to(dtype)
    z = z[z.isfinite()][None]
    one = torch.ones(1, 1, dtype=dtype)
    # Not through x: a product of bf16 would take denormal numbers for zeros.
    y, _ = torch.ops.megapar.linear(torch.zeros_like(one), torch.zeros_like(z).t(), z[0], "silu" if kind == "swiglu" else kind, True)
    assert_within(y, *activated("silu" if kind == "swiglu" else kind, z.double()))
    ones = torch.ones_like(z)
    both = torch.cat([z, ones], -1) if kind == "swiglu" else z
    dx = linear_input_grad(one, ones, both, kind)
    far = z.double().abs() > 100
    exact, error = sloped(kind, both.double().clamp(-1000, 1000), ones.double())
    if kind == "swiglu":
        far = torch.cat([far, torch.zeros_like(far)], -1)
        exact[:, z.shape[1] :] = torch.nn.functional.silu(z.double())
        error[:, z.shape[1] :] = 8 * FP32 * exact[:, z.shape[1] :].abs() + FLUSHED
    assert dx.isfinite().all()
    assert_within(dx, exact, torch.where(far, FLUSHED, error))


@many
@given(any_depth, any_size, any_size, any_dtype, st.booleans(), any_beta, st.sampled_from(["one", "number", "tensor"]), any_layout)
def test_weight_grad(t, out, n, dtype, into_fp32, beta, alpha, layout):
    dy, x = normal(t, out, dtype=dtype), normal(t, n, dtype=dtype, seed=1)
    # beta = 0 must not read what is there: fresh memory may hold NaN.
    before = normal(out, n, seed=2).to(torch.float32 if into_fp32 else dtype)
    target = before.clone() if beta else torch.full_like(before, torch.nan)
    factor = 1.0 if alpha == "one" else 0.25
    flag = torch.zeros(1)
    given_alpha = torch.tensor(factor) if alpha == "tensor" else factor
    assert linear_weight_grad(laid_out(dy, layout), laid_out(x, layout), target, beta, given_alpha, flag) is target
    exact, error = product(dy.t(), x)
    exact = factor * exact + (beta * before.double() if beta else 0.0)
    assert_within(target, exact, factor * error + 2 * FP32 * (exact.abs() + before.double().abs() + error))
    assert flag.item() == 0.0
    untold = before.clone() if beta else torch.full_like(before, torch.nan)
    linear_weight_grad(laid_out(dy, layout), laid_out(x, layout), untold, beta, given_alpha)
    assert torch.equal(untold, target)


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(530, 610), (610, 530), (7, 20), (20, 7)])
def test_deep(rows, columns, dtype):
    """Sums so long that k is taken in slices, over more blocks of the result than wait for the next slice. Of small integers: exact."""
    depth = 4243
    a, b = (torch.sign(normal(n, depth, seed=i)).mul(torch.arange(depth) % 3).to(dtype) for i, n in enumerate((rows, columns)))
    exact = (a.double() @ b.double().t()).to(torch.float32)
    forward, _ = torch.ops.megapar.linear(a, b, None, "none", False)
    _, paired = torch.ops.megapar.linear(a, b[: columns // 2 * 2], None, "swiglu", True)
    assert torch.equal(forward, exact.to(dtype)) and torch.equal(paired, exact[:, : columns // 2 * 2].to(dtype))
    assert torch.equal(linear_input_grad(a, b.t().contiguous()), exact.to(dtype))
    ones = torch.ones(rows, columns)
    assert torch.equal(linear_weight_grad(a.t().contiguous(), b.t().contiguous(), ones, 1.0), exact + 1)


@many
@given(any_depth, any_size, any_dtype, st.booleans(), any_beta, any_layout)
def test_bias_grad(t, n, dtype, into_fp32, beta, layout):
    dy = normal(t, n, dtype=dtype)
    before = normal(n, seed=2).to(torch.float32 if into_fp32 else dtype)
    target = before.clone() if beta else torch.full_like(before, torch.nan)
    assert linear_bias_grad(laid_out(dy, layout), target, beta) is target
    exact = dy.double().sum(0) + (beta * before.double() if beta else 0.0)
    assert_within(target, exact, gamma(t + 2) * (dy.double().abs().sum(0) + before.double().abs()))


@cpu_only
def test_block_edges():
    """Whole blocks and what is left of them, both ways round: the smaller operand is packed whole."""
    for t, n, out in ((261, 130, 1170), (1170, 130, 261), (129, 700, 769), (769, 259, 129)):
        for dtype in DTYPES:
            x, weight, dy = normal(t, n, dtype=dtype), normal(out, n, dtype=dtype, seed=1), normal(t, out, dtype=dtype, seed=2)
            assert_within(torch.ops.megapar.linear(x, weight, None, "none", False)[0], *product(x, weight.t()))
            assert_within(linear_input_grad(dy, weight), *product(dy, weight))
            assert_within(linear_weight_grad(dy, x), *product(dy.t(), x))


def every_result(dtype: torch.dtype) -> list[Tensor]:
    t, n, out = 270, 130, 772
    x, weight, bias, dy = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(t, n), (out, n), (out,), (t, out)]))
    narrow, z = normal(n, out, dtype=dtype, seed=5), normal(t, 2 * n, dtype=dtype, seed=6)
    found = [y for kind in ACTIVATIONS for y in torch.ops.megapar.linear(x, weight, bias, kind, True)]
    found += [linear_input_grad(dy, weight), linear_input_grad(dy, weight, z, "swiglu"), linear_input_grad(x, narrow)]
    main_grad, main_bias = normal(out, n), normal(out)
    return [*found, linear_weight_grad(dy, x, main_grad, 1.0), linear_weight_grad(x, dy), linear_bias_grad(dy, main_bias, 1.0)]


@cpu_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    before = torch.get_num_threads()
    try:
        found = {}
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found[threads] = every_result(dtype)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(found[1], found[threads], strict=True)), threads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("t,n,out", [(19, 37, 51), (130, 33, 50)])
def test_not_finite_stays_in_its_row(t, n, out, value, dtype):
    """Its row or column of the result, no other: what fills up panels is zero, and zero times infinity must not be stored."""
    x, weight, dy = normal(t, n, dtype=dtype), normal(out, n, dtype=dtype, seed=1), normal(t, out, dtype=dtype, seed=2)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.megapar.linear(x, weight, None, "none", False)[0]

    # The op, its operands, which of them is dirty, which of its indices leads to the result, as which of the result's.
    cases = [(forward, (x, weight), 0, 0, 0), (forward, (x, weight), 1, 0, 1)]
    cases += [(linear_input_grad, (dy, weight), 0, 0, 0), (linear_input_grad, (dy, weight), 1, 1, 1)]
    cases += [(linear_weight_grad, (dy, x), 0, 1, 0), (linear_weight_grad, (dy, x), 1, 1, 1)]
    for op, operands, which, index, of_result in cases:
        clean = op(*operands)
        rows, columns = operands[which].shape
        for place in ((0, 0), (rows // 2, columns // 2), (rows - 1, columns - 1)):
            dirty = [operand.clone() for operand in operands]
            dirty[which][place] = value
            found = op(*dirty)
            hit = torch.zeros_like(clean, dtype=torch.bool)
            hit.select(of_result, place[index]).fill_(True)
            assert not found[hit].isfinite().any()
            assert torch.equal(found[~hit], clean[~hit])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("into_fp32", [True, False])
def test_non_finite_flag(dtype, into_fp32):
    for row, column in ((0, 0), (9, 25), (18, 50)):
        for value in (torch.inf, -torch.inf, torch.nan):
            target, flag = torch.zeros(19, 51, dtype=torch.float32 if into_fp32 else dtype), torch.zeros(1)
            target[row, column] = value
            dy, x = normal(4, 19, dtype=dtype), normal(4, 51, dtype=dtype)
            linear_weight_grad(dy, x, target, 1.0, 1.0, flag)
            assert flag.item() == 1.0
            linear_weight_grad(dy, x, torch.zeros_like(target), 1.0, 1.0, flag)
            assert flag.item() == 1.0, "a finite result leaves the flag as it is"


def test_flag_sees_what_was_rounded():
    """fp32 sums that only the 16-bit target turns into infinity."""
    big, flag = torch.full((2, 3), 300.0, dtype=torch.float16), torch.zeros(1)
    assert linear_weight_grad(big, big, None, 0.0, 1.0, flag).isinf().all() and flag.item() == 1.0
    flag.zero_()
    assert linear_weight_grad(big, big, torch.empty(3, 3), 0.0, 1.0, flag).eq(180000.0).all() and flag.item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals(dtype):
    """fp32 and fp16 keep them. Products of bf16 in AVX-512 and AMX take denormal inputs for zeros, as Intel defines them."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    x, weight = torch.full((3, 5), tiny, dtype=dtype), torch.full((4, 5), 2.0, dtype=dtype)
    y, _ = torch.ops.megapar.linear(x, weight, None, "none", False)
    on_cpu = x.is_cpu and not dispatch.INTERPRETED
    products = dtype == torch.bfloat16 and on_cpu and torch.ops.megapar.cpu_isa() in ("avx512_bf16", "amx")
    assert torch.equal(y, torch.full_like(y, 0.0 if products else 10 * tiny))


@pytest.mark.parametrize("dtype", DTYPES)
def test_range(dtype):
    """Products that only fp32 holds, none of which is lost or overflows."""
    small, large = (1e-25, 1e20) if dtype != torch.float16 else (1e-4, 200.0)
    for a, b in ((small, 1.0), (large, 0.125), (small, large)):
        x, weight = normal(9, 40, dtype=dtype) * a, normal(17, 40, dtype=dtype, seed=1) * b
        assert_within(torch.ops.megapar.linear(x, weight, None, "none", False)[0], *product(x, weight.t()))
