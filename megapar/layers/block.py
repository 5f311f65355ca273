"""The decoder block: x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, arXiv:2002.04745).

The first of the two sums is part of the second norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.layers.attention import Attention
from megapar.layers.mlp import MLP


class DecoderBlock(nn.Module):
    """x [t, h] and its TokenBatch to [t, h]; under sequence parallelism this rank's ceil(t / tp) tokens.

    `mlp_norm(x, residual=...)` returns the norm of the sum and the sum, as megapar.layers.norm's do.
    """

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, batch: TokenBatch, result: bool = True) -> Tensor:
        """result=False, in a recomputation: the MLP's last product is left out, and what is returned is not filled."""
        y, x = self.mlp_norm(self.attention(self.attention_norm(x), batch), residual=x)
        return x + self.mlp(y, result)
