"""Norm layers: stand-ins for torch's, whose gains know that sequence parallelism shows each rank some of the tokens."""

import pytest
import torch
from torch import nn

from megapar import ParallelMesh
from megapar.layers.norm import LayerNorm, RMSNorm
from tests.counting import counted

PAIRS = {"rms": (RMSNorm, nn.RMSNorm), "layer": (LayerNorm, nn.LayerNorm)}


def same(kind: str, tp: int, sequence_parallel: bool) -> None:
    """fp64; the gains are replicated, their gradient is complete on every rank."""
    axis = ParallelMesh(tp=tp).tp
    ours, theirs = PAIRS[kind]
    layer = ours(6, eps=1e-3, tp=axis, sequence_parallel=sequence_parallel).double()
    reference = theirs(6, eps=1e-3).double()
    c = 8 // tp
    mine = slice(axis.rank * c, (axis.rank + 1) * c) if sequence_parallel else slice(None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x, dy = (torch.randn(8, 6, dtype=torch.float64, generator=generator) for _ in range(2))
        whole_x, x = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        expected = reference(whole_x)
        with counted() as forward:
            y = layer(x)
        assert not forward
        torch.testing.assert_close(y, expected[mine], rtol=1e-12, atol=1e-12)
        y.backward(dy[mine])
        expected.backward(dy)
        torch.testing.assert_close(x.grad, whole_x.grad[mine], rtol=1e-12, atol=1e-12)
    for (name, param), (_, wanted) in zip(layer.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(param.grad, wanted.grad, rtol=1e-12, atol=1e-12, msg=name)
        assert param.spec.owner is (axis.rank == 0) and not param.spec.decay
        assert (param.spec.grad_sum is axis) is (sequence_parallel and tp > 1)


@pytest.mark.parametrize("kind", PAIRS)
def test_against_torch(ranks, kind):
    for tp, sequence_parallel in ((1, True), (2, False), (2, True), (4, True)):
        ranks.run(tp, same, kind, tp, sequence_parallel)


@pytest.mark.parametrize("kind", PAIRS)
def test_default_eps(kind):
    """Small inputs show it: megapar's RMSNorm defaults to 1e-6, LayerNorm to torch's 1e-5."""
    ours, theirs = PAIRS[kind]
    x = 1e-3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(6)(x), theirs(6, eps=1e-6 if kind == "rms" else 1e-5)(x))


def summed(kind: str, tp: int, sequence_parallel: bool) -> None:
    """norm(x, residual) is (norm(x + residual), x + residual), with the gradients that both send back."""
    axis = ParallelMesh(tp=tp).tp
    ours, theirs = PAIRS[kind]
    layer = ours(6, eps=1e-3, tp=axis, sequence_parallel=sequence_parallel).double()
    reference = theirs(6, eps=1e-3).double()
    c = 8 // tp
    mine = slice(axis.rank * c, (axis.rank + 1) * c) if sequence_parallel else slice(None)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(8, 6, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    dy, ds = (torch.randn(8, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    local = [z.detach()[mine].clone().requires_grad_() for z in whole]
    y, s = layer(*local)
    torch.autograd.backward([y, s], [dy[mine], ds[mine]])
    total = whole[0] + whole[1]
    expected = reference(total)
    torch.autograd.backward([expected, total], [dy, ds])
    torch.testing.assert_close((y, s), (expected[mine], total[mine]), rtol=1e-12, atol=1e-12)
    for got, wanted in zip(local, whole, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad[mine], rtol=1e-12, atol=1e-12)
    for param, wanted in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(param.grad, wanted.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", PAIRS)
def test_residual(ranks, kind):
    for tp, sequence_parallel in ((1, False), (2, True)):
        ranks.run(tp, summed, kind, tp, sequence_parallel)


@pytest.mark.parametrize("kind", PAIRS)
def test_autocast_residual(kind):
    """A layer's 16-bit output and an fp32 residual add up in fp32, as x + residual does in torch; without autocast they are a mistake."""
    layer = PAIRS[kind][0](6)
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(4, 6, generator=generator).bfloat16(), torch.randn(4, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y, s = layer(x, residual=residual)
    assert y.dtype == s.dtype == torch.float32
    assert torch.equal(s, x + residual)
    with pytest.raises(ValueError, match="residual has dtype"):
        layer(x, residual=residual)
