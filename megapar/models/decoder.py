"""The decoder: embedding, blocks, norm, output projection; Llama- or GPT-style by its config, tensor-parallel by its mesh."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megapar.batch import TokenBatch
from megapar.collectives import with_summed_grad
from megapar.layers.attention import Attention
from megapar.layers.block import DecoderBlock
from megapar.layers.embedding import VocabParallelEmbedding, check_ids
from megapar.layers.linear import ColumnParallelLinear
from megapar.layers.mlp import MLP
from megapar.layers.norm import LayerNorm, RMSNorm
from megapar.mesh import Axis, ParallelMesh
from megapar.models.config import DecoderConfig
from megapar.params import Init, ParamSpec, Piece, SpecParameter, initialize


class Decoder(nn.Module):
    """TokenBatch of t tokens to logits [t, this rank's part of the vocabulary].

    Built on `meta` and then drawn tensor by tensor from (seed, name): the same model for every layout. Between embedding and output
    projection hidden states are [t, h], or [ceil(t / tp), h] with `sequence_parallel`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocab_size: int,
        mesh: ParallelMesh,
        *,
        sequence_parallel: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.tp = config, vocab_size, mesh.tp
        self.sequence_parallel = sequence_parallel and mesh.tp.size > 1
        init = normal(config.init_std)
        self.common: dict[str, Any] = {"tp": mesh.tp, "sequence_parallel": self.sequence_parallel, "device": "meta", "dtype": dtype}
        self.embedding = VocabParallelEmbedding(vocab_size, config.hidden_size, init=init, **self.common)
        self.positions = LearnedPositions(config, mesh.tp, self.sequence_parallel, dtype) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(self._block(init) for _ in range(config.layers))
        self.norm = self._norm()
        self.head = ColumnParallelLinear(config.hidden_size, vocab_size, bias=False, init=init, **self.common)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        initialize(self, seed, mesh.device)

    def forward(self, batch: TokenBatch | Tensor) -> Tensor:
        """Logits [t, v / tp] of a TokenBatch, or of int64 tokens [b, s]."""
        if isinstance(batch, Tensor):
            batch = TokenBatch.of(batch)
        return batch.unpad(self.head(self.hidden(batch)))

    def hidden(self, batch: TokenBatch) -> Tensor:
        """What the output projection is given: [t, h], or [ceil(t / tp), h] with sequence parallelism."""
        if self.positions is not None:
            check_ids(batch.position_ids, self.config.max_positions, "position_ids")
        x = self.embedding(batch.tokens)
        if self.positions is not None:
            x = self.positions(x, batch)
        for block in self.blocks:
            x = block(x, batch)
        return self.norm(x)

    def _norm(self) -> nn.Module:
        norm = RMSNorm if self.config.norm == "rms" else LayerNorm
        return norm(self.config.hidden_size, eps=self.config.norm_eps, **self.common)

    def _block(self, init: Init) -> DecoderBlock:
        config, out_init = self.config, normal(self.config.init_std / (2 * self.config.layers) ** 0.5)
        attention = Attention(
            config.hidden_size,
            config.heads,
            config.kv_heads,
            head_size=config.head_size,
            bias=config.bias,
            rope_theta=config.rope_theta if config.positions == "rope" else None,
            init=init,
            out_init=out_init,
            **self.common,
        )
        mlp = MLP(
            config.hidden_size, config.ffn_size, activation=config.activation, bias=config.bias, init=init, out_init=out_init, **self.common
        )
        return DecoderBlock(self._norm(), attention, self._norm(), mlp)


class LearnedPositions(nn.Module):
    """Adds a learned vector for each position to the hidden states, [t, h] or this rank's share of them."""

    def __init__(self, config: DecoderConfig, tp: Axis, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel
        shape = (config.max_positions, config.hidden_size)
        partial = tp if sequence_parallel else None
        spec = ParamSpec((Piece.whole("weight", shape),), normal(config.init_std), partial, owner=tp.rank == 0)
        self.weight = SpecParameter.of(torch.empty(shape, device="meta", dtype=dtype), spec)

    def forward(self, x: Tensor, batch: TokenBatch) -> Tensor:
        ids = batch.position_ids
        if self.sequence_parallel:
            c = x.shape[0]
            ids = ids[self.tp.rank * c : (self.tp.rank + 1) * c]
        vectors = nn.functional.embedding(ids, with_summed_grad(self.weight))
        if vectors.shape[0] < x.shape[0]:
            # The padding rows of sequence parallelism have no position.
            vectors = nn.functional.pad(vectors, (0, 0, 0, x.shape[0] - vectors.shape[0]))
        return x + vectors


def normal(std: float) -> Init:
    """N(0, std^2)."""

    def init(full: Tensor, generator: torch.Generator | None) -> None:
        full.normal_(std=std, generator=generator)

    return init
