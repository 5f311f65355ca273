"""The decoder in parallel is the decoder alone: losses, raw gradients, initial weights, trained weights."""

import itertools

import pytest
import torch
from torch import nn

from megapar import ParallelMesh, vocab_parallel_cross_entropy
from megapar.grads import MainGrads
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.params import named_specs
from tests.parity import assert_same_gradients, boxes, logical

VOCAB = 61  # a prime: no tp divides it
HEADS = {"1 kv": (4, 1), "2 kv": (4, 2), "4 kv": (4, 4), "8 over 4": (8, 4)}


def config(heads: str, tied: bool, gpt: bool = False, uneven: bool = False) -> DecoderConfig:
    q, kv = HEADS[heads]
    if gpt:
        return gpt_style(hidden_size=8 * q, layers=2, heads=q, kv_heads=kv, max_positions=16)
    ffn = 53 if uneven else 48
    return DecoderConfig(hidden_size=8 * q, layers=2, heads=q, kv_heads=kv, ffn_size=ffn, tied_embeddings=tied, init_std=0.2)


def loss_of(tokens: torch.Tensor):
    def loss(model: nn.Module) -> torch.Tensor:
        assert isinstance(model, Decoder)
        logits = model(tokens[:, :-1])
        return vocab_parallel_cross_entropy(logits, tokens[:, 1:].reshape(-1), tp=model.tp, vocab_size=VOCAB).sum()

    return loss


def tokens_for(s: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, s + 1), generator=torch.Generator().manual_seed(s))


def compare(cases: list[tuple[DecoderConfig, bool, int]], tp: int) -> None:
    mesh = ParallelMesh(tp=tp)
    for model_config, sequence_parallel, s in cases:
        alone = Decoder(model_config, VOCAB, ParallelMesh.alone(), seed=3)
        parallel = Decoder(model_config, VOCAB, mesh, sequence_parallel=sequence_parallel, seed=3)
        assert_same_gradients(alone, parallel, loss_of(tokens_for(s)))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_gradients_llama(ranks, tp, heads):
    flags = itertools.product((False, True), (False, True), (False, True))
    # 2 x 7 tokens: tp 3 and 4 pad them under sequence parallelism.
    ranks.run(tp, compare, [(config(heads, tied, uneven=uneven), sp, 7) for tied, sp, uneven in flags], tp)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_gradients_gpt(ranks, tp):
    ranks.run(tp, compare, [(config(heads, True, gpt=True), sp, 7) for heads in ("4 kv", "2 kv") for sp in (False, True)], tp)


def initial(model_config: DecoderConfig, tp: int) -> None:
    whole = logical(Decoder(model_config, VOCAB, ParallelMesh.alone(), seed=5), lambda p: p)
    mesh = ParallelMesh(tp=tp)
    for sequence_parallel in (False, True):
        model = Decoder(model_config, VOCAB, mesh, sequence_parallel=sequence_parallel, seed=5)
        local = logical(model, lambda p: p)
        for name, expected in boxes(model, whole).items():
            assert torch.equal(local[name], expected), name


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_initial_weights_bitwise(ranks, tp):
    for heads in HEADS:
        ranks.run(tp, initial, config(heads, False, uneven=True), tp)


def test_initial_weights_differ_by_seed_and_name():
    weights = [logical(Decoder(config("2 kv", False), VOCAB, ParallelMesh.alone(), seed=s), lambda p: p) for s in (1, 2)]
    first, second = ({name: value for (name, _), value in w.items()} for w in weights)
    assert not torch.equal(first["head.weight"], second["head.weight"])
    assert not torch.equal(first["blocks.0.attention.k.weight"], first["blocks.0.attention.v.weight"])
    assert not torch.equal(first["blocks.0.mlp.up.weight"], first["blocks.1.mlp.up.weight"])


def train(tp: int, sequence_parallel: bool, optimizer: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two micro-batches a step, accumulated in main_grad; the boxes of this rank and the losses."""
    mesh = ParallelMesh(tp=tp) if tp > 1 else ParallelMesh.alone()
    model = Decoder(config("2 kv", True, uneven=True), VOCAB, mesh, sequence_parallel=sequence_parallel, seed=3)
    main = MainGrads(model.parameters())
    update = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        main.zero()
        total = torch.zeros(())
        for micro_batch in range(2):
            loss = loss_of(tokens_for(11 + 2 * step + micro_batch))(model)
            loss.backward()
            total += loss.detach()
        main.finish()
        count = sum(2 * (11 + 2 * step + i) for i in range(2))
        for param in main.params:
            param.grad = param.main_grad / count
        update.step()
        losses.append(float(total) / count)
    return losses, logical(model, lambda p: p)


def train_both(tp: int, sequence_parallel: bool) -> None:
    for optimizer, steps in (("sgd", 10), ("adamw", 20)):
        losses, whole = train(1, False, optimizer, steps)
        parallel_losses, local = train(tp, sequence_parallel, optimizer, steps)
        model = Decoder(config("2 kv", True, uneven=True), VOCAB, ParallelMesh(tp=tp), sequence_parallel=sequence_parallel)
        if optimizer == "sgd":
            worst = max(float((local[n] - w).abs().max()) for n, w in boxes(model, whole).items())
            assert worst <= 5e-6
        assert max(abs(a - b) for a, b in zip(losses, parallel_losses, strict=True)) <= 1e-5


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_training(ranks, tp, sequence_parallel):
    ranks.run(tp, train_both, tp, sequence_parallel)


def test_state_is_owned_once(ranks):
    """Every element of every logical tensor is owned by exactly one rank: what norms and checkpoints rely on."""
    for tp, heads in itertools.product((2, 3, 4), HEADS):
        owned = ranks.run(tp, owned_boxes, config(heads, True, uneven=True), tp)
        counts: dict[str, torch.Tensor] = {}
        for name, shape, index in itertools.chain(*owned):
            counts.setdefault(name, torch.zeros(shape, dtype=torch.int64))[index] += 1
        assert all(bool((count == 1).all()) for count in counts.values())


def owned_boxes(model_config: DecoderConfig, tp: int) -> list[tuple[str, tuple[int, ...], tuple[slice, ...]]]:
    model = Decoder(model_config, VOCAB, ParallelMesh(tp=tp), sequence_parallel=True)
    return [(p.name, p.shape, p.index) for _, _, spec in named_specs(model) if spec.owner for p in spec.pieces]
