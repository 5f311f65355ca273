"""FlexAttention: its rule is the dense mask, its blocks are torch's, its results SDPA's, on one rank and on several.

On a GPU the kernel that torch compiles is under test; on the CPU it is the reference, and torch's operator without code generation.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import flex_attention as torchs
from torch.utils._python_dispatch import TorchDispatchMode

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.layers import flex_attention as flex
from megapar.layers.attention import Attention
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.models.generate import generate
from megapar.models.pipelined import PipelinedDecoder
from megapar.objectives.causal_lm import token_loss
from megapar.objectives.prefix_lm import PrefixLM
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import collate
from megapar.pipeline.kinds import make_schedule
from megapar.recompute import Recompute
from megapar.training.config import Config
from megapar.training.config_file import from_dict
from tests.parity import assert_same_gradients, boxes, gradients, logical
from tests.row_ops import DEVICE, DTYPES, cpu_only, integers, normal, on_cpu

SEQUENCES = (1, 2, 33, 127, 128, 129, 300)
KINDS = ("causal", "segments", "prefix", "prefixes", "segments and prefix", "segments and prefixes")


def batch_of(b: int, s: int, kind: str, seed: int, vocabulary: int = 31) -> TokenBatch:
    """Documents of random lengths, the last of them padding; with prefixes, one a sequence or one a document."""
    tokens, targets = (integers(0, vocabulary, b * s, seed=seed + i) for i in range(2))
    documents = integers(0, 8, b, s, seed=seed + 2).eq(0).cumsum(1)
    documents = documents.masked_fill(documents == documents[:, -1:], -1) if s > 2 else documents
    last_of = documents[:, :, None] == documents[:, None]  # a prefix ends somewhere in its document
    ends = (last_of * torch.arange(1, s + 1)).amax(-1) - documents.remainder(4)
    prefixes = {"prefix": integers(0, s + 1, b, seed=seed + 3), "prefixes": ends.flatten()}
    segment_ids = documents.flatten() if "segments" in kind else None
    prefix_len = prefixes.get(kind.split()[-1])
    return TokenBatch(b, s, tokens, torch.arange(s).repeat(b), segment_ids, prefix_len, targets)


batches = st.builds(batch_of, st.integers(1, 3), st.sampled_from(SEQUENCES), st.sampled_from(KINDS), st.integers(0, 2**20))


@settings(deadline=None, max_examples=60)
@given(batches)
def test_rule_and_blocks(batch):
    """The rule is the dense mask, element by element, as torch reads it; of its blocks torch says the same."""
    b, s = batch.b, batch.s
    rule = flex.mask_mod_of(batch)
    mask = batch.attention_mask()
    assert torch.equal(torchs.create_mask(rule, b, None, s, s, device=DEVICE), mask)
    assert mask.any(-1).all(), "no softmax over nothing"
    ours, expected = flex.block_mask_of(batch), torchs.create_block_mask(rule, b, None, s, s, device=DEVICE)
    assert ours.shape == expected.shape and ours.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        for field in (name, f"full_{name}"):
            assert torch.equal(getattr(ours, field), getattr(expected, field)), field


def test_a_batch_is_freed_at_once():
    batch = batch_of(2, 200, "segments and prefixes", 0)
    gone = weakref.ref(batch)
    batch.memo("block_mask", partial(flex.block_mask_of, batch))
    del batch
    assert gone() is None


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        self.elements = max([self.elements, *(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_no_square_is_made():
    """Of b s^2 elements; a row of blocks has s / 128 times fewer."""
    batch = batch_of(2, 1100, "segments and prefixes", 0)
    with Largest() as largest:
        flex.block_mask_of(batch)
    assert largest.elements == 2 * 128 * 9 * 128
    with Largest() as largest:
        torchs.create_block_mask(flex.mask_mod_of(batch), 2, None, 1100, 1100, device=DEVICE)
    assert largest.elements >= 2 * 1100**2, "what this test can see"


def run(attend: Callable[..., Tensor], qkv: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    y = attend(*leaves)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves)]


def close(attend: Callable[..., Tensor], batch: TokenBatch, heads: tuple[int, int], dtype: torch.dtype, d: int = 16) -> None:
    """Output and each gradient are, by Frobenius norm, within 2x the error of SDPA with a dense mask, or 4 roundings of fp32."""
    shapes = [(batch.b, n, batch.s, d) for n in (heads[0], heads[1], heads[1])]
    qkv = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    gradient = normal(*shapes[0], dtype=dtype, seed=9)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=batch.attention_mask(), enable_gqa=True)

    exact = run(sdpa, [x.double() for x in qkv], gradient)
    for name, ours, theirs, truth in zip("yqkv", run(attend, qkv, gradient), run(sdpa, qkv, gradient), exact, strict=True):
        assert ours.dtype == dtype
        error, bound = float((ours - truth).norm()), max(2 * float((theirs - truth).norm()), 2.0**-22 * float(truth.norm()))
        assert error <= bound, f"{name}: {error:.1e} above {bound:.1e}"


@settings(deadline=None, max_examples=60 if DEVICE == "cpu" else 12)
@given(batches, st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.sampled_from(DTYPES))
def test_against_sdpa(batch, heads, dtype):
    torch._dynamo.reset()  # on a GPU each example may compile a kernel, and the compiler gives up after 8 of one function
    close(lambda q, k, v: flex.flex_attention(q, k, v, batch), batch, heads, dtype)


@on_cpu
def test_the_operator_that_is_compiled_for_cuda():
    """What a GPU compiles, as far as the CPU can go: gradients, and one graph for all kinds of masks and every new batch."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    # Gradients on a CPU are refused before the operator, for want of generated code; the operator has them.
    with mock.patch.object(torchs, "_validate_device", lambda *qkv: None), mock.patch.object(flex, "kernel_for") as kernel:
        kernel.return_value = torch.compile(torchs.flex_attention, fullgraph=True, backend=backend)
        for seed, kind in enumerate(KINDS):
            batch = batch_of(2, 131, kind, seed)
            close(lambda q, k, v, batch=batch: flex.flex_attention(q, k, v, batch), batch, (4, 2), torch.float32)
        assert len(graphs) == 1
        batch, recompute = batch_of(2, 131, "segments", 9), {"recompute": True}
        x = normal(batch.t, 32, dtype=torch.float32, seed=0)
        kept, again = (layer_run(Attention(32, 2, 1, backend="flex", **options), x, batch) for options in ({}, recompute))
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def layer_run(layer: Attention, x: Tensor, batch: TokenBatch) -> list[Tensor]:
    """Output and gradients of a layer with drawn weights."""
    with torch.no_grad():
        for i, param in enumerate(layer.parameters()):
            param.copy_(normal(*param.shape, dtype=param.dtype, seed=i))
    x = x.clone().requires_grad_()
    y = layer(x, batch)
    y.sum().backward()
    return [y.detach(), x.grad, *(param.grad for param in layer.parameters())]


