"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from torch import Tensor

from megapar.batch import TokenBatch
from megapar.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from megapar.models.decoder import Decoder, DecoderStage

IGNORED = -100
"""The target of a position that has nothing to predict."""


def causal_lm_loss(model: Decoder, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """inputs and targets int64 [b, s] to (fp32 sum of the losses in nats, number of targets that are not IGNORED)."""
    batch = TokenBatch.of(inputs, targets)
    return token_loss(model, model.hidden(batch), batch)


def token_loss(stage: DecoderStage, hidden: Tensor, batch: TokenBatch) -> tuple[Tensor, int]:
    """What the last stage returned, and its batch with targets, to (fp32 sum of the losses in nats, number of targets not IGNORED)."""
    if batch.targets is None:
        raise ValueError("the batch has no targets and the loss needs one for each token: make it with TokenBatch.of(tokens, targets)")
    loss = vocab_parallel_linear_cross_entropy(
        hidden,
        stage.head.weight,
        batch.targets,
        tp=stage.tp,
        ignore_index=IGNORED,
        vocab_size=stage.vocab_size,
        sequence_parallel=stage.sequence_parallel,
    )
    return loss, int((batch.targets != IGNORED).sum())
