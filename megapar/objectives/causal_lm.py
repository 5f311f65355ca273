"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from torch import Tensor

from megapar.batch import TokenBatch
from megapar.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from megapar.models.decoder import Decoder

IGNORED = -100
"""The target of a position that has nothing to predict."""


def causal_lm_loss(model: Decoder, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """inputs and targets int64 [b, s] to (fp32 sum of the losses in nats, number of targets that are not IGNORED)."""
    loss = vocab_parallel_linear_cross_entropy(
        model.hidden(TokenBatch.of(inputs)),
        model.head.weight,
        targets,
        tp=model.tp,
        ignore_index=IGNORED,
        vocab_size=model.vocab_size,
        sequence_parallel=model.sequence_parallel,
    )
    return loss, int((targets != IGNORED).sum())
