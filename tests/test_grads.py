"""Where gradients go: .grad in plain PyTorch, main_grad with MainGrads, complete on every rank in both."""

import gc
import weakref

import pytest
import torch
from torch import nn

from megapar import ColumnParallelLinear, ParallelMesh, VocabParallelEmbedding, vocab_parallel_cross_entropy
from megapar.collectives import with_summed_grad
from megapar.grads import Deferral, MainGrads, accumulate, add, is_deferred, put
from megapar.layers.norm import RMSNorm
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from tests.counting import counted
from tests.parity import boxes, logical


def test_beta_follows_the_writes():
    param = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    main, calls = MainGrads([param]), []
    for _ in range(2):
        assert accumulate(param, lambda *call: calls.append(call))
    main.zero()
    assert accumulate(param, lambda *call: calls.append(call))
    assert all(main_grad is param.main_grad for main_grad, _ in calls) and [beta for _, beta in calls] == [0.0, 1.0, 0.0]
    assert param.main_grad.dtype == torch.float32 and type(param.main_grad) is torch.Tensor


def test_accumulate():
    param = nn.Parameter(torch.zeros(2))
    grad = torch.ones(2)
    assert not accumulate(param, lambda main_grad, beta: pytest.fail("there is no place to write to"))
    main = MainGrads([param])
    param.main_grad.fill_(torch.nan)  # fresh memory may hold anything
    for _ in range(2):
        assert accumulate(param, lambda main_grad, beta: put(main_grad, beta, grad))
    assert param.main_grad.tolist() == [2.0, 2.0]
    main.zero()
    add(param, grad)
    assert param.main_grad.tolist() == [1.0, 1.0]


def test_deferral():
    """What is put off is written when it is called, in its order, each with the beta of that time; the rest is written at once."""
    early, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    MainGrads([early, late])
    deferral = Deferral([late])
    assert not is_deferred(late)
    with deferral.collect() as waiting:
        assert is_deferred(late) and not is_deferred(early)
        for value in (1.0, 2.0):
            for param in (early, late):
                add_now = accumulate(param, lambda main_grad, beta, value=value: put(main_grad, beta, torch.full((2,), value)))
                assert add_now
    assert early.main_grad.tolist() == [3.0, 3.0] and not late._main_grad_written and len(waiting) == 2
    add(late, torch.ones(2))  # outside of the with, and before what waits
    for compute in waiting:
        compute()
    assert late.main_grad.tolist() == [4.0, 4.0]


def test_hook_after_none():
    """The layer writes main_grad itself and returns None to autograd, whose hook fires nevertheless."""
    layer, x = ColumnParallelLinear(3, 2), torch.ones(4, 3)
    main = MainGrads(layer.parameters())
    fired = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad))
    layer(x).sum().backward()
    main.finish()
    assert fired == [None], "if torch stops firing it, the guard in the hook can go"
    assert torch.equal(layer.weight.main_grad, torch.full((2, 3), 4.0))
    assert layer.weight.grad is None


def test_autograd_delivers_into_main_grad():
    """A parameter that no layer of megapar uses: its .grad is moved, accumulated and cleared."""
    param, frozen, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    main = MainGrads([param, frozen, unused, param])
    assert main.params == [param, unused]
    unused.main_grad.fill_(torch.nan)
    for _ in range(2):
        (2 * param * frozen).sum().backward()
        assert param.grad is None
    main.finish()
    assert param.main_grad.tolist() == [4.0] * 3
    assert unused.main_grad.tolist() == [0.0] * 3, "no backward reached it"
    assert not hasattr(frozen, "main_grad")


def test_second_owner_is_refused():
    param = nn.Parameter(torch.ones(2))
    main = MainGrads([param])
    with pytest.raises(ValueError, match=r"shape \(2,\) already has a main_grad: detach\(\)"):
        MainGrads([param])
    main.detach()
    MainGrads([param]).detach()
    (3 * param).sum().backward()
    assert param.grad.tolist() == [3.0, 3.0], "plain PyTorch again"
    assert not hasattr(param, "main_grad")


