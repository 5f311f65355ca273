"""The gradient norm of a sharded model is that of the whole one, and so is clipping by it."""

import copy

import pytest
import torch
from torch import nn

from megapar import Axis, ColumnParallelLinear, ParallelMesh, clip_grad_norm_, vocab_parallel_cross_entropy
from megapar.grads import MainGrads
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.optim.grad_norm import gradient_totals
from tests.counting import counted
from tests.parity import boxes, logical

TOKENS = torch.randint(0, 17, (1, 8), generator=torch.Generator().manual_seed(0), device="cpu")
CONFIGS = [
    DecoderConfig(
        hidden_size=24, layers=1, heads=4, kv_heads=kv_heads, ffn_size=13, bias=True, tied_embeddings=tied, norm=norm, init_std=0.2
    )
    for kv_heads, tied, norm in ((1, True, "rms"), (2, False, "layer"), (4, True, "rms"))
]


def backward(model: Decoder) -> None:
    vocab_parallel_cross_entropy(model(TOKENS[:, :-1]), TOKENS[0, 1:], tp=model.tp, vocab_size=17).sum().backward()


def compare(tp: int, config: DecoderConfig, sequence_parallel: bool, main_grads: bool) -> None:
    """fp64: norm and every clipped gradient to 1e-12; once clipped by much, once not at all."""
    mesh = ParallelMesh(tp=tp)
    for max_norm in (0.01, 1e9):
        alone = Decoder(config, 17, ParallelMesh.alone(), dtype=torch.float64)
        model = Decoder(config, 17, mesh, sequence_parallel=sequence_parallel, dtype=torch.float64)
        main = MainGrads(model.parameters(), torch.float64) if main_grads else None
        backward(alone)
        backward(model)
        if main is not None:
            main.finish()
        expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), max_norm)
        with counted() as calls:
            norm = clip_grad_norm_(model.parameters(), max_norm, mesh=mesh)
        assert not calls or calls == {"all_reduce": 1}
        assert norm.dtype == torch.float64 and norm.dim() == 0
        torch.testing.assert_close(norm, expected.double(), rtol=1e-12, atol=0)
        got = logical(model, lambda p: p.main_grad if main_grads else p.grad)
        for name, value in boxes(model, logical(alone, lambda p: p.grad)).items():
            torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-15, msg=str(name))


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_against_torch(ranks, tp):
    for config in CONFIGS:
        for sequence_parallel, main_grads in ((False, True), (True, False), (True, True)):
            ranks.run(tp, compare, tp, config, sequence_parallel, main_grads)


def foreign_parameters() -> float:
    """Parameters without a spec are replicated: they count once."""
    mesh = ParallelMesh(tp=2)
    plain = nn.Parameter(torch.zeros(4))
    plain.grad = torch.full((4,), 1.5)
    return float(clip_grad_norm_([plain, nn.Parameter(torch.zeros(2))], 1.0, mesh=mesh))


def test_replicated_parameters_count_once(ranks):
    assert ranks.run(2, foreign_parameters) == [3.0, 3.0]


def test_without_a_mesh():
    """On whole parameters it is torch's function; a shard by itself has no norm to speak of."""
    model = nn.Sequential(nn.Linear(3, 4), ColumnParallelLinear(4, 2))
    model(torch.ones(2, 3)).sum().backward()
    twin = copy.deepcopy(model)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = param.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    assert float(clip_grad_norm_(iter(list(model.parameters())), 0.5)) == pytest.approx(float(expected), rel=1e-6)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad)
    shard = ColumnParallelLinear(4, 2, tp=Axis.layout("tp", 0, 2))
    with pytest.raises(ValueError, match=r"a parameter of shape \(1, 4\) is a shard, .*: pass mesh= to the call"):
        clip_grad_norm_(shard.parameters(), 1.0)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan")])
def test_bad_max_norm(max_norm):
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match=f"max_norm={max_norm} must be above 0"):
        clip_grad_norm_([param], max_norm)
    assert param.grad.tolist() == [1.0, 1.0]


def test_no_gradients():
    assert float(clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0)) == 0.0


def test_sums_in_fp64():
    """bf16 gradients whose squares vanish beside the largest one in fp32: 4096 of them at a time do not (megapar/ops/grad_norm.py)."""
    param = nn.Parameter(torch.zeros(100_001, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    param.grad[0] = 4096.0
    assert float(gradient_totals([param], None)[0]) == pytest.approx(4096.0**2 + 100_000, rel=2.2e-6)


def test_main_grad_goes_first():
    param = nn.Parameter(torch.zeros(2))
    main = MainGrads([param])
    param.main_grad.fill_(3.0)
    param.grad = torch.full((2,), 100.0)
    assert float(gradient_totals(main.params, None)[0]) == pytest.approx(18.0)
