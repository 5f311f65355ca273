"""With a real decoder: no logit depends on a token it is to predict or may not see; packing changes no document's loss."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megapar import ParallelMesh
from megapar.batch import TokenBatch
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Sample, collate, pack
from tests.objectives.common import END, MODEL_VOCAB, OBJECTIVES, text

CONFIG = DecoderConfig(hidden_size=16, layers=2, heads=4, kv_heads=2, ffn_size=20, init_std=0.4)


def samples_of(name: str, packed: bool) -> list[Sample]:
    objective = OBJECTIVES[name]
    if not packed:
        tokens = text(objective.tokens_needed, seed=1)
        tokens[[5, 11]] = END
        return [objective(tokens, Generator(1, 0, 0, name))]
    documents = [np.append(text(n, seed=n), END) for n in (3, 6, 4, 5)]
    return pack((objective(document, Generator(2, 0, i, name)) for i, document in enumerate(documents)), 40)


def logits_of(model: Decoder, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        return model(batch)


def replaced(batch: TokenBatch, j: int) -> TokenBatch:
    tokens = batch.tokens.clone()
    tokens[j] = (tokens[j] + 1) % MODEL_VOCAB
    return TokenBatch(batch.b, batch.s, tokens, batch.position_ids, batch.segment_ids, batch.prefix_len)


def check_leaks(name: str, packed: bool, tp: int) -> int:
    """Changes each token in turn. Returns how many logits changed before the changed token: those of a bidirectional prefix."""
    model = Decoder(CONFIG, MODEL_VOCAB, ParallelMesh(tp=tp), seed=2)
    samples = samples_of(name, packed)
    batch, targets = collate(samples, max(len(sample.tokens) for sample in samples) + 2)
    target = targets.flatten()
    before = logits_of(model, batch)
    earlier = 0
    for j in range(batch.t):
        changed = (logits_of(model, replaced(batch, j)) != before).any(-1)
        sequence, at = divmod(j, batch.s)
        sample = samples[sequence]
        for i in changed.nonzero().flatten().tolist():
            assert i // batch.s == sequence, "another sequence"
            i -= sequence * batch.s
            if at < len(sample.tokens):
                # Written out from the sample, not from the batch's mask.
                assert sample.segment_ids[i] == sample.segment_ids[at], "another document"
                assert at <= i or max(i, at) < sample.prefix_end[i], "a later token outside the prefix"
                earlier += i < at
                assert i >= at or target[sequence * batch.s + i] == IGNORED or sample.targets[i] != sample.tokens[at] or i + 1 != at
                assert i >= at or sample.targets[i] == IGNORED, "a position that predicts has seen its future"
        if at < len(sample.tokens):
            assert changed[j], "the test would see a change"
    return earlier


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_no_logit_sees_what_it_predicts(ranks, packed, tp):
    for name in OBJECTIVES:
        found = ranks.run(tp, check_leaks, name, packed, tp)
        assert len(set(found)) == 1
        assert (found[0] > 0) == (not name.startswith(("causal", "fim"))), f"{name}: the prefix is read in both directions, the rest is not"


def losses(name: str, tp: int) -> tuple[float, float, int, int]:
    """Sum of losses and number of targets: packed, and of each document alone."""
    model = Decoder(CONFIG, MODEL_VOCAB, ParallelMesh(tp=tp), seed=3)

    def loss(samples: list[Sample], length: int) -> tuple[float, int]:
        batch, targets = collate(samples, length)
        logits = model.norm_free(batch) if hasattr(model, "norm_free") else model(batch)
        return logits, targets

    return loss  # type: ignore[return-value]
