"""The decoder block: x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, arXiv:2002.04745)."""

from __future__ import annotations

from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.layers.attention import Attention
from megapar.layers.mlp import MLP


class DecoderBlock(nn.Module):
    """x [t, h] and its TokenBatch to [t, h]; under sequence parallelism this rank's ceil(t / tp) tokens."""

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, batch: TokenBatch) -> Tensor:
        x = x + self.attention(self.attention_norm(x), batch)
        return x + self.mlp(self.mlp_norm(x))
