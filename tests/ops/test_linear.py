"""The linear ops as PyTorch sees them: gradients, dtypes, compilation, offsets; and their numbers on each instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megapar.ops import dispatch
from megapar.ops import linear as ops
from megapar.ops.linear import linear, linear_activation, linear_bias_grad, linear_forward, linear_input_grad, linear_weight_grad
from tests.ops.test_amx import processor_flags
from tests.row_ops import DEVICE, cpu_only

NUMBERS = Path(__file__).with_name("test_linear_numbers.py")
BODIES = ("portable", "avx2", "avx512", "avx512_bf16") + (("amx",) if "amx_bf16" in processor_flags() else ())
OPS = torch.ops.megapar


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(device=DEVICE, dtype=dtype)


@cpu_only
@pytest.mark.parametrize("isa", BODIES)
def test_every_body(isa):
    """The numbers again, in a process that MEGAPAR_CPU_ISA holds to fewer instructions."""
    assert dispatch.MISSING["cpu"] is None
    best = OPS.cpu_isa()
    if isa == best:
        pytest.skip(f"{best} is what the tests run already")
    environment = os.environ | {"MEGAPAR_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(NUMBERS)]
    done = subprocess.run(command, env=environment, cwd=NUMBERS.parents[2], capture_output=True, text=True, timeout=300, check=False)
    if "names instructions that this processor lacks" in done.stdout:
        pytest.skip(f"this processor has {best}")
    assert done.returncode == 0, done.stdout[-3000:]


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
    for beta in (0.0, 1.0, 0.5):
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
        x, dy = (torch.randn(64, n, generator=generator, device="cpu").to(device=DEVICE, dtype=dtype) for n in (40, 24))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [True, False])
def test_autograd_of_the_kernels(biased, dtype):
    """Against autograd of F.linear in fp64, at a size of whole and broken blocks. K products: gamma(K) |A||B|, and a rounding to dtype."""
    tensors = [normal(2, 70, 90, dtype=dtype), normal(50, 90, dtype=dtype), *([normal(50, dtype=dtype)] if biased else [])]
    ours, exact = ([t.to(kind).requires_grad_() for t in tensors] for kind in (dtype, torch.float64))
    y, wide = linear(*ours), torch.nn.functional.linear(*exact)
    dy = normal(2, 70, 50, dtype=dtype)
    found, expected = torch.autograd.grad(y, ours, dy), torch.autograd.grad(wide, exact, dy.double())
    positive = [t.detach().abs().requires_grad_() for t in exact]
    magnitude = torch.nn.functional.linear(*positive)
    magnitudes = torch.autograd.grad(magnitude, positive, dy.double().abs())
    for a, b, size in zip((y, *found), (wide, *expected), (magnitude, *magnitudes), strict=True):
        assert a.dtype == dtype
        unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert bool(((a.double() - b).abs() <= (unit * b.abs() + 150 * 2.0**-24 * size)).all())


@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck(biased):
    tensors = [normal(2, 3, 4), normal(5, 4), *([normal(5)] if biased else [])]
    assert torch.autograd.gradcheck(linear, [t.requires_grad_() for t in tensors])


def test_gradients_that_are_expanded():
    """The gradient of a sum has strides of 0."""
    x, weight = normal(3, 4, dtype=torch.float32).requires_grad_(), normal(5, 4, dtype=torch.float32).requires_grad_()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(3, 4))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(5, 4))
    row = normal(4, dtype=torch.float32).expand(3, 4)
    torch.testing.assert_close(linear_forward(row, weight.detach()), row @ weight.detach().t())
    torch.testing.assert_close(linear_weight_grad(row, row), row.t() @ row)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("n,out", [(0, 4), (5, 0), (5, 4)])
def test_leading_and_empty(leading, n, out):
    x, weight, dy = torch.ones(*leading, n), torch.ones(out, n), torch.ones(*leading, out)
    rows = int(torch.tensor(leading).prod()) if leading else 1
    assert torch.equal(linear_forward(x, weight), torch.full((*leading, out), float(n)))
    assert torch.equal(linear_input_grad(dy, weight), torch.full((*leading, n), float(out)))
    assert torch.equal(linear_weight_grad(dy, x), torch.full((out, n), float(rows)))
    assert torch.equal(linear_bias_grad(dy), torch.full((out,), float(rows)))


@pytest.mark.parametrize("kind", ["none", "gelu", "silu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference(kind, dtype):
    """What MEGAPAR_BACKEND=reference runs, beside the kernels. In bf16 it rounds once more on the way."""
    x, weight, bias = normal(33, 20, dtype=dtype), normal(26, 20, dtype=dtype), normal(26, dtype=dtype)
    # Of the largest result. fp32: two sums of 33 products, of sizes that add up to twice the largest; bf16: two roundings of the reference,
    # the first one times a slope of 1.13, and one of the kernel.
    bound = {torch.float32: 4 * 35 * 2.0**-24, torch.bfloat16: 4 * 2.0**-8}[dtype]

    def check(found: Tensor, reference: Tensor) -> None:
        assert found.dtype == reference.dtype and found.shape == reference.shape
        assert float((found - reference).abs().max()) <= bound * max(1.0, float(reference.abs().max()))

    for a, b in zip(linear_activation(x, weight, bias, kind), ops.linear_activation_reference(x, weight, bias, kind, True), strict=True):
        check(a, b)
    z = None if kind == "none" else normal(33, 40 if kind == "swiglu" else 20, dtype=dtype)
    dy = normal(33, 26, dtype=dtype)
    check(linear_input_grad(dy, weight, z, kind), ops.linear_input_grad_reference(dy, weight, z, kind))
    for target in (torch.float32, dtype):
        pair = [normal(26, 20, dtype=target) for _ in range(2)]
        linear_weight_grad(dy, x, pair[0], 1.0, torch.tensor(0.5))
        ops.linear_weight_grad_reference(pair[1], dy, x, 1.0, 1.0, torch.tensor(0.5), None)
        check(*pair)
        pair = [normal(26, dtype=target) for _ in range(2)]
        linear_bias_grad(dy, pair[0], 0.5)
        ops.linear_bias_grad_reference(pair[1], dy, 0.5)
        check(*pair)


def test_backend_of_the_environment():
    """Under MEGAPAR_BACKEND=reference an op never reaches a kernel, and gives the reference's bits."""
    code = """if True:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from megapar.ops import linear as ops
        class NoKernels(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                assert op.namespace != "megapar", op
                return op(*args, **(kwargs or {}))
        x, weight = torch.randn(5, 3), torch.randn(4, 3)
        with NoKernels():
            y, z = ops.linear_activation(x, weight, None, "swiglu")
            dz = ops.linear_input_grad(torch.randn(5, 3), torch.randn(3, 2), z, "swiglu")
            ops.linear_weight_grad(dz, x), ops.linear_bias_grad(dz), ops.linear_forward(x, weight)
        assert torch.equal(y, ops.linear_activation_reference(x, weight, None, "swiglu", True)[0])
    """
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"MEGAPAR_BACKEND": "reference"}, check=True, timeout=60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight, bias, dy = (normal(*shape, dtype=dtype) for shape in ((2, 3, 8), (6, 8), (6,), (2, 3, 6)))
    for kind, save in (("none", False), ("gelu", True), ("swiglu", True), ("swiglu", False)):
        torch.library.opcheck(OPS.linear.default, (x, weight, bias, kind, save))
        torch.library.opcheck(OPS.linear.default, (x[0].t().contiguous().t(), weight, None, kind, save))
    torch.library.opcheck(OPS.linear_input_grad.default, (dy, weight, None, "none"))
    torch.library.opcheck(OPS.linear_input_grad.default, (dy, weight, normal(2, 3, 16, dtype=dtype), "swiglu"))
    for target in (torch.float32, dtype):
        out = normal(6, 8, dtype=target)
        torch.library.opcheck(OPS.linear_weight_grad_.default, (out, dy, x, 1.0, 0.5, torch.ones(1), torch.zeros(1)))
        torch.library.opcheck(OPS.linear_bias_grad_.default, (normal(6, dtype=target), dy, 1.0))


def far(rows: int, width: int, distance: int) -> Tensor:
    """bf16 rows so far apart that only their own pages are ever touched."""
    return torch.empty((rows - 1) * distance + width, dtype=torch.bfloat16).as_strided((rows, width), (distance, 1))


def test_offsets_beyond_two_to_the_31():
    """A row stride of 2^31 elements: an offset in 32 bits would read, or crash, elsewhere."""
    x, dy = (far(2, width, 2**31 + 64) for width in (40, 24))
    for i, tensor in enumerate((x, dy)):
        tensor.copy_(normal(2, tensor.shape[1] + i, dtype=torch.bfloat16)[:, i:])
    weight = normal(24, 40, dtype=torch.bfloat16)
    assert torch.equal(linear_forward(x, weight), linear_forward(x.contiguous(), weight))
    assert torch.equal(linear_input_grad(dy, weight), linear_input_grad(dy.contiguous(), weight))
    assert torch.equal(linear_weight_grad(dy, x), linear_weight_grad(dy.contiguous(), x.contiguous()))
    assert torch.equal(linear_bias_grad(dy), linear_bias_grad(dy.contiguous()))
