"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from torch import Tensor

from megapar.batch import TokenBatch
from megapar.layers.cross_entropy import vocab_parallel_cross_entropy
from megapar.models.decoder import Decoder

IGNORED = -100
"""The target of a position that has nothing to predict."""


def causal_lm_loss(model: Decoder, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """inputs and targets int64 [b, s] to (fp32 sum of the losses in nats, number of targets that are not IGNORED)."""
    logits = model(TokenBatch.of(inputs))
    losses = vocab_parallel_cross_entropy(
        logits, targets.reshape(-1), tp=model.tp, ignore_index=IGNORED, vocab_size=model.vocab_size, overwrite_logits=True
    )
    return losses.sum(), int((targets != IGNORED).sum())
