"""The MLP as one autograd function: its wiring in fp64, its kernels in fp32 and bf16, the places of its gradients, two ranks of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapar import Axis, ParallelMesh
from megapar.grads import MainGrads
from megapar.layers.linear_function import column_linear, mlp, row_linear
from megapar.ops.swiglu import swiglu

ALONE = ParallelMesh.alone().tp
T, HIDDEN, FFN = 6, 5, 7
CASES = list(itertools.product(["swiglu", "gelu"], [True, False]))


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(10 * sum(shape) + seed), dtype=torch.float64).to(dtype)


def tensors(kind: str, biased: bool, sizes: tuple[int, ...] = (T, HIDDEN, FFN), dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x, the expanding weight and bias, the other weight and bias."""
    t, hidden, ffn = sizes
    wide = 2 * ffn if kind == "swiglu" else ffn
    biases = (normal(wide, dtype=dtype, seed=1), normal(hidden, dtype=dtype, seed=2)) if biased else (None, None)
    shrunk = (normal(wide, hidden, dtype=dtype) / hidden**0.5, normal(hidden, ffn, dtype=dtype) / ffn**0.5)
    return [normal(t, hidden, dtype=dtype), shrunk[0], biases[0], shrunk[1], biases[1]]


def leaves(values: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if v is None else v.detach().to(dtype).clone().requires_grad_() for v in values]


def fused(values: list[Tensor | None], kind: str) -> Tensor:
    x, expand, expand_bias, down, down_bias = values
    return mlp(x, (expand, expand_bias), (down, down_bias), kind, ALONE, False)


def plain(values: list[Tensor | None], kind: str) -> Tensor:
    x, expand, expand_bias, down, down_bias = values
    z = F.linear(x, expand, expand_bias)
    if kind == "gelu":
        return F.linear(F.gelu(z, approximate="tanh"), down, down_bias)
    gate, up = z.chunk(2, -1)
    return F.linear(F.silu(gate) * up, down, down_bias)


@pytest.mark.parametrize("kind,biased", CASES)
def test_gradcheck(kind, biased):
    values = leaves(tensors(kind, biased), torch.float64)
    given = [v for v in values if v is not None]

    def function(*inputs: Tensor) -> Tensor:
        left = iter(inputs)
        return fused([None if v is None else next(left) for v in values], kind)

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind,biased", CASES)
def test_against_plain_torch(kind, biased, dtype):
    """At most 4 times the error that plain torch makes in the same dtype, or some roundings of the largest number."""
    values = tensors(kind, biased, (67, 40, 52), dtype)
    dy = normal(67, 40, dtype=dtype, seed=3)
    results = []
    for run, width in ((fused, dtype), (plain, dtype), (plain, torch.float64)):
        given = leaves(values, width)
        y = run(given, kind)
        y.backward(dy.to(width))
        results.append([y.detach(), *(v.grad for v in given if v is not None)])
    for ours, torchs, exact in zip(*results, strict=True):
        assert ours is not None and ours.dtype == dtype
        allowed = max(4 * float((torchs - exact).abs().max()), 2 * torch.finfo(dtype).eps * float(exact.abs().max()))
        assert float((ours - exact).abs().max()) <= allowed