@cpu_only
@pytest.mark.parametrize("kind", [*KINDS, "in pieces"])
def test_fused_is_sdpa(kind):
    """Without the dense mask, which is not made: within 2x SDPA's error. Where there are no spans it is SDPA, and of its bits."""
    batch, x = batch_of(2, 131, kind, 5), normal(262, 32, dtype=torch.float32, seed=0)
    if kind == "in pieces":
        batch = replace(batch, segment_ids=torch.arange(262) % 3)
    said = batch.attention_spans() is not None
    assert said or kind in ("prefixes", "in pieces")
    with mock.patch.object(TokenBatch, "_dense_mask", side_effect=AssertionError("a mask")) if said else nullcontext():
        fused, again = (layer_run(Attention(32, 4, 2, backend="fused", **options), x, batch) for options in ({}, {"recompute": True}))
    sdpa, exact = (layer_run(Attention(32, 4, 2, backend="sdpa", dtype=z.dtype), z, batch) for z in (x, x.double()))
    for ours, kept, theirs, truth in zip(fused, again, sdpa, exact, strict=True):
        assert torch.equal(ours, kept) and (said or torch.equal(ours, theirs))
        assert float((ours - truth).norm()) <= 2 * float((theirs - truth).norm()) + 4 * 2**-24 * float(truth.norm())


@cpu_only
def test_samples_of_unequal_length_need_no_dense_mask():
    """Their padding is outside of every prefix."""
    prefix_lm = PrefixLM(sequence_length=16, vocab_size=31)
    samples = [prefix_lm(np.arange(n), Generator(0, n)) for n in (9, 14, 6)]
    batch = collate(samples, 16)
    assert batch.prefix_len is not None and batch.segment_ids is None
    spans, index = batch.attention_spans(), torch.arange(16)
    assert spans is not None
    assert torch.equal((index >= spans[..., :1]) & (index < spans[..., 1:]), batch.attention_mask()[:, 0])


SIZES = {"hidden_size": 48, "layers": 2, "heads": 3, "kv_heads": 1, "init_std": 0.2}
LLAMA, GPT = DecoderConfig(ffn_size=40, **SIZES), gpt_style(max_positions=64, **SIZES)


def using(config: DecoderConfig, attention: str) -> DecoderConfig:
    return DecoderConfig(**{**vars(config), "attention": attention})


def loss_of(batch: TokenBatch) -> Callable[[Decoder], Tensor]:
    return lambda model: token_loss(model, model.hidden(batch), batch)[0]


