"""Text from a decoder: greedy, or top-p sampling (arXiv:1904.09751). Every rank draws the same tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megapar.collectives import all_gather_last
from megapar.mesh import Axis
from megapar.params import seed_of, split


class LanguageModel(Protocol):
    """What can be asked for the next token's logits [b, v / tp] after tokens [b, s]: a Decoder, or one in a pipeline."""

    vocab_size: int
    tp: Axis

    def next_logits(self, tokens: Tensor) -> Tensor: ...


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    new_tokens: int,
    *,
    top_p: float = 1.0,
    temperature: float = 1.0,
    window: int = 256,
    seed: int = 0,
    text_size: int | None = None,
) -> Tensor:
    """prompt int64 [b, s] to [b, s + new_tokens]; `temperature=0` takes the likeliest token.

    text_size: ids from it on are never chosen (an objective's special tokens); none: all may be.

    The model sees the last `window` tokens; nothing is cached between tokens. Raises ValueError for an empty prompt, top_p outside
    (0, 1], a negative temperature or number of new tokens, and a window that shows no token.
    """
    if prompt.dim() != 2 or prompt.numel() == 0:
        raise ValueError(f"the prompt has shape {tuple(prompt.shape)} and must be [b, s] with a token or more: give it some text")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]: 1 samples from all tokens")
    if temperature < 0.0:
        raise ValueError(f"temperature={temperature} must be 0 or more: 0 takes the likeliest token")
    if new_tokens < 0:
        raise ValueError(f"new_tokens={new_tokens} must be 0 or more: raise it")
    if window < 1:
        raise ValueError(f"window={window} must be 1 or more tokens: raise it")
    parts = split(model.vocab_size, model.tp.size)
    generator = torch.Generator(prompt.device).manual_seed(seed_of("generate", seed))  # any integer
    tokens = prompt
    for _ in range(new_tokens):
        logits = model.next_logits(tokens[:, -window:])
        # Gathered logits are the same bits on every rank, so equal generators draw equal tokens.
        full = logits if model.tp.size == 1 else all_gather_last(logits, model.tp, parts)
        tokens = torch.cat([tokens, choose(full[:, :text_size].float(), top_p, temperature, generator)], dim=1)
    return tokens


def choose(logits: Tensor, top_p: float, temperature: float, generator: torch.Generator) -> Tensor:
    """logits [b, v] to one token each, int64 [b, 1]: drawn from the likeliest tokens that together reach probability top_p."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    probability, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = probability.cumsum(-1) - probability
    drawn = torch.multinomial(probability.masked_fill(before >= top_p, 0.0), 1, generator=generator)
    return order.gather(-1, drawn)