@pytest.mark.parametrize("kind,biased", CASES)
def test_accumulates_into_main_grad(kind, biased):
    """Two micro-batches: twice the gradient, in fp32 though the parameters are bf16, nothing in .grad."""
    values = tensors(kind, biased, (67, 40, 52), torch.bfloat16)
    parameters = [None if v is None else nn.Parameter(v.clone()) for v in values[1:]]
    dy = normal(67, 40, dtype=torch.bfloat16, seed=3)
    once = leaves(values, torch.bfloat16)
    fused(once, kind).backward(dy)
    MainGrads(p for p in parameters if p is not None)
    for _ in range(2):
        fused([values[0], *parameters], kind).backward(dy)
    for parameter, alone in zip(parameters, once[1:], strict=True):
        if parameter is not None and alone is not None:
            assert parameter.grad is None and parameter.main_grad.dtype == torch.float32
            # Fused rounds nothing that is once in bf16: half an ulp of `alone`, and fp32 sums.
            off = (parameter.main_grad.double() - 2 * alone.grad.double()).abs()
            assert bool((off <= 2 * (2.0**-8 * alone.grad.double().abs() + 2.0**-16 * float(alone.grad.abs().max()))).all())


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=5)))
def test_only_what_is_asked_for(needed):
    """Any subset of the five gradients: those are right, the others absent."""
    whole = leaves(tensors("swiglu", True), torch.float64)
    fused(whole, "swiglu").sum().backward()
    values = [v.detach().clone().requires_grad_(need) for v, need in zip(whole, needed, strict=True)]
    y = fused(values, "swiglu")
    assert y.requires_grad == any(needed)
    if any(needed):
        y.sum().backward()
    for value, all_of_them, need in zip(values, whole, needed, strict=True):
        assert (value.grad is not None) == need
        if need:
            torch.testing.assert_close(value.grad, all_of_them.grad, rtol=1e-12, atol=1e-12)


def test_main_grad_of_one_parameter_breaks_the_graph():
    """A frozen expansion has no main_grad, but the other weight's is written: the compiler must not look inside."""
    torch._dynamo.reset()
    x, expand, _, down, _ = tensors("swiglu", False, dtype=torch.float32)
    parameter = nn.Parameter(down)
    MainGrads([parameter])
    compiled = torch.compile(lambda x: mlp(x, (expand, None), (parameter, None), "swiglu", ALONE, False) * 1.0, backend="aot_eager")
    for _ in range(3):
        compiled(x).sum().backward()
    exact = 3 * plain([x.double(), expand.double(), None, torch.eye(FFN, dtype=torch.float64), None], "swiglu").sum(0)
    torch.testing.assert_close(parameter.main_grad, exact.float().expand(HIDDEN, FFN))
    told = torch._dynamo.explain(lambda x: mlp(x + 1, (expand, None), (parameter, None), "swiglu", ALONE, False) * 1.0)(x)
    assert told.graph_break_count == 1


def test_autocast():
    """Under autocast all of it runs in bf16, and the gradients come back in fp32."""
    values = leaves(tensors("swiglu", True), torch.float32)
    narrow = leaves(values, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(values, "swiglu")
    assert torch.equal(y, fused(narrow, "swiglu"))
    y.sum().backward()
    fused(narrow, "swiglu").sum().backward()
    for wide, value in zip(values, narrow, strict=True):
        assert wide.grad.dtype == torch.float32 and torch.equal(wide.grad, value.grad.float())


def ranks_agree(kind: str, biased: bool, sharded: bool) -> None:
    """On two ranks, fp64: the fused function against the layers one after the other, whose tests compare them with one process."""
    axis: Axis = ParallelMesh(tp=2).tp
    x, *parameters = tensors(kind, biased, (T, HIDDEN, FFN + axis.rank))
    # Whatever is replicated is the same on both ranks.
    x, down_bias = normal(T, HIDDEN), None if parameters[3] is None else normal(HIDDEN)
    x = x[axis.rank * T // 2 :][: T // 2] if sharded else x
    parameters[3] = down_bias
    results = []
    for one in (True, False):
        given = leaves([x, *parameters], torch.float64)
        start, expand, expand_bias, down, bias = given
        if one:
            y = mlp(start, (expand, expand_bias), (down, bias), kind, axis, sharded)
        else:
            z = column_linear(start, expand, expand_bias, axis, sharded)
            y = row_linear(swiglu(z) if kind == "swiglu" else F.gelu(z, approximate="tanh"), down, bias, axis, sharded)
        y.backward(normal(*y.shape, seed=5))
        results.append([y.detach(), *(v.grad for v in given if v is not None)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind,biased", CASES)
def test_two_ranks(ranks, kind, biased, sharded):
    ranks.run(2, ranks_agree, kind, biased, sharded)
