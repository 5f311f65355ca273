"""torch.compile and the layers: same gradients, no graph break where nothing is communicated or accumulated."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.grads import MainGrads
from megapar.layers.attention import Attention
from megapar.layers.block import DecoderBlock
from megapar.layers.mlp import MLP
from megapar.layers.norm import RMSNorm
from megapar.params import initialize
from tests.parity import logical

BATCH = TokenBatch.of(torch.zeros(2, 5, dtype=torch.int64))


def block(mesh: ParallelMesh, sequence_parallel: bool = False) -> DecoderBlock:
    common = {"tp": mesh.tp, "sequence_parallel": sequence_parallel}
    attention = Attention(16, 4, 1, bias=True, **common)
    made = DecoderBlock(RMSNorm(16, **common), attention, RMSNorm(16, **common), MLP(16, 24, bias=True, **common))
    initialize(made, 0)
    return made


def gradients(model: nn.Module, run: nn.Module, x: Tensor, main_grads: bool) -> dict:
    """Of two accumulated backwards, x's among them."""
    x = x.clone().requires_grad_()
    main = MainGrads(model.parameters()) if main_grads else None
    for _ in range(2):
        run(x, TokenBatch.of(torch.zeros(2, 5, dtype=torch.int64))).square().sum().backward()
    if main is not None:
        main.finish()
    found = logical(model, lambda p: p.main_grad if main_grads else p.grad)
    if main is not None:
        main.detach()
    model.zero_grad()
    return found | {("x", ()): x.grad}


def compare(tp: int, sequence_parallel: bool, main_grads: bool, backend: str) -> None:
    """fp32: fused kernels round in another order, within 1e-5 of the largest gradient."""
    mesh = ParallelMesh(tp=tp) if tp > 1 else ParallelMesh.alone()
    model = block(mesh, sequence_parallel)
    c = 10 // tp
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    x = x[mesh.tp.rank * c :][:c] if sequence_parallel else x
    eager = gradients(model, model, x, main_grads)
    torch._dynamo.reset()
    compiled = gradients(model, torch.compile(model, backend=backend), x, main_grads)
    bound = 1e-5 * max(float(g.abs().max()) for g in eager.values())
    for name, value in eager.items():
        error = float((compiled[name] - value).abs().max())
        assert error <= bound, f"{name}: {error:.1e} above {bound:.1e}"


@pytest.mark.parametrize("main_grads", [False, True])
def test_compiled_alone(main_grads):
    compare(1, False, main_grads, "aot_eager")


@pytest.mark.parametrize("sequence_parallel,main_grads", [(False, False), (True, True)])
def test_compiled_parallel(ranks, sequence_parallel, main_grads):
    ranks.run(2, compare, 2, sequence_parallel, main_grads, "aot_eager")


@pytest.mark.slow
def test_inductor():
    compare(1, False, False, "inductor")


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("segments", [None, [0, 0, 1, 1, 1]])
def test_no_graph_breaks_alone(segments, asked):
    """Also under masks that are not plainly causal, whether or not the batch was asked for its spans before."""
    torch._dynamo.reset()
    model = block(ParallelMesh.alone())
    x = torch.randn(10, 16, requires_grad=True)
    batch = BATCH if segments is None else replace(BATCH, segment_ids=torch.tensor(2 * segments))
    if asked:
        batch.attention_spans()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x, batch)
    y.sum().backward()
    assert all(param.grad is not None for param in model.parameters())
    torch.testing.assert_close(y, model(x, batch), rtol=1e-5, atol=1e-5)


def test_breaks_are_asked_for():
    """Where a layer writes main_grad the graph breaks because run_eagerly says so, not because the compiler happened to notice."""
    torch._dynamo.reset()
    model = block(ParallelMesh.alone())
    MainGrads(model.parameters())
    told = torch._dynamo.explain(model)(torch.randn(10, 16, requires_grad=True), BATCH)
    assert told.graph_break_count == 3, "qkv, out, mlp: one each"
    assert all("torch.compiler.disable" in str(reason.reason) for reason in told.break_reasons), told.break_reasons
