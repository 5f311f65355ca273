"""With a real decoder: no logit depends on a token it is to predict or may not see; packing changes no document's loss."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.models.config import DecoderConfig, gpt_style
from megapar.models.decoder import Decoder
from megapar.objectives.causal_lm import token_loss
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Sample, collate, pack
from tests.objectives.common import END, MODEL_VOCAB, OBJECTIVES, text

CONFIG = DecoderConfig(hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=20, init_std=0.4)
GPT = gpt_style(hidden_size=16, layers=2, heads=4, max_positions=64)


def documents_of(name: str) -> list[Sample]:
    documents = [np.append(text(n, seed=n), END) for n in (3, 6, 4, 5)]
    return [OBJECTIVES[name](document, Generator(2, 0, i, name)) for i, document in enumerate(documents)]


def samples_of(name: str, packed: bool) -> list[Sample]:
    if packed:
        return pack(documents_of(name), 40)
    objective = OBJECTIVES[name]
    tokens = text(objective.tokens_needed, seed=1)
    tokens[[3, 8]] = END
    return [objective(tokens, Generator(1, 0, 0, name))]


def logits_of(model: Decoder, batch: TokenBatch, changed: int | None = None) -> Tensor:
    tokens = batch.tokens.clone()
    if changed is not None:
        tokens[changed] = (tokens[changed] + 1) % MODEL_VOCAB
    with torch.no_grad():
        return model(TokenBatch(batch.b, batch.s, tokens, batch.position_ids, batch.segment_ids, batch.prefix_len))


def check_leaks(packed: bool, tp: int) -> None:
    """Changes each token in turn, and looks at every logit whose bits change."""
    model = Decoder(CONFIG, MODEL_VOCAB, ParallelMesh(tp=tp), seed=2)
    for name in OBJECTIVES:
        samples = samples_of(name, packed)
        batch = collate(samples, max(len(sample.tokens) for sample in samples) + 2)
        before, looked_ahead = logits_of(model, batch), False
        for j in range(batch.t):
            row, at = divmod(j, batch.s)
            changed = (logits_of(model, batch, j) != before).any(-1).view(batch.b, batch.s)
            assert changed[row, at] and changed.any(1).sum() == 1, f"{name}: the token itself is seen, by its own sequence alone"
            sample = samples[row]
            for i in changed[row].nonzero().flatten().tolist():
                # Written out from the sample: the batch's own mask is under test.
                if i >= len(sample.tokens):
                    continue  # padding predicts nothing and may see what it likes
                assert at < len(sample.tokens), f"{name}: {i} has seen padding"
                assert sample.segment_ids[i] == sample.segment_ids[at], f"{name}: {i} has seen {at} of another document"
                assert at <= i or max(i, at) < sample.prefix_end[i], f"{name}: {i} has seen {at}, which comes later"
                assert at <= i or sample.targets[i] == IGNORED, f"{name}: {i} has a loss and has seen {at}"
                looked_ahead |= i < at
        assert looked_ahead == (not name.startswith(("causal", "fim"))), f"{name}: a prefix, and nothing else, is read in both directions"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_no_logit_sees_what_it_predicts(ranks, packed, tp):
    ranks.run(tp, check_leaks, packed, tp)


def loss_and_gradients(model: Decoder, samples: list[Sample]) -> tuple[float, int, list[Tensor]]:
    """Sums over one batch for each sample."""
    model.zero_grad()
    total, count = 0.0, 0
    for sample in samples:
        batch = collate([sample], len(sample.tokens) + 1)
        loss, counted = token_loss(model, model.hidden(batch), batch)
        loss.backward()
        total, count = total + float(loss.detach()), count + counted
    return total, count, [param.grad.clone() for param in model.parameters()]


def check_packing(config: DecoderConfig, tp: int, dtype: torch.dtype) -> None:
    model = Decoder(config, MODEL_VOCAB, ParallelMesh(tp=tp), seed=3, dtype=dtype)
    for name in OBJECTIVES:
        documents = documents_of(name)
        packed = pack(documents, 100)
        assert len(packed) == 1 < len(documents)
        same(loss_and_gradients(model, packed), loss_and_gradients(model, documents), name)
    window = text(25, seed=4)
    window[[0, 4, 9, 10, 20]] = END
    whole = OBJECTIVES["causal, documents"](window, Generator())
    # An end predicts nothing, so a document's sample is all of it, with its end as the last target; one of its end alone has none.
    documents = [d for d in np.split(window, np.flatnonzero(window == END) + 1) if len(d) > 1]
    alone = [Sample.of(document, name) for document in documents]
    same(loss_and_gradients(model, [whole]), loss_and_gradients(model, alone), "a window of documents")


def same(a: tuple[float, int, list[Tensor]], b: tuple[float, int, list[Tensor]], name: str) -> None:
    assert a[1] == b[1]
    assert a[0] == pytest.approx(b[0], rel=1e-6), name
    if a[2][0].dtype == torch.float32:
        return  # gradients in fp64, where a wrong one can be told from rounding
    largest = max(float(grad.abs().max()) for grad in b[2])
    worst = max(float((x - y).abs().max()) for x, y in zip(a[2], b[2], strict=True))
    assert worst <= 1e-9 * largest, f"{name}: {worst} of {largest}"


@pytest.mark.parametrize("config", [CONFIG, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("tp", [1, 2])
def test_packed_loss_is_the_documents_own(ranks, tp, config):
    for dtype in (torch.float32, torch.float64):
        ranks.run(tp, check_packing, config, tp, dtype)
