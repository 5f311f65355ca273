"""The causal language modelling loss: a sum, and what it counted."""

import pytest
import torch
import torch.nn.functional as F

from megapar import ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.models.decoder import Decoder
from megapar.objectives.causal_lm import IGNORED, causal_lm_loss

CONFIG = DecoderConfig(hidden_size=16, layers=1, heads=4, kv_heads=2, ffn_size=20, init_std=0.3)
VOCAB = 31


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCAB, (3, 8), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 3:] = IGNORED
    return inputs, targets


def loss_at(tp: int) -> tuple[float, int]:
    model = Decoder(CONFIG, VOCAB, ParallelMesh(tp=tp), seed=2)
    loss, count = causal_lm_loss(model, *samples())
    return float(loss.detach()), count


def test_sum_and_count_against_torch(ranks):
    inputs, targets = samples()
    model = Decoder(CONFIG, VOCAB, ParallelMesh.alone(), seed=2)
    with torch.no_grad():
        loss, count = causal_lm_loss(model, inputs, targets)
    expected = F.cross_entropy(model(inputs).detach().double(), targets.reshape(-1), ignore_index=IGNORED, reduction="sum")
    assert count == 17
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for parallel, counted in ranks.run(2, loss_at, 2):
        assert (parallel, counted) == (pytest.approx(float(loss), rel=1e-6), count)


def test_nothing_to_predict_counts_zero():
    inputs, targets = samples()
    loss, count = causal_lm_loss(Decoder(CONFIG, VOCAB, ParallelMesh.alone()), inputs, torch.full_like(targets, IGNORED))
    assert (float(loss.detach()), count) == (0.0, 0)