def test_no_leak():
    layer = ColumnParallelLinear(3, 2)
    main = MainGrads(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    gone = weakref.ref(layer.weight)
    del layer, main
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_dtype(dtype):
    layer = ColumnParallelLinear(3, 2, dtype=torch.bfloat16)
    MainGrads(layer.parameters(), dtype=dtype)
    layer(torch.ones(4, 3, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.main_grad.dtype == layer.bias.main_grad.dtype == dtype
    assert layer.weight.main_grad.float().tolist() == [[4.0] * 3] * 2 and layer.bias.main_grad.float().tolist() == [4.0] * 2


def test_tied_weight_gets_both_uses():
    ids = torch.tensor([1, 1, 4])
    embedding = VocabParallelEmbedding(5, 3, dtype=torch.float64)
    head = ColumnParallelLinear(3, 5, bias=False, dtype=torch.float64)
    head.weight = embedding.weight

    def loss() -> torch.Tensor:
        return head(embedding(ids).sin()).square().sum()

    loss().backward()
    expected, embedding.weight.grad = embedding.weight.grad, None
    main = MainGrads(embedding.parameters(), dtype=torch.float64)
    loss().backward()
    loss().backward()
    main.finish()
    torch.testing.assert_close(embedding.weight.main_grad, 2 * expected, rtol=1e-13, atol=1e-13)


CONFIGS = {
    "llama, 1 kv": DecoderConfig(hidden_size=24, layers=1, heads=4, kv_heads=1, head_size=6, ffn_size=13, bias=True, init_std=0.2),
    "llama, 2 kv": DecoderConfig(hidden_size=24, layers=1, heads=4, kv_heads=2, ffn_size=13, bias=True, tied_embeddings=True, init_std=0.2),
    "gpt": gpt_style(hidden_size=24, layers=1, heads=4, kv_heads=1, max_positions=16),
}


def loss_of(model: Decoder, seed: int) -> torch.Tensor:
    tokens = torch.randint(0, 17, (1, 8), generator=torch.Generator().manual_seed(seed))
    return vocab_parallel_cross_entropy(model(tokens[:, :-1]), tokens[0, 1:], tp=model.tp, vocab_size=17).sum()


def complete(tp: int, name: str, sequence_parallel: bool) -> None:
    """fp64, two accumulated backwards, so that the sums must be right to 1e-10 of the largest gradient."""
    alone = Decoder(CONFIGS[name], 17, ParallelMesh.alone(), dtype=torch.float64)
    model = Decoder(CONFIGS[name], 17, ParallelMesh(tp=tp), sequence_parallel=sequence_parallel, dtype=torch.float64)
    for seed in (0, 1):
        loss_of(alone, seed).backward()
        loss_of(model, seed).backward()
    expected = boxes(model, logical(alone, lambda p: p.grad))
    bound = 1e-10 * max(float(g.abs().max()) for g in expected.values())
    plain = logical(model, lambda p: p.grad)
    main = MainGrads(model.parameters(), dtype=torch.float64)
    for seed in (0, 1):
        loss_of(model, seed).backward()
        assert all(p.grad is None for p in model.parameters())
    main.finish()
    accumulated = logical(model, lambda p: p.main_grad)
    for key, value in expected.items():
        assert float((plain[key] - value).abs().max()) <= bound, f".grad of {key}"
        assert float((accumulated[key] - value).abs().max()) <= bound, f"main_grad of {key}"


@pytest.mark.parametrize("tp", [2, 3])
def test_gradients_arrive_complete(ranks, tp):
    for name in CONFIGS:
        for sequence_parallel in (False, True):
            ranks.run(tp, complete, tp, name, sequence_parallel)


def partial_until_finish() -> None:
    mesh = ParallelMesh(tp=2)
    norm = RMSNorm(4, tp=mesh.tp, sequence_parallel=True)
    assert with_summed_grad(norm.weight) is not norm.weight
    main = MainGrads(norm.parameters())
    assert with_summed_grad(norm.weight) is norm.weight
    x = torch.full((3, 4), 1.0 + mesh.tp.rank)
    with counted() as calls:
        for _ in range(3):
            norm(x).sum().backward()
    assert not calls, "one sum a step, not one a micro-batch"
    with counted() as calls:
        main.finish()
    assert calls == {"all_reduce": 1}
    torch.testing.assert_close(norm.weight.main_grad, torch.full((4,), 18.0))


def test_one_sum_a_step(ranks):
    ranks.run(2, partial_until_finish)


def unused_on_one_rank() -> None:
    mesh = ParallelMesh(tp=2)
    norm = RMSNorm(4, tp=mesh.tp, sequence_parallel=True)
    main = MainGrads(norm.parameters())
    if mesh.tp.rank == 0:
        norm(torch.ones(3, 4)).sum().backward()
    main.finish()
    torch.testing.assert_close(norm.weight.main_grad, torch.full((4,), 3.0))


def test_unused_on_one_rank(ranks):
    ranks.run(2, unused_on_one_rank)


def test_finish_twice_is_refused():
    main = MainGrads([nn.Parameter(torch.ones(2))])
    main.finish()
    with pytest.raises(ValueError, match="finish\\(\\) was called twice"):
        main.finish()
    main.zero()
    main.finish()