def check_decoder(tp: int, config: DecoderConfig, kind: str, recompute: str, sequence_parallel: bool) -> None:
    """One process with SDPA against tp ranks with flex; the dense mask is not asked for."""
    mesh = ParallelMesh(tp=tp) if tp > 1 else ParallelMesh.alone()
    options = {"sequence_parallel": sequence_parallel, "recompute": Recompute(recompute)}
    alone = Decoder(using(config, "sdpa"), 31, ParallelMesh.alone())
    parallel = Decoder(using(config, "flex"), 31, mesh, **options)
    batch = batch_of(2, 33, kind, 5)
    assert_same_gradients(alone, parallel, loss_of(batch))
    fresh = batch_of(2, 33, kind, 5)
    with mock.patch.object(TokenBatch, "attention_mask", side_effect=AssertionError("a dense mask")):
        gradients(parallel, loss_of(fresh))
    assert "attention_mask" not in fresh._memo and "block_mask" in fresh._memo


CASES = [(LLAMA, "segments and prefixes", "none", False), (LLAMA, "prefix", "attention", True), (GPT, "segments", "full", True)]


@pytest.mark.parametrize("tp", [1, 2])
def test_decoder(ranks, tp):
    for case in CASES:
        ranks.run(tp, check_decoder, tp, *case)


def check_pipeline() -> None:
    """Two stages, three micro-batches, one of them causal."""
    data = [batch_of(2, 33, kind, seed) for seed, kind in enumerate(("segments and prefix", "causal", "prefixes"))]
    mesh, count = ParallelMesh(pp=2), len(data)
    model = PipelinedDecoder(using(LLAMA, "flex"), 31, mesh, schedule=make_schedule("1f1b", 2, 1, count))
    model.runner.step(data, lambda x, batch: token_loss(model.stages[-1], x, batch))
    model.grads.finish()
    alone = Decoder(using(LLAMA, "sdpa"), 31, ParallelMesh.alone())

    def loss(model: Decoder) -> Tensor:
        return sum(loss_of(batch)(model) for batch in data)

    single, exact = (gradients(model, loss)[1] for model in (alone, Decoder(LLAMA, 31, ParallelMesh.alone(), dtype=torch.float64)))
    floor = 1e-6 * max(float(g.abs().max()) for g in exact.values())
    for stage in model.stages:
        expected = boxes(stage, exact)
        for (name, start), grad in logical(stage, lambda p: p.main_grad).items():
            bound = max(4 * float((single[name, start] - exact[name, start]).abs().max()), floor)
            error = float((grad - expected[name, start]).abs().max())
            assert error <= bound, f"{name}: {error:.1e} above {bound:.1e}"


def test_pipeline(ranks):
    ranks.run(2, check_pipeline)


@pytest.mark.parametrize("attention", ["fused", "flex"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_depends_on_what_it_may_not_see(kind, attention):
    """Each token in turn is changed: in one layer exactly the logits that may see it change, bit for bit."""
    model = Decoder(DecoderConfig(**{**SIZES, "layers": 1}, ffn_size=40, attention=attention), 31, ParallelMesh.alone())
    batch = batch_of(2, 18, kind, 3)

    def logits(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(TokenBatch(2, 18, tokens, batch.position_ids, batch.segment_ids, batch.prefix_len))

    before = logits(batch.tokens)
    for j in range(batch.t):
        tokens = batch.tokens.clone()
        tokens[j] = (tokens[j] + 1) % 31
        changed = (logits(tokens) != before).any(-1).view(2, 18)
        row, key = divmod(j, 18)
        assert torch.equal(changed[row], batch.attention_mask()[row, 0, :, key]) and not changed[1 - row].any()


def test_generation_is_causal():
    """And stays SDPA's, bit for bit."""
    prompt = integers(0, 31, 2, 3, seed=0)
    flexible, plain = (Decoder(using(LLAMA, name), 31, ParallelMesh.alone()) for name in ("flex", "sdpa"))
    with mock.patch.object(flex, "kernel_for", side_effect=AssertionError("flex")):
        assert torch.equal(generate(flexible, prompt, 5), generate(plain, prompt, 5))


def test_refusals():
    with pytest.raises(ValueError, match='attention="dense" is not known: use "fused", "sdpa" or "flex"'):
        Attention(32, 2, backend="dense")
    with pytest.raises(ValueError, match='head_size=8 must be 16 or more for attention="flex"'):
        Attention(32, 4, backend="flex")
    with pytest.raises(ValueError, match="is 'dense' and must be 'fused' or 'sdpa' or 'flex'"):
        from_dict(Config, {"model": {"attention": "dense"}})
    assert from_dict(Config, {"model": {"attention": "flex"}}).model.attention == "flex"
    with pytest.raises(ValueError, match='attention="flex" runs on cuda, and for tests on cpu, not on meta: use "fused"'):
        flex.kernel_for("meta")
