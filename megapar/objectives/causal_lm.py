"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from megapar.batch import TokenBatch
from megapar.layers.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from megapar.models.decoder import Decoder, DecoderStage
from megapar.objectives.randomness import Generator
from megapar.objectives.sample import IGNORED, Ids, Objective, Sample


def causal_lm_loss(model: Decoder, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """inputs and targets int64 [b, s] to (fp32 sum of the losses in nats, number of targets that are not IGNORED)."""
    batch = TokenBatch.of(inputs, targets)
    return token_loss(model, model.hidden(batch), batch)


def token_loss(
    stage: DecoderStage,
    hidden: Tensor,
    batch: TokenBatch,
    loss_scale: float | Tensor = 1.0,
    z_loss: float = 0.0,
    token_losses: Tensor | None = None,
) -> tuple[Tensor, int]:
    """What the last stage returned, and its batch with targets, to (fp32 sum of the losses in nats, number of targets not IGNORED).

    loss_scale: what backward will be called with. z_loss: times log(Z)^2 of every token is added (arXiv:2204.02311, section 5).
    token_losses: fp32 [t], filled with the loss of each token, 0 where there is no target.
    Raises ValueError for a batch without targets.
    """
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
        loss_scale=loss_scale,
        z_loss=z_loss,
        token_losses=token_losses,
    )
    return loss, int((batch.targets != IGNORED).sum())


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """Next-token prediction over a window of text, in which `end_id` ends a document and is its last token.

    reset_position_ids, reset_attention_mask, eod_mask_loss: Megatron's options and names. Positions start anew, and attention stops, at a
    document's start; an end token does not predict the next document's first (its own prediction keeps its loss). A corpus whose
    text may itself spell `end_id` has its documents made samples one by one, and packed by `sample.pack`.
    """

    end_id: int | None = None
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    name: str = "causal_lm"

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = [name for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss") if getattr(self, name)]
        if chosen and self.end_id is None:
            raise ValueError(f"{', '.join(chosen)} need to know where documents end and end_id is none: give the end-of-text id")

    def __call__(self, tokens: Ids, generator: Generator) -> Sample:
        """The sample of `tokens`, integers [n] with 2 <= n <= tokens_needed; draws nothing. Raises ValueError for any others."""
        return self.sample(self.check(tokens), self.name)

    def sample(self, text: Ids, name: str) -> Sample:
        """The sample of any ids [n], of specials too."""
        sample = Sample.of(text, name)
        ends = sample.tokens == self.end_id
        # A document's end is its last token, so the next one is the first of another.
        is_start = np.concatenate([[False], ends[:-1]])
        index = np.arange(len(ends))
        if self.reset_position_ids:
            sample = replace(sample, position_ids=index - np.maximum.accumulate(np.where(is_start, index, 0)))
        if self.reset_attention_mask:
            sample = replace(sample, segment_ids=np.cumsum(is_start))
        if self.eod_mask_loss:
            sample = replace(sample, targets=np.where(ends, IGNORED, sample.targets))
        return sample
