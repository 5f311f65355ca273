"""Attention: how heads are cut, what may attend to what."""

import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megapar import Axis, ParallelMesh
from megapar.batch import TokenBatch
from megapar.layers.attention import Attention, split_heads
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.params import named_specs
from tests.parity import boxes, logical


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_split_heads(group, kv_heads, ranks):
    heads = group * kv_heads
    if ranks > heads:  # some rank would have none; anything else can be cut
        with pytest.raises(ValueError, match=f"tp={ranks} leaves a rank without one of the {heads} heads"):
            split_heads(heads, kv_heads, ranks)
        return
    cut = split_heads(heads, kv_heads, ranks)
    assert len(cut.q) == len(cut.kv) == ranks
    assert cut.q[0][0] == 0 and cut.q[-1][1] == heads and all(a[1] == b[0] for a, b in pairwise(cut.q)), "each query head once"
    for (q_start, q_stop), (kv_start, kv_stop) in zip(cut.q, cut.kv, strict=True):
        assert {head // group for head in range(q_start, q_stop)} == set(range(kv_start, kv_stop)), "exactly the KV heads they read"
        q, kv = q_stop - q_start, kv_stop - kv_start
        assert q % kv == 0, "SDPA pairs them by one ratio"
        assert [q_start + i for i in range(q)] == sorted(range(q_start, q_stop))
        assert all(kv_start + i // (q // kv) == (q_start + i) // group for i in range(q)), "SDPA reads the right one"
    balanced(cut.q, cut.kv, group, kv_heads)


def balanced(q: tuple, kv: tuple, group: int, kv_heads: int) -> None:
    """Within one unit: KV heads among ranks, or ranks among KV heads and query heads among the ranks of one."""
    if len(q) <= kv_heads:
        counts = [[b - a for a, b in kv]]
    else:
        sharers: dict[int, list[int]] = {}
        for (a, b), (kv_head, _) in zip(q, kv, strict=True):
            sharers.setdefault(kv_head, []).append(b - a)
        assert set(sharers) == set(range(kv_heads)) and all(sum(s) == group for s in sharers.values())
        counts = [[len(s) for s in sharers.values()], *sharers.values()]
    assert all(max(c) - min(c) <= 1 for c in counts)


@pytest.mark.parametrize("heads,kv_heads", [(0, 1), (4, 3), (2, 4), (4, 0)])
def test_bad_heads(heads, kv_heads):
    with pytest.raises(ValueError, match=f"heads={heads} must be a positive multiple of kv_heads={kv_heads}"):
        split_heads(heads, kv_heads, 1)


@pytest.mark.parametrize(
    "arguments,told",
    [
        ({"hidden_size": 10, "heads": 4}, "hidden_size=10 must be a multiple of heads=4"),
        ({"hidden_size": 12, "heads": 4}, "head_size=3 must be even"),
        ({"hidden_size": 12, "heads": 4, "tp": Axis.layout("tp", 0, 5)}, "tp=5 leaves a rank without"),
    ],
)
def test_refusals(arguments, told):
    with pytest.raises(ValueError, match=told):
        Attention(**arguments)
    Attention(12, 4, rope_theta=None)  # learned positions may have odd heads


def hidden(t: int, h: int, seed: int = 0) -> Tensor:
    return torch.randn(t, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(layer: Attention, x: Tensor, batch: TokenBatch) -> Tensor:
    """One query of one head at a time, from the weights of each head; fp64, no rotary positions."""
    d, group = layer.head_size, layer.q_heads // layer.kv_heads
    rows = layer.qkv.weight.split([layer.q_heads * d, layer.kv_heads * d, layer.kv_heads * d])
    q, k, v = (x @ w.t() for w in rows)
    out = torch.zeros(batch.t, layer.q_heads * d, dtype=x.dtype)
    for row in range(batch.t):
        start = row // batch.s * batch.s
        keys = [j for j in range(start, start + batch.s) if batch.attention_mask()[row // batch.s, 0, row - start, j - start]]
        for head in range(layer.q_heads):
            mine, read = slice(head * d, (head + 1) * d), slice(head // group * d, (head // group + 1) * d)
            scores = k[keys, read] @ q[row, mine] / d**0.5
            out[row, mine] = scores.softmax(0) @ v[keys, read]
    return out @ layer.out.weight.t()


BATCHES = {
    "causal": {},
    "segments": {"segment_ids": torch.tensor([0, 0, 1, 1, 1, 5, 5, 2, 2, 2])},
    "prefix": {"prefix_len": torch.tensor([3, 0])},
    "both": {"segment_ids": torch.tensor([0, 0, 1, 1, 1, 5, 5, 2, 2, 2]), "prefix_len": torch.tensor([4, 5])},
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("heads,kv_heads", [(4, 2), (2, 2), (4, 1)])
def test_against_naive(name, heads, kv_heads):
    layer = Attention(heads * 3, heads, kv_heads, rope_theta=None, dtype=torch.float64)
    batch = TokenBatch(2, 5, torch.zeros(10, dtype=torch.int64), torch.arange(5).repeat(2), **BATCHES[name])
    x = hidden(10, heads * 3)
    torch.testing.assert_close(layer(x, batch), naive(layer, x, batch), rtol=1e-12, atol=1e-12)


def sharded(tp: int, heads: int, kv_heads: int, name: str) -> None:
    """Attention cut over tp is attention alone, for every mask."""
    mesh = ParallelMesh(tp=tp)
    torch.manual_seed(0)
    alone = Attention(heads * 4, heads, kv_heads, bias=True, dtype=torch.float64)
    torch.manual_seed(0)
    parallel = Attention(heads * 4, heads, kv_heads, bias=True, dtype=torch.float64, tp=mesh.tp)
    copy_weights(alone, parallel)
    batch = TokenBatch(2, 5, torch.zeros(10, dtype=torch.int64), torch.arange(5).repeat(2), **BATCHES[name])
    x = hidden(10, heads * 4)
    torch.testing.assert_close(parallel(x, batch), alone(x, batch), rtol=1e-12, atol=1e-12)


def copy_weights(alone: Attention, parallel: Attention) -> None:
    whole = boxes(parallel, logical(alone, lambda p: p))
    with torch.no_grad():
        for _, param, spec in named_specs(parallel):
            for piece, view in spec.views(param):
                view.copy_(whole[piece.name, piece.start])


def test_cut_over_ranks(ranks):
    for tp, heads, kv_heads in ((2, 4, 2), (3, 4, 2), (4, 4, 1), (3, 8, 4)):
        for name in ("causal", "both"):
            ranks.run(tp, sharded, tp, heads, kv_heads, name)


CONFIG = DecoderConfig(hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=24, init_std=0.3)


@functools.cache
def decoder() -> Decoder:
    return Decoder(CONFIG, 31, ParallelMesh.alone())


def logits(batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        return decoder()(batch)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9), st.integers(1, 30))
def test_no_leak_from_later_tokens(place, change):
    """A token changed at j leaves every logit before j, and every other sequence, bit for bit."""
    tokens = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone().view(-1)
    changed[place] = (changed[place] + change) % 31
    before, after = logits(TokenBatch.of(tokens)), logits(TokenBatch.of(changed.view(2, 5)))
    same = (before == after).all(-1)
    start, stop = place // 5 * 5, place // 5 * 5 + 5
    expected = [row < place or row >= stop for row in range(10)]
    expected[:start] = [True] * start
    assert same.tolist() == expected


def test_segments_are_documents_apart():
    """Packed documents, each at positions from 0, give what they give alone."""
    lengths, tokens = [3, 1, 4], torch.randint(0, 31, (8,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    packed = logits(TokenBatch(1, 8, tokens, positions, segments))
    apart = torch.cat([logits(TokenBatch.of(document[None])) for document in tokens.split(lengths)])
    bound = 1e-5 * float(apart.abs().max())  # fp32 sums in another order
    assert float((packed - apart).abs().max()) <= bound
    assert float((logits(TokenBatch(1, 8, tokens, positions)) - apart).abs().max()) > 100 * bound, "segments must matter"


def test_positions_are_read_from_the_batch():
    tokens = torch.randint(0, 31, (1, 6), generator=torch.Generator().manual_seed(0))
    plain = logits(TokenBatch.of(tokens))
    shifted = logits(TokenBatch(1, 6, tokens[0], torch.arange(6) + 100))
    gap = logits(TokenBatch(1, 6, tokens[0], torch.tensor([0, 1, 2, 30, 31, 32])))
    bound = 1e-4 * float(plain.abs().max())  # angles up to 100 rounded in fp32
    assert float((plain - shifted).abs().max()) <= bound, "only distances matter"
    assert float((plain - gap).abs().max()) > 10 * bound
    assert torch.equal(plain[:3], gap[:3])


def test_layers_share_a_batch():
    """What the batch remembers for one layer must not serve another of other wavelengths, head size or dtype."""
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    common = TokenBatch.of(tokens)
    for theta, heads, dtype in ((1e4, 2, torch.float32), (10.0, 2, torch.float32), (10.0, 4, torch.float32), (10.0, 4, torch.float64)):
        torch.manual_seed(0)
        layer = Attention(16, heads, rope_theta=theta, dtype=dtype)
        x = hidden(6, 16).to(dtype)
        assert torch.equal(layer(x, common), layer(x, TokenBatch.of(tokens))), (theta, heads, dtype)
