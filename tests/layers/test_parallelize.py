"""parallelize on models that know nothing of megapar: transformers' Llama, and hand-written modules."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megapar import ParallelMesh, RowParallelLinear
from megapar.layers.parallelize import match_plan, parallelize
from tests.parity import assert_same_gradients

TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(heads: int, kv_heads: int, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=53, vocab_size=61, tie_word_embeddings=tied, initializer_range=0.2))


def language_loss(model: nn.Module) -> torch.Tensor:
    out = model(TOKENS[:, :-1])
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")


class Attention(nn.Module):
    """Written as people write it: heads counted in attributes."""

    def __init__(self, width: int, n_heads: int, n_kv_heads: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.n_rep = n_heads, n_kv_heads, n_heads // n_kv_heads
        d = width // n_heads
        self.wq, self.wo = nn.Linear(width, width), nn.Linear(width, width)
        self.wk, self.wv = nn.Linear(width, n_kv_heads * d), nn.Linear(width, n_kv_heads * d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = self.wq(x).view(b, s, self.n_heads, -1).transpose(1, 2)
        k, v = (w(x).view(b, s, self.n_kv_heads, -1).repeat_interleave(self.n_rep, 2).transpose(1, 2) for w in (self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1))


class FusedAttention(nn.Module):
    """nanoGPT's: one layer for q, k and v."""

    def __init__(self, width: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (z.view(b, s, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, -1))


class Handwritten(nn.Module):
    def __init__(self, attention: nn.Module, width: int):
        super().__init__()
        self.embed = nn.Embedding(61, width)
        self.attention = attention
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 37), nn.Linear(37, width)
        self.head = nn.Linear(width, 61, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.attention(x)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


PLAN = {
    "embed": "vocab",
    "attention.w[qkv]": "column",
    "attention.wo": "row",
    "up": "column",
    "down": "row",
    "head": "column_gather",
}
FUSED_PLAN = {"attention.c_attn": "column", "attention.c_proj": "row", "*up": "column", "*down": "row"}


def handwritten(n_heads: int, n_kv_heads: int) -> nn.Module:
    torch.manual_seed(0)
    return Handwritten(Attention(8 * n_heads, n_heads, n_kv_heads), 8 * n_heads)


def fused(n_head: int) -> nn.Module:
    torch.manual_seed(0)
    return Handwritten(FusedAttention(8 * n_head, n_head), 8 * n_head)


def check(build, arguments, plan, tp) -> None:
    alone = build(*arguments)
    parallel = parallelize(copy.deepcopy(alone), ParallelMesh(tp=tp), plan)
    with torch.no_grad():
        torch.testing.assert_close(language_loss(parallel), language_loss(alone), rtol=1e-5, atol=0)
    assert sum(p.numel() for p in parallel.parameters()) < sum(p.numel() for p in alone.parameters())
    assert_same_gradients(alone, parallel, language_loss)


@pytest.mark.parametrize("heads,kv_heads,tied,tp", [(4, 2, False, 2), (4, 2, True, 2), (4, 1, False, 2), (8, 4, False, 3), (4, 2, True, 3)])
def test_transformers_llama(ranks, heads, kv_heads, tied, tp):
    ranks.run(tp, check, llama, (heads, kv_heads, tied), None, tp)


def qwen(heads: int, kv_heads: int) -> nn.Module:
    """With norms of queries and keys, whose gains every rank shares and each uses on its own heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 2}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, intermediate_size=53, vocab_size=61, initializer_range=0.2))


@pytest.mark.parametrize("heads,kv_heads,tp", [(4, 2, 2), (4, 1, 2), (8, 4, 3)])
def test_transformers_qwen(ranks, heads, kv_heads, tp):
    ranks.run(tp, check, qwen, (heads, kv_heads), None, tp)


@pytest.mark.parametrize("heads,kv_heads,tp", [(4, 4, 2), (6, 2, 2), (4, 1, 2), (8, 4, 3)])
def test_handwritten(ranks, heads, kv_heads, tp):
    ranks.run(tp, check, handwritten, (heads, kv_heads), PLAN, tp)


def test_fused_qkv(ranks):
    ranks.run(2, check, fused, (4,), FUSED_PLAN, 2)
    ranks.run(3, check, fused, (4,), FUSED_PLAN, 3)


def three_lines() -> list[float]:
    """What a user writes: any optimizer, gradients in .grad."""
    model = parallelize(handwritten(4, 2), ParallelMesh(tp=2), PLAN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = language_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def test_trains(ranks):
    first, second = ranks.run(2, three_lines)
    assert first == second
    assert first[-1] < 0.5 * first[0]


@pytest.mark.parametrize(
    "plan,told",
    [
        ({"attention.qw": "column"}, 'pattern "attention.qw" matches no module: the nearest name is "attention.w'),
        ({"up": "colum"}, 'role "colum" of pattern "up" is not one of'),
        ({"norm": "column"}, '"norm" is a LayerNorm'),
        ({"up": "column", "u*": "row"}, '"up" is given the roles "column" and "row"'),
        ({"*": "column"}, "make the pattern narrower"),
    ],
)
def test_bad_plan(plan, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        match_plan(handwritten(4, 2), plan)


def test_no_plan():
    with pytest.raises(ValueError, match="Handwritten has no tp_plan of its own: pass plan="):
        parallelize(handwritten(4, 2), ParallelMesh.alone())


def different_weights() -> None:
    model = handwritten(4, 2)
    if int(torch.distributed.get_rank()) == 1:
        with torch.no_grad():
            model.down.bias[0] += 1
    parallelize(model, ParallelMesh(tp=2), PLAN)


def half_tied() -> None:
    model = handwritten(4, 2)
    model.head.weight = model.embed.weight
    parallelize(model, ParallelMesh(tp=2), {"head": "column_gather"})


def interleaved() -> None:
    model = fused(4)
    model.attention.query_key_value = model.attention.c_attn
    del model.attention.c_attn
    parallelize(model, ParallelMesh(tp=2), {"attention.query_key_value": "column", "attention.c_proj": "row"})


def too_many_heads() -> None:
    model = handwritten(2, 2)
    try:
        parallelize(model, ParallelMesh(tp=3), PLAN)
    finally:
        assert not any(isinstance(m, RowParallelLinear) for m in model.modules()), "a refused model must be left as it was"


REFUSED = [
    ("weight down.bias differs", 2, different_weights),
    ("leaves a rank without one of the 2 heads", 3, too_many_heads),
    ("embed holds a weight of a layer that the plan cuts", 2, half_tied),
    ("query_key_value seems to fuse q, k and v", 2, interleaved),
]


@pytest.mark.parametrize("told,world,fn", REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_refusals_agree(ranks, told, world, fn):
    messages = ranks.errors(world, fn)
    assert len(set(messages)) == 1
    assert told in messages[0]
