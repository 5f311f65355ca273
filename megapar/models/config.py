"""What a decoder is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's sizes and style. The defaults of the style are Llama's; `gpt_style` gives GPT-2's."""

    hidden_size: int = 256
    """Width of the residual stream (h)."""
    layers: int = 4
    """Number of decoder blocks."""
    heads: int = 8
    """Query heads (n)."""
    kv_heads: int | None = None
    """Key/value heads, each shared by heads / kv_heads query heads; none: as many as query heads."""
    head_size: int | None = None
    """Width of a head (d); none: hidden_size / heads."""
    ffn_size: int = 704
    """Width of the feed-forward layer (f)."""
    max_positions: int = 2048
    """Longest sequence; sizes the table of learned positions."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """SwiGLU (gate, up, down) or GELU (up, down)."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary or learned positions."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    attention: Literal["fused", "sdpa", "flex"] = "fused"
    """fused: megapar's kernel on a CPU, else sdpa. sdpa: dense masks where they are not causal. flex: FlexAttention there, slow on CPUs."""
    bias: bool = False
    """Biases in the linear layers."""
    tied_embeddings: bool = False
    """The output projection is the embedding table."""
    embedding_gradient: float = 1.0
    """The gradient that reaches the embedding from above is multiplied by this (GLM-130B: 0.1)."""
    init_std: float = 0.02
    """Standard deviation of initial weights; those that write to the residual stream get init_std / sqrt(2 layers)."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "kv_heads", "head_size", "ffn_size", "max_positions"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"model.{name}={size} must be 1 or more: raise it")
        for name in ("norm_eps", "init_std", "rope_theta"):
            value = getattr(self, name)
            if not (0 < value < math.inf or (value == 0 and name != "rope_theta")):
                raise ValueError(f"model.{name}={value} must be {'above 0' if name == 'rope_theta' else '0 or more'} and finite: change it")
        if not 0 < self.embedding_gradient <= 1:
            raise ValueError(f"model.embedding_gradient={self.embedding_gradient} must lie in (0, 1]: 1 turns it off")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}: change one of them")
        if self.head_size is None and self.hidden_size % self.heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} must be a multiple of model.heads={self.heads}: change one of them or give head_size"
            )

    def products(self, vocab_size: int, sequence_length: int) -> tuple[int, int]:
        """Multiplications a token takes in forward: in a block, and in the output projection. Causal attention counts half its square."""
        d, kv_heads = self.head_size or self.hidden_size // self.heads, self.kv_heads or self.heads
        projections = self.hidden_size * d * (2 * self.heads + 2 * kv_heads)
        scores = sequence_length * self.heads * d
        mlp = self.hidden_size * self.ffn_size * (3 if self.activation == "swiglu" else 2)
        return projections + scores + mlp, self.hidden_size * vocab_size


def gpt_style(**sizes: Any) -> DecoderConfig:
    """GPT-2's style: LayerNorm, learned positions, GELU, biases, tied embeddings, ffn_size 4 h unless given; or with other keys too."""
    sizes.setdefault("ffn_size", 4 * sizes.get("hidden_size", DecoderConfig.hidden_size))
    return DecoderConfig(norm="layer", positions="learned", activation="gelu", bias=True, tied_embeddings=True, **sizes)
